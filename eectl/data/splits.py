"""What a data set is to the rest of eectl: its facts, its splits and their identity, and how training images are carved up.

Carving depends on the labels and `split_seed` alone; a split's fingerprint says which samples it holds, in order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl import recipe
from eectl.errors import EectlError

Ids = NDArray[np.uint64]
Rows = NDArray[np.int64]
OVERLAP_ALLOWED = 0.01  # share of the smaller split; MNIST and its like hold a few duplicates


@dataclass(frozen=True)
class DataInfo:
    """A data set as the network sees it: `input_shape` is channels, height, width; mean and std are per channel, for 0..1."""

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Images(Protocol):
    """Where a split's images are: in memory or in files."""

    def read(self, batches: Sequence[Tensor], *, draw: int | None = None) -> Iterator[Tensor]:
        """uint8 [n, C, H, W] on the device, for each int64 tensor of rows in turn.

        `draw` seeds what reading for training draws for each row; none: read as for evaluation.
        """


@dataclass(frozen=True)
class Batch:
    """uint8 images [n, C, H, W] and int64 targets [n] on the device, and which rows of the split they are (int64 [n], CPU)."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor


class Split:
    """Some labelled images: `labels` int64 [N] on the CPU, `ids` a 64-bit content hash of each."""

    def __init__(self, name: str, images: Images, labels: Tensor, ids: Ids, *, device: torch.device) -> None:
        assert len(labels) == len(ids)
        self.name, self.labels, self.ids = name, labels, ids
        self.fingerprint = hashlib.sha256(ids.tobytes()).hexdigest()
        self._images = images
        self._targets = labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> Tensor:
        """uint8 [n, C, H, W] on the device: the images of an int64 tensor of rows."""
        return torch.cat(list(self._images.read(torch.split(index.cpu(), 64))))

    def batches(self, rows: Sequence[Tensor], *, draw: int | None = None) -> Iterator[Batch]:
        """A Batch for each int64 CPU tensor of rows, read ahead where the images are in files; `draw` as for Images."""
        for index, inputs in zip(rows, self._images.read(rows, draw=draw), strict=True):
            yield Batch(inputs, self._targets.index_select(0, index.to(self._targets.device, non_blocking=True)), index)


@dataclass(frozen=True)
class Dataset:
    """A data set and its splits: train, validation, calibration, and test unless a folder has none.

    `augment` is what is left to do to a training batch on the device: the recipe's, less what reading does per image.
    """

    info: DataInfo
    splits: dict[str, Split]
    augment: recipe.Augment = field(default_factory=recipe.Augment)


def check_disjoint(a: Split, b: Split) -> int:
    """How many samples of the smaller split are also in the other, by content.

    Raises EectlError above 1 %: the splits come from different split seeds, or a folder holds copies.
    """
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    shared = int(np.isin(small.ids, large.ids).sum())
    if shared > OVERLAP_ALLOWED * len(small):
        raise EectlError(
            f"data: {shared} of the {len(small)} images in {small.name} are also in {large.name}; use the data.split_seed, "
            "data.validation and data.calibration that the checkpoint was trained with, and take copies out of data.root"
        )
    return shared


def content_ids(pixels: NDArray[np.uint8], labels: Sequence[int]) -> Ids:
    """The 64-bit ids of images in memory: BLAKE2b over an image's bytes and its label."""
    hashes = (
        hashlib.blake2b(image.tobytes() + int(label).to_bytes(4, "little"), digest_size=8).digest()
        for image, label in zip(pixels, labels, strict=True)
    )
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


def carve(labels: NDArray[np.int64], spec: recipe.Data, classes: Sequence[str], *, validation: bool) -> dict[str, Rows]:
    """Rows of the training images by split name, sorted, stratified by class, a function of labels and split_seed.

    Carves `validation` where asked for (the data set has none), then calibration, then cuts the rest to `limit`.
    Raises EectlError where a split would lack a class.
    """
    shares = ({"validation": spec.validation} if validation else {}) | {"calibration": spec.calibration}
    rest = np.arange(len(labels))
    carved: dict[str, Rows] = {}
    for name, share in shares.items():
        rest, carved[name] = stratified(rest, labels, round(share * len(labels)), spec.split_seed, place=f"data.{name}")
    if spec.limit is not None and spec.limit < len(rest):
        _, rest = stratified(rest, labels, spec.limit, spec.split_seed, place="data.limit")
    carved["train"] = rest
    for name, rows in carved.items():
        check_classes(labels[rows], classes, place=f"data.{'limit' if name == 'train' and spec.limit else name}")
    return carved


def stratified(rows: Rows, labels: NDArray[np.int64], count: int, seed: int, *, place: str) -> tuple[Rows, Rows]:
    """`rows` without `count` that are drawn by class, and those; both sorted. Raises EectlError where a class is too small."""
    from sklearn.model_selection import train_test_split

    sizes = np.unique_counts(labels[rows]).counts
    if count < len(sizes) or len(rows) < 2 * len(sizes) or sizes.min() < 2:
        raise EectlError(
            f"{place}: {count} of {len(rows)} images is too small a split for {len(sizes)} classes (the smallest class has "
            f"{sizes.min()}); every split needs every class, so raise it or add images"
        )
    count = min(count, len(rows) - len(sizes))  # scikit-learn wants every class on both sides
    rest, drawn = train_test_split(rows, test_size=count, stratify=labels[rows], random_state=seed)
    return np.sort(rest), np.sort(drawn)


def check_classes(labels: NDArray[np.int64], classes: Sequence[str], *, place: str) -> None:
    """Raise EectlError that names a class which `labels` lacks."""
    missing: Any = np.setdiff1d(np.arange(len(classes)), labels)
    if len(missing):
        raise EectlError(
            f"{place}: no image of class '{classes[missing[0]]}' ({len(missing)} of {len(classes)} classes missing) among "
            f"{len(labels)}; every split needs every class, so raise it or add images of that class"
        )
