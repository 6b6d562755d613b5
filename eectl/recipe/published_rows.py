"""Rows of published data sets and of the splits that a recipe makes of them, before any file is read. No torch."""

from collections.abc import Mapping

from eectl.recipe.choices import SPLIT_CHOICES
from eectl.recipe.data_section import DataSection

PUBLISHED_ROWS: dict[str, tuple[int, int]] = {  # training rows, test rows
    "digits": (1438, 359),  # a stratified fifth of scikit-learn's 1,797 is the test split
    "mnist": (60_000, 10_000),
    "fashion-mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tinyimagenet": (100_000, 10_000),
    "imagenette": (9_469, 3_925),
    "imagenet": (1_281_167, 50_000),
    "20newsgroups": (11_314, 7_532),
    "glue/cola": (8_551, 1_043),  # GLUE is tested on its development sets, MNLI on the matched one
    "glue/sst2": (67_349, 872),
    "glue/mrpc": (3_668, 408),
    "glue/qqp": (363_846, 40_430),
    "glue/stsb": (5_749, 1_500),
    "glue/mnli": (392_702, 9_815),
    "glue/qnli": (104_743, 5_463),
    "glue/rte": (2_490, 277),
    "glue/wnli": (635, 71),
}


def published_parts(name: str) -> dict[str, int] | None:
    """Return the rows of a published data set's parts as they are stored; None for data that only its files know."""
    rows = PUBLISHED_ROWS.get(name)
    return None if rows is None else {"train": rows[0], "test": rows[1]}


def split_sizes(data: DataSection, parts: Mapping[str, int]) -> dict[str, int]:
    """Return the rows of each split that the recipe's data section makes of stored `parts`: train and maybe others."""
    carved = {name: getattr(data, name) for name in ("test", "validation", "calibration") if name not in parts}
    sizes = {name: round(share * parts["train"]) for name, share in carved.items() if share is not None}
    sizes = dict(parts) | sizes | {"train": parts["train"] - sum(sizes.values())}
    limits = {name: data.limit.of(name) for name in SPLIT_CHOICES}
    return {name: min(sizes[name], limit or sizes[name]) for name, limit in limits.items() if name in sizes}
