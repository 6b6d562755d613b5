"""Which rows each split of a data set has: those of its own files, and those that are carved out of the training rows.

Carving depends on the labels and `split_seed` alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError
from eectl.data.copies import Contents, Copies, settle_copies
from eectl.recipe.choices import SPLIT_CHOICES
from eectl.recipe.data_section import DataSection

Rows = NDArray[np.int64]
CARVED = ("test", "validation", "calibration")  # what is drawn from the training rows, in this order
FEWEST_ALIKE = 20  # rows of a group that splits are drawn from, where there are several
QUANTILES = 10  # groups of equal size by which a regression's rows are drawn


def check_test(spec: DataSection, parts: Collection[str]) -> None:
    """Raise EectlError where `data.test` asks for a test split and the data set has one among its `parts`."""
    if spec.test is not None and "test" in parts:
        where = spec.name if spec.is_of_library else f"'{spec.root}'"
        raise EectlError(f"data.test is {spec.test:g}, and {where} has a test split of its own; leave out one of the two")


def without_test(spec: DataSection, splits: Collection[str]) -> tuple[str, ...]:
    """Return the note that a data set without a test split deserves before anything is trained on it."""
    if "test" in splits:
        return ()
    return (
        f"{spec.name}: there is no test split, so eectl evaluate, bench and report will have nothing to measure on; "
        f"--set data.test=0.15 carves one out of the training rows, or add {place_of('test', spec)}",
    )


def place_of(name: str, spec: DataSection) -> str:
    """Return where a data set of the user's own would have the split `name`, in words."""
    if spec.is_of_library:
        return f"a split {name} to it"
    if spec.name == "wds":
        return f"shards of it, as data.shards.{name}"
    return f"a {name} file beside train" if spec.is_text else f"a folder {name}/<class>/ beside train/ in '{spec.root}'"


def row_groups(name: str, targets: NDArray[Any], spec: DataSection, *, noun: str = "images") -> NDArray[np.int64]:
    """Return the group of each row of a part [row], by which its rows are drawn.

    It is the class, of a number the tenth that it lies in by rank (of several numbers their mean, each scaled by its deviation),
    and of several labels the rarest. Raises EectlError where a split would be empty.
    """
    if spec.task in ("classification", "ordinal"):
        return targets
    most = _most_groups(len(targets), spec, noun) if name == "train" else min(QUANTILES, spec.limit.of(name) or QUANTILES)
    if spec.task == "multilabel":
        return _label_groups(targets, most)
    if targets.ndim > 1:
        deviation = targets.std(axis=0)
        targets = ((targets - targets.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).mean(axis=1)
    return rank_groups(targets, most)


def _most_groups(num_rows: int, spec: DataSection, noun: str) -> int:
    """Return in how many groups training rows may be drawn, so that `carve` finds some of each for every split."""
    wanted = {name: share for name in CARVED if (share := getattr(spec, name)) is not None}
    counts = {name: round(share * num_rows) for name, share in wanted.items()}
    for name, count in counts.items():
        if count < 1:
            raise EectlError(
                f"data.{name}: {wanted[name]:g} of {num_rows} {noun} leaves a split without rows; raise it or add {noun}"
            )
    limits = [limit for name in (*CARVED, "train") if (limit := spec.limit.of(name)) is not None]
    return int(min(QUANTILES, num_rows // 10 or 1, *counts.values(), *limits))


def _label_groups(targets: NDArray[np.float32], most: int) -> NDArray[np.int64]:
    """Return the group of each row of [row, label]: its rarest label, for the `most` − 1 such with the most rows.

    All other rows are in group 0, or in the largest where they are few.
    """
    rarity = targets.sum(axis=0)
    rarest = np.where(targets > 0, rarity, np.inf).argmin(axis=1) + 1
    rarest[~(targets > 0).any(axis=1)] = 0
    sizes = np.bincount(rarest, minlength=targets.shape[1] + 1)
    sizes[0] = 0
    kept = [group for group in np.argsort(-sizes, kind="stable")[: most - 1] if sizes[group] >= FEWEST_ALIKE]
    groups = np.where(np.isin(rarest, kept), rarest, 0)
    if kept and 0 < (groups == 0).sum() < FEWEST_ALIKE:
        groups[groups == 0] = kept[0]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def rank_groups(values: NDArray[np.float64], groups: int) -> NDArray[np.int64]:
    """Return which of `groups` groups of equal size each number lies in by rank [row], the smallest numbers in group 0."""
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return rank * groups // len(values)


def carve(
    labels: NDArray[np.int64], spec: DataSection, classes: Sequence[str], *, own: Collection[str] = (), noun: str = "images"
) -> dict[str, Rows]:
    """Return which rows of the training part belong to which split, sorted: test, validation, calibration and train.

    Rows are drawn by class (or quantile); who is drawn depends on `labels` and the split seed alone. Splits that the data set
    has of its `own` are not carved, and a test split only where `data.test` asks for one. What is left is for training. Each
    split is then cut to its limit.

    Raises:
        EectlError: where a split would lack a class.
    """
    rest = np.arange(len(labels))
    carved: dict[str, Rows] = {}
    for name in CARVED:
        share = getattr(spec, name)
        if share is None or name in own:
            continue
        rest, carved[name] = stratified(
            rest, labels, round(share * len(labels)), spec.split_seed, place=f"data.{name}", noun=noun
        )
    carved["train"] = rest
    for name, rows in carved.items():
        carved[name] = limited(rows, labels, name, spec, noun=noun)
        place = f"limit.{name}" if spec.limit.of(name) else name
        check_classes(labels[carved[name]], classes, place=f"data.{place}", noun=noun)
    return carved


def choose_rows(
    groups: Mapping[str, NDArray[np.int64]], spec: DataSection, classes: Sequence[str], *, noun: str = "images"
) -> dict[str, tuple[str, Rows]]:
    """Return of each split, in the order of SPLIT_CHOICES, the stored part that it comes from and its rows in there.

    `groups` are the classes (or quantiles) of the rows [row] of each part. Raises EectlError as `carve` does, and where
    `data.test` asks for a test split that is there.
    """
    check_test(spec, groups)
    carved = carve(groups["train"], spec, classes, own=groups, noun=noun)
    chosen = {name: ("train", rows) for name, rows in carved.items()}
    for name, own in groups.items():
        if name != "train":
            chosen[name] = name, limited(np.arange(len(own)), own, name, spec, noun=noun)
    return {name: chosen[name] for name in SPLIT_CHOICES if name in chosen}


def without_copies(
    contents: Mapping[str, Contents], spec: DataSection, classes: Sequence[str], *, noun: str = "images"
) -> tuple[dict[str, Rows], Copies]:
    """Return which of its rows each split keeps, all unless `data.copies` is drop, and the copies there are.

    Raises EectlError where a split would lack a class, or has no rows left.
    """
    kept, copies = settle_copies(contents, spec.copies, noun=noun, labelled=bool(classes))
    for name in copies.dropped or ():
        if not len(kept[name]):
            raise EectlError(
                f"data.copies is drop, and all {len(contents[name].ids)} {noun} in {name} are also in another split; name other "
                "files for one of them"
            )
        check_classes(contents[name].labels[kept[name]], classes, place=f"data.copies is drop, and in {name}", noun=noun)
    return kept, copies


def limited(rows: Rows, labels: NDArray[np.int64], split: str, spec: DataSection, *, noun: str = "images") -> Rows:
    """Return at most as many of a split's `rows` as its limit allows, drawn by class and split seed, sorted."""
    limit = spec.limit.of(split)
    if limit is None or limit >= len(rows):
        return rows
    return stratified(rows, labels, limit, spec.split_seed, place=f"data.limit.{split}", noun=noun)[1]


def stratified(
    rows: Rows, labels: NDArray[np.int64], count: int, seed: int, *, place: str, noun: str = "images"
) -> tuple[Rows, Rows]:
    """Return `rows` without `count` that are drawn by class, and those, both sorted; raises EectlError for too small a class."""
    from sklearn.model_selection import train_test_split

    sizes = np.unique_counts(labels[rows]).counts
    if count < len(sizes) or len(rows) < 2 * len(sizes) or sizes.min() < 2:
        raise EectlError(
            f"{place}: {count} of {len(rows)} {noun} is too small a split for {len(sizes)} classes (the smallest class has "
            f"{sizes.min()}); every split needs every class, so raise it or add {noun}"
        )
    count = min(count, len(rows) - len(sizes))  # scikit-learn wants every class on both sides
    rest, drawn = train_test_split(rows, test_size=count, stratify=labels[rows], random_state=seed)
    return np.sort(rest), np.sort(drawn)


def check_classes(labels: NDArray[np.int64], classes: Sequence[str], *, place: str, noun: str = "images") -> None:
    """Raise EectlError that names a class which `labels` lacks."""
    missing: Any = np.setdiff1d(np.arange(len(classes)), labels)
    if len(missing):
        raise EectlError(
            f"{place}: no {noun[:-1]} of class '{classes[missing[0]]}' ({len(missing)} of {len(classes)} classes missing) among "
            f"{len(labels)}; every split needs every class, so raise it or add {noun} of that class"
        )
