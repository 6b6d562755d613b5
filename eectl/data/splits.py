"""A data set as the rest of eectl sees it: its facts, its splits and their fingerprints, and how training rows are carved up.

Carving depends on the labels and `split_seed` alone; a split's fingerprint says which samples it holds, in order.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from eectl.core.errors import EectlError
from eectl.data.copies import Contents, Copies, from_digests, settle_copies
from eectl.recipe.augment_section import AugmentSection
from eectl.recipe.choices import SPLIT_CHOICES
from eectl.recipe.data_section import DataSection, num_outputs

Ids = NDArray[np.uint64]
Rows = NDArray[np.int64]
CARVED = ("test", "validation", "calibration")  # what is drawn from the training rows, in this order
ALIGNMENT = 16  # bytes that tensors sent together start at a multiple of
UNEVEN = 10  # the largest class over the smallest: more is pointed out
FEWEST_ALIKE = 20  # rows of a group that splits are drawn from, where there are several
QUANTILES = 10  # groups of equal size by which a regression's rows are drawn


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting; a GPU is sure to copy on its own only from pinned memory."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def send_all(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy CPU tensors of any types and shapes to the device, all in one copy: they are views of its bytes there."""
    if device.type == "cpu" or not tensors:
        return tensors
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    padded = [F.pad(part, (0, -len(part) % ALIGNMENT)) for part in parts]
    there = torch.split(send(torch.cat(padded), device), [len(part) for part in padded])
    return [
        bytes_[: len(part)].view(tensor.dtype).view(tensor.shape)
        for bytes_, part, tensor in zip(there, parts, tensors, strict=True)
    ]


@dataclass(frozen=True)
class DataInfo:
    """The facts of a data set that a network is built and trained by.

    `kind` is image or text, `task` an entry of losses.TASKS. Images: `input_shape` is channels, height, width; mean and std are
    per channel, for 0..1. Text: `input_shape` is 3 planes and the most tokens, mean and std are empty, and `largest_token` is
    the largest token id there is (None: no text was read). `classes` are also levels, or labels of which a row may have several;
    it is empty for regression, of which `targets` names the columns.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str = "classification"
    kind: str = "image"
    largest_token: int | None = None
    targets: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """The number of outputs that the network has for each row."""
        return num_outputs(self.task, num_classes=len(self.classes), num_targets=len(self.targets))


class Inputs(Protocol):
    """A split's images or texts: in memory or in files."""

    def read(
        self, batches: Sequence[Tensor], *, draw: int | None = None, visits: Sequence[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the inputs on the device, as in Batch, for each int64 tensor of rows in turn; of images also for [batch, row].

        `draw` seeds what reading for training draws for each row; None: nothing is drawn, as in evaluation. `visits`, shaped as
        `batches`, say how often each row has come before in the epoch, so that each visit draws anew; None: never.
        """


@dataclass(frozen=True)
class Batch:
    """Some rows of a split: inputs and targets [n] on the device, and which rows they are (int64 [n], CPU).

    Several batches of images at once have rows [batch, row], and one after the other n = batch · row inputs and targets.

    Images are uint8 [n, C, H, W]. Texts are int64 [n, 3, token]: token ids, attention mask (1 = real) and token type ids, padded
    to the longest of the batch. Targets are int64 classes or levels, float32 numbers, or float32 [n, label] of 0 and 1 or
    [n, target] where a row has several.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Shards:
    """The shard that each row of a split is kept in (int64 [N], CPU), and the rows ahead among which the next one is drawn."""

    numbers: Tensor
    buffer: int


class Split:
    """The rows of one split: `labels` [N, …] on the CPU, int64 or float32, `ids` a 64-bit content hash of each, and the inputs.

    `lengths` (int64 [N], CPU) are the tokens of texts, None for images. `read_as` says how they were made into inputs, where
    that is not the recipe's alone; it goes into the fingerprint. `shards` says where rows are kept that are best read in turn.
    An epoch has `epoch_rows` rows, by default all.
    """

    def __init__(
        self,
        name: str,
        inputs: Inputs,
        labels: Tensor,
        ids: Ids,
        *,
        device: torch.device,
        lengths: Tensor | None = None,
        read_as: bytes = b"",
        shards: Shards | None = None,
        epoch_rows: int | None = None,
    ) -> None:
        assert len(labels) == len(ids)
        self.shards, self.epoch_rows = shards, epoch_rows
        self.name, self.labels, self.ids, self.lengths = name, labels, ids, lengths
        self.fingerprint = hashlib.sha256(ids.tobytes() + read_as).hexdigest()
        self._inputs = inputs
        self._targets = labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def noun(self) -> str:
        """The word for its rows in messages."""
        return "images" if self.lengths is None else "texts"

    def reading(self, inputs: Inputs) -> "Split":
        """Return the same rows, targets and order with other inputs."""
        other = copy(self)
        other._inputs = inputs
        return other

    def rows(self, index: Tensor) -> Tensor:
        """Return the inputs of an int64 tensor of rows, on the device, as in Batch."""
        if self.lengths is not None:
            return next(self._inputs.read([index.cpu()]))
        return torch.cat(list(self._inputs.read(torch.split(index.cpu(), 64))))

    def batches(
        self, rows: Sequence[Tensor], *, draw: int | None = None, visits: Sequence[Tensor] | None = None
    ) -> Iterator[Batch]:
        """Yield a Batch for each int64 CPU tensor of rows, read ahead where images are in files; the rest is as for Inputs."""
        sent = send_all(rows, self._targets.device)
        for index, there, inputs in zip(rows, sent, self._inputs.read(rows, draw=draw, visits=visits), strict=True):
            yield Batch(inputs, self._targets.index_select(0, there.flatten()), index)


@dataclass(frozen=True)
class Dataset:
    """A data set and its splits: train, validation, calibration, and test where there is one.

    `notes` say what the user should know about what was read, `copies` what its splits have in common.
    `augment` is what is left to do to a training batch on the device: the recipe's, less what reading does per image.
    """

    info: DataInfo
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    augment: AugmentSection = field(default_factory=AugmentSection)
    copies: Copies = field(default_factory=Copies)


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


def pixel_ids(pixels: NDArray[np.uint8], labels: Sequence[Any]) -> tuple[Ids, Ids]:
    """Return two 64-bit numbers for each image in memory: BLAKE2b over its bytes, and over its bytes and its label."""
    contents, ids = [], []
    for image, label in zip(pixels, labels, strict=True):
        seen = hashlib.blake2b(image.tobytes(), digest_size=8)
        contents.append(seen.digest())
        seen.update(label.to_bytes(4, "little") if isinstance(label, int) else repr(label).encode())
        ids.append(seen.digest())
    return from_digests(contents), from_digests(ids)


def class_counts(labels: Mapping[str, NDArray[Any]], classes: Sequence[str]) -> dict[str, list[int]]:
    """Return how many rows of each class there are in each split, given the splits' labels [row, …]; nothing for a regression."""
    if not classes:
        return {}
    if any(each.ndim > 1 for each in labels.values()):
        return {name: each.astype(np.int64).sum(axis=0).tolist() for name, each in labels.items()}
    return {name: np.bincount(each, minlength=len(classes)).tolist() for name, each in labels.items()}


def note_on_classes(counts: Sequence[int], classes: Sequence[str], *, noun: str) -> tuple[str, ...]:
    """Return a note where the largest class has over UNEVEN times the training rows of the smallest."""
    if not counts or max(counts) <= UNEVEN * min(counts):
        return ()
    largest, smallest = (counts.index(extreme(counts)) for extreme in (max, min))
    return (
        f"class '{classes[largest]}' has {counts[largest]:,} training {noun}, '{classes[smallest]}' {counts[smallest]:,}; "
        "--set class_weights=balanced makes classes count alike in the loss, --set metric=balanced in early stopping and "
        "calibration",
    )


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
