"""Which shards hold which split: by the patterns of `data.shards`, else by their usual names. Opens none of them."""

import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

from eectl.core.errors import EectlError, visible
from eectl.core.files import reading
from eectl.data.pictures import shown_path
from eectl.data.shard_targets import LAYOUT
from eectl.recipe.choices import SPLIT_CHOICES
from eectl.recipe.data_paths import expand
from eectl.recipe.data_section import DataSection, ShardsSection

_STARTS = ("train", "val", "calibration", "test")  # of the usual names, in the order of the splits
USUAL = {name: (f"{start}*.tar", f"{start}/*.tar") for name, start in zip(SPLIT_CHOICES, _STARTS, strict=True)}
MOST_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def find_shards(spec: DataSection, download: bool = False) -> dict[str, list[Path]]:
    """Return the shards of each split; raises EectlError where there are none to train on, or one is in two splits."""
    wanted = spec.shards or ShardsSection()
    root = spec.folder
    with reading(root):
        is_folder = root.is_dir()
    found: dict[str, list[Path]] = {}
    if not is_folder:  # data.root names the training shards themselves
        if wanted.train is not None:
            raise EectlError(
                f"data.root is '{spec.root}': no such folder, and data.shards names shards in it; name the folder of the shards"
            )
        found["train"] = _matching(Path(), str(root), download)
    for name in SPLIT_CHOICES:
        patterns = getattr(wanted, name)
        base = root if is_folder else root.parent
        if patterns is not None:
            found[name] = sorted({path for pattern in patterns for path in _matching(base, pattern, download)})
        elif is_folder and (usual := sorted(path for pattern in USUAL[name] for path in root.glob(pattern))):
            found[name] = usual
    if "train" not in found:
        raise EectlError(
            f"data.root is '{spec.root}': no {' or '.join(USUAL['train'])} in it; set data.shards.train to those to train on, "
            "such as 'imagenet-train-{0000..1023}.tar'"
        )
    counts = Counter(path.resolve() for paths in found.values() for path in paths)
    for path, count in counts.items():
        if count > 1:
            raise EectlError(f"{shown_path(path)}: this shard is in two splits, whose rows must not overlap; mend data.shards")
    return found


def _matching(base: Path, pattern: str, download: bool) -> list[Path]:
    """Return the shards that a pattern names: each of a range must be there, of * and ? at least one."""
    if re.match(r"[a-z0-9]+:", pattern):
        advice = "eectl reads shards from disk" + (", also with --download" if download else "")
        raise EectlError(f"data.shards: '{pattern[:200]}' is an address, and {advice}; fetch them first")
    if "**" in pattern:
        raise EectlError(
            f"data.shards: '{visible(pattern)[:200]}' would look through all folders; name the folder, as in train/*.tar"
        )
    found: list[Path] = []
    for name in expand_ranges(pattern):
        path = base / expand(name)
        if not set("*?[") & set(name):
            with reading(path):
                is_there = path.is_file()
            if not is_there:
                raise EectlError(f"{shown_path(path)}: there is no such shard, which '{visible(pattern)[:200]}' names; {LAYOUT}")
            found.append(path)
            continue
        start = Path(path.anchor) if path.is_absolute() else Path()
        there = sorted(each for each in start.glob(str(path.relative_to(start))) if each.is_file())
        if not there:
            raise EectlError(f"{shown_path(path)}: no shard has such a name; {LAYOUT}")
        found += there
    return found


def expand_ranges(pattern: str) -> list[str]:
    """Return the names that a pattern such as train-{000..099}.tar stands for, with as many digits as the range's ends have.

    Raises EectlError for a range that runs backwards, or too many names.
    """
    pieces = _RANGE.split(pattern)
    ranges = []
    for low, high in zip(pieces[1::3], pieces[2::3], strict=True):
        if int(low) > int(high):
            raise EectlError(
                f"data.shards: '{visible(pattern)[:200]}' has a range that runs from {low} down to {high}; turn it round"
            )
        ranges.append(range(int(low), int(high) + 1))
    total = np.prod([float(len(each)) for each in ranges])
    if total > MOST_SHARDS:
        raise EectlError(f"data.shards: '{visible(pattern)[:200]}' names {total:,.0f} shards; at most {MOST_SHARDS:,} are taken")
    widths = [len(low) for low in pieces[1::3]]
    return [
        pieces[0] + "".join(f"{value:0{width}}{rest}" for value, width, rest in zip(values, widths, pieces[3::3], strict=True))
        for values in product(*ranges)
    ]
