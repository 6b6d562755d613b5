"""A data set as the rest of eectl sees it: its facts, its splits and their fingerprints.

A split's fingerprint says which samples it holds, in order. Which rows it has is `carving`'s business.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from eectl.data.copies import Copies, from_digests
from eectl.recipe.augment_section import AugmentSection
from eectl.recipe.data_section import num_outputs

Ids = NDArray[np.uint64]
ALIGNMENT = 16  # bytes that tensors sent together start at a multiple of
UNEVEN = 10  # the largest class over the smallest: more is pointed out


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
