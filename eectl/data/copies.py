"""Copies: the same content in rows of two splits, by which results look better than they are. They are found before training.

Texts are compared as strings, images in memory by their pixels, and pictures that are not read ahead of time by their bytes:
those of a size that no other file has are not opened at all. What is nearly the same is not found.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError
from eectl.data.encoded import EncodedPictures

OVERLAP_ALLOWED = 0.01  # share of the smaller split; MNIST and its like hold a few duplicates
KEPT_IN = ("test", "calibration", "validation", "train")  # a copy that is dropped stays in the first of these that has it
SHOWN = 3  # pairs that a message names
READ_AT_ONCE = 2**20  # bytes
SAMPLE = 65536  # bytes from the middle of a file, which tell most files of one size apart


@dataclass(frozen=True)
class Contents:
    """The contents of a split's rows, as numbers: `ids` [row] are equal where contents are, whatever the `labels` [row].

    `name` gives the name of a row: the file, or its place among what is stored.
    """

    ids: NDArray[np.uint64]
    labels: NDArray[Any]
    name: Callable[[int], str]


@dataclass(frozen=True)
class Overlap:
    """Rows that stand in two splits: `count` of the `size` rows of the `smaller` one are also in the `larger`.

    `is_over` says that this is more than a few, and not only what people repeat ("thanks"). `pairs` names the first of them.
    """

    smaller: str
    larger: str
    count: int
    size: int
    is_over: bool
    pairs: str

    def text(self, noun: str) -> str:
        """Return it in words."""
        return f"{self.count} of the {self.size} {noun} in {self.smaller} are also in {self.larger} ({self.pairs})"

    @property
    def is_of_test(self) -> bool:
        """True where results would be reported on rows that the network or its thresholds were chosen by."""
        return "test" in (self.smaller, self.larger)


@dataclass(frozen=True)
class Copies:
    """The copies among a data set's splits. `wish` is the recipe's `data.copies`, `noun` what a row is.

    `dropped` counts the rows that were left out of each split, `examples` names some. `conflict` is a sentence on rows of equal
    content and different labels, or empty.
    """

    wish: str = "error"
    noun: str = "images"
    overlaps: tuple[Overlap, ...] = ()
    dropped: Mapping[str, int] | None = None
    examples: str = ""
    conflict: str = ""

    def check(self) -> None:
        """Raise EectlError where more than a few rows of the test split are also among those that a network is made with.

        The recipe may ask for it to be let pass.
        """
        for each in self.overlaps:
            if each.is_of_test and each.is_over and self.wish == "error":
                raise EectlError(
                    f"data.copies: {each.text(self.noun)}, so results would look better than they are; --set data.copies=drop "
                    "leaves copies out everywhere but in test, --set data.copies=keep uses them; or take them out of data.root"
                )

    def of_test(self) -> list[str]:
        """Return a note for each split that has rows in common with the test split."""
        return [each.text(self.noun) for each in self.overlaps if each.is_of_test]

    def notes(self) -> list[str]:
        """Return what is worth knowing before training: copies that were dropped or are kept, and labels that contradict."""
        notes = self.of_test() + [each.text(self.noun) for each in self.overlaps if each.is_over and not each.is_of_test]
        if self.dropped:
            counts = ", ".join(f"{count} of {name}" for name, count in self.dropped.items())
            notes.append(f"data.copies: left out {self.noun} that are also in another split: {counts} ({self.examples})")
        return notes + ([self.conflict] if self.conflict else [])


def settle_copies(
    contents: Mapping[str, Contents], wish: str, *, noun: str, labelled: bool
) -> tuple[dict[str, NDArray[np.int64]], Copies]:
    """Return which rows [row] of each split stay, and the copies there are.

    All rows stay unless `wish` is drop. Then a content stands in one split only, the first of KEPT_IN that has it.

    Args:
        contents: what stands in the rows of each split.
        wish: the recipe's `data.copies`.
        noun: the word for rows in messages.
        labelled: whether labels are classes, which contradict each other where they differ.
    """
    rows = {name: np.arange(len(each.ids)) for name, each in contents.items()}
    pairs = [(contents[a], contents[b]) for a, b in combinations([name for name in KEPT_IN if name in contents], 2)]
    conflict = _conflict(list(contents.values()), noun) if labelled else ""
    if wish != "drop":
        names = [name for name in reversed(KEPT_IN) if name in contents]
        overlaps = (_overlap(contents, a, b, repeats=noun == "texts") for a, b in combinations(names, 2))
        return rows, Copies(wish, noun, tuple(each for each in overlaps if each is not None), conflict=conflict)
    taken = np.empty(0, dtype=np.uint64)
    dropped: dict[str, int] = {}
    for name in KEPT_IN:
        if name not in contents:
            continue
        own = contents[name].ids
        rows[name] = np.flatnonzero(~np.isin(own, taken))
        if len(rows[name]) < len(own):
            dropped[name] = len(own) - len(rows[name])
        taken = np.concatenate([taken, own])
    examples = next((named for first, second in pairs if (named := _pairs(second, first))), "")
    return rows, Copies(wish, noun, dropped=dropped, examples=examples, conflict=conflict)


def _overlap(contents: Mapping[str, Contents], a: str, b: str, *, repeats: bool) -> Overlap | None:
    """Return what two splits have in common, None where that is nothing.

    Texts that stand more than once within a split are counted, but are not what is too many: with `repeats` people say them again
    and again.
    """
    one, other = contents[a], contents[b]
    smaller, larger = (a, b) if len(one.ids) <= len(other.ids) else (b, a)
    own = contents[smaller].ids
    shared = own[np.isin(own, contents[larger].ids)]
    if not len(shared):
        return None
    telling = np.setdiff1d(shared, np.concatenate([_repeated(one.ids), _repeated(other.ids)])) if repeats else shared
    return Overlap(smaller, larger, len(shared), len(own), len(telling) > OVERLAP_ALLOWED * len(own), _pairs(one, other))


def _repeated(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ids that stand more than once."""
    distinct, counts = np.unique(ids, return_counts=True)
    return distinct[counts > 1]


def _pairs(one: Contents, other: Contents) -> str:
    """Return the names of the first rows that stand in both, as `train/cat/a.png = test/cat/b.png`."""
    shared, mine, theirs = np.intersect1d(one.ids, other.ids, return_indices=True)
    order = np.argsort(mine)
    named = [f"{one.name(int(mine[place]))} = {other.name(int(theirs[place]))}" for place in order[:SHOWN]]
    return ", ".join([*named, "…"] if len(shared) > SHOWN else named)


def _conflict(parts: Sequence[Contents], noun: str) -> str:
    """Return a sentence on rows of equal content and different labels, or nothing."""
    ids, labels = (np.concatenate(each) for each in zip(*((part.ids, part.labels) for part in parts), strict=True))
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    order = np.lexsort((labels, ids))
    again = np.flatnonzero((ids[order][1:] == ids[order][:-1]) & (labels[order][1:] != labels[order][:-1]))
    if not len(again):
        return ""
    count = int(np.isin(ids, ids[order[again]]).sum())

    def name(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[part].name(row - int(starts[part]))

    named = [f"{name(int(order[place]))} = {name(int(order[place + 1]))}" for place in again[:SHOWN]]
    return (
        f"{count} {noun} have the same content as another and a different label ({', '.join(named)}"
        f"{', …' if len(again) > SHOWN else ''}), so they cannot all be right; look at the labels"
    )


def encoded_ids(places: Sequence[tuple[EncodedPictures, int]]) -> NDArray[np.uint64]:
    """Return a 64-bit number for each encoded picture, given as where it is kept and its row there; equal where their bytes are.

    Pictures are looked at by threads, and only as far as needed: the size of all, a part from the middle of those whose size
    another has too, and all bytes of those that are alike in that as well.
    """
    keys = [b""] * len(places)
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:
        for look in (_size, _middle, _all_bytes):
            counts = Counter(keys)
            rows = [row for row, key in enumerate(keys) if counts[key] > 1]
            try:
                for row, seen in zip(rows, threads.map(look, [places[row] for row in rows]), strict=True):
                    keys[row] += seen
            except BaseException:  # Ctrl-C too: what has not begun is not begun
                threads.shutdown(cancel_futures=True)
                raise
    return hashed(keys)


def hashed(keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the 64-bit BLAKE2b hash of each key [row]."""
    return from_digests(hashlib.blake2b(key, digest_size=8).digest() for key in keys)


def from_digests(digests: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return digests of 8 bytes as numbers [row]."""
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _size(place: tuple[EncodedPictures, int]) -> bytes:
    encoded, row = place
    return encoded.size(row).to_bytes(8, "little")


def _middle(place: tuple[EncodedPictures, int]) -> bytes:
    encoded, row = place
    start = max(0, encoded.size(row) - SAMPLE) // 2
    return hashlib.blake2b(encoded.read(row, start, SAMPLE), digest_size=16).digest()


def _all_bytes(place: tuple[EncodedPictures, int]) -> bytes:
    encoded, row = place
    seen = hashlib.blake2b(digest_size=16)
    for start in range(0, encoded.size(row), READ_AT_ONCE):
        seen.update(encoded.read(row, start, READ_AT_ONCE))
    return seen.digest()
