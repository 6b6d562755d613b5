"""From the recipe's data section to splits that are ready to train on: the one place where reading and splitting meet."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.carving import Rows, choose_rows, row_groups, without_copies, without_test
from eectl.data.copies import Contents, Copies, encoded_ids
from eectl.data.encoded import EncodedPictures, Members
from eectl.data.folder import IMAGENET_MEAN, IMAGENET_STD
from eectl.data.images import FileImages, MemoryImages, Part, StoredImages, prepare, reduced
from eectl.data.pictures import Oddities, look_for_frames, shown_path
from eectl.data.sources import FACTS, VARIANTS, stored_images
from eectl.data.splits import DataInfo, Dataset, Ids, Shards, Split, pixel_ids
from eectl.data.text import load_text, outline_text, text_info
from eectl.recipe.data_section import DataSection, ShardsSection

MEMORY_LIMIT = 4 * 10**9  # bytes of uint8 images that in_memory: auto keeps on the device


def load_data(spec: DataSection, *, device: torch.device, download: bool = False) -> Dataset:
    """Return the data set of a recipe's data section, split, with its inputs on `device` or read from files as they are needed.

    `in_memory: auto` keeps up to 4 GB of pixels on the device. Beyond it (or with false) image files are read by worker
    processes, and images that do not come as files keep their stored size on the device and are resized a batch at a time. A
    random crop of image files is cut from the file as stored, so `auto` reads these from disk too; with `in_memory: true` it is
    cut from the resized square.

    Raises:
        EectlError: for anything missing, broken or too small.
    """
    if spec.is_text:
        return load_text(spec, device=device, download=download)
    source = _read(spec, download)
    train = source.parts["train"]
    if spec.resize is not None and not isinstance(train.images, FileImages):
        raise EectlError(f"data.resize is for image files; {spec.name} has images of one size, so leave it out")
    chosen = _choose(source, spec)
    info = _info(source, spec)
    size = math.prod(info.input_shape) * sum(len(rows) for _, rows in chosen.values())
    crop = spec.augment.resized_crop if isinstance(train.images, FileImages) and train.images.resize else None
    in_memory = size <= MEMORY_LIMIT and crop is None if spec.in_memory == "auto" else spec.in_memory
    crop = None if in_memory else crop
    prepared = partial(prepare, shape=_shape(train, spec), interpolation=spec.interpolation)
    odd = Oddities()
    found = {name: _rows(source.parts[part], rows, in_memory=in_memory, odd=odd) for name, (part, rows) in chosen.items()}
    kept, copies = without_copies(
        _contents(source, chosen, {name: rows.contents for name, rows in found.items()}), spec, _row_classes(source, spec)
    )
    splits: dict[str, Split] = {
        name: _split(name, found.pop(name).at(kept[name]), spec, fit=prepared, in_memory=in_memory, device=device, crop=crop)
        for name in chosen
    }
    augment = spec.augment if crop is None else spec.augment.model_copy(update={"resized_crop": None})
    notes = *source.notes, *odd.notes, *without_test(spec, splits)
    return Dataset(info, splits, notes, augment=augment, copies=copies)


@dataclass(frozen=True)
class Outline:
    """Facts of data of one's own before it is decoded or tokenised: the labels [row] of each split, and its copies.

    `notes` say what is odd about its files.
    """

    labels: dict[str, NDArray[Any]]
    copies: Copies
    notes: tuple[str, ...] = ()


def outline(spec: DataSection) -> Outline:
    """Return an outline of a folder of images, which are compared by their bytes, or of files of texts.

    Raises:
        EectlError: for anything missing or too small.
    """
    if spec.is_text:
        return Outline(*outline_text(spec))
    source = _read(spec, download=False)
    chosen = _choose(source, spec)
    contents = _contents(source, chosen, {})
    kept, copies = without_copies(contents, spec, _row_classes(source, spec))
    return Outline({name: contents[name].labels[rows] for name, rows in kept.items()}, copies, tuple(source.notes))


def data_info(spec: DataSection) -> DataInfo:
    """Return a data set's facts. Those of published images come from a table, without reading any file: classes are then numbers.

    Of a folder the names of the files are read, and one image for its size.
    """
    if spec.is_text:
        return text_info(spec)
    if spec.name not in FACTS:
        return _info(_read(spec, download=False), spec)
    num_classes, (channels, height, width) = FACTS[spec.name]
    channels = spec.channels or channels
    shape = channels, spec.image_size or height, spec.image_size or width
    return DataInfo(spec.name, tuple(map(str, range(num_classes))), shape, (0.0,) * channels, (1.0,) * channels)


def _read(spec: DataSection, download: bool) -> StoredImages:
    """Return the images of a data set as they are stored."""
    if spec.variant is not None and not spec.is_of_library and spec.variant not in VARIANTS.get(spec.name, ()):
        known = f"it comes as {', '.join(VARIANTS[spec.name])}" if spec.name in VARIANTS else "it has none"
        raise EectlError(f"data.variant is '{spec.variant}', which {spec.name} does not have; {known}")
    return stored_images(spec, download)


def _info(source: StoredImages, spec: DataSection) -> DataInfo:
    shape = _shape(source.parts["train"], spec)
    mean, std = _constants(source, spec, shape[0])
    targets = spec.targets if spec.task == "regression" else ()
    return DataInfo(spec.name, source.classes, shape, mean, std, spec.task, targets=targets)


def _shape(part: Part, spec: DataSection) -> tuple[int, int, int]:
    channels, height, width = part.images.shape if isinstance(part.images, FileImages) else part.images.shape[1:]
    return spec.channels or channels, spec.image_size or height, spec.image_size or width


def _choose(source: StoredImages, spec: DataSection) -> dict[str, tuple[str, Rows]]:
    """Return of each split the part that it comes from and its rows in there."""
    groups = {name: row_groups(name, part.labels, spec) for name, part in source.parts.items()}
    return choose_rows(groups, spec, _row_classes(source, spec))


def _row_classes(source: StoredImages, spec: DataSection) -> tuple[str, ...]:
    """Return the classes of which every row has one: none where it may have several labels."""
    return () if spec.task == "multilabel" else source.classes


@dataclass(frozen=True)
class _Rows:
    """The rows of a split before they are one: images as they will be kept, on the CPU or in files, and their labels [row].

    Of images in memory there are two numbers [row]: `ids`, and `contents` that leave the label out.
    """

    images: Tensor | FileImages
    labels: NDArray[Any]
    ids: Ids | None = None
    contents: Ids | None = None

    def at(self, rows: Rows) -> "_Rows":
        """Return these rows alone."""
        if len(rows) == len(self.labels):
            return self
        if isinstance(self.images, FileImages):
            return _Rows(self.images.select(rows, self.images.device), self.labels[rows])
        assert self.ids is not None
        return _Rows(self.images[torch.from_numpy(rows)], self.labels[rows], self.ids[rows])


def _rows(part: Part, rows: Rows, *, in_memory: bool, odd: Oddities) -> _Rows:
    """Return some rows of a part; image files are decoded if they are kept in memory. `odd` takes what is odd about some."""
    labels = part.labels[rows]
    if isinstance(part.images, FileImages):
        files = part.images.select(rows, part.images.device)
        if not in_memory:
            look_for_frames(files.encoded, odd)
            return _Rows(files, labels)
        pixels = files.load(odd)
    else:
        pixels = part.images[torch.from_numpy(rows)]
    contents, ids = pixel_ids(pixels.numpy(), labels.tolist())
    return _Rows(pixels, labels, ids, contents)


def _contents(
    source: StoredImages, chosen: Mapping[str, tuple[str, Rows]], known: Mapping[str, Ids | None]
) -> dict[str, Contents]:
    """Return what stands in the rows of each split: numbers that are `known`, else those of the files' bytes."""
    files = {
        name: [(images.encoded, row) for row in rows.tolist()]
        for name, (part, rows) in chosen.items()
        if known.get(name) is None and isinstance(images := source.parts[part].images, FileImages)
    }
    of_files = iter(np.split(encoded_ids(list(chain(*files.values()))), np.cumsum([len(each) for each in files.values()])))
    found = {}
    for name, (part, rows) in chosen.items():
        ids = next(of_files) if name in files else known[name]
        assert ids is not None
        found[name] = Contents(ids, source.parts[part].labels[rows], partial(_name, source.parts[part].images, part, rows))
    return found


def _name(images: Tensor | FileImages, part: str, rows: Rows, row: int) -> str:
    """Return the name of a split's row in messages."""
    stored = int(rows[row])
    if isinstance(images, FileImages):
        return shown_path(images.encoded.name(stored))
    return f"{part} row {stored + 1}"


def _split(
    name: str, rows: _Rows, spec: DataSection, *, fit: Callable[[Tensor], Tensor], in_memory: bool, device: torch.device,
    crop: tuple[float, float] | None,
) -> Split:  # fmt: skip
    """Return rows as a split; `fit` brings stored pixels to the network's shape."""
    targets = torch.from_numpy(rows.labels)
    targets = targets.float() if targets.is_floating_point() else targets
    epoch_rows = spec.epoch_rows if name == "train" else None
    if isinstance(rows.images, FileImages):
        files = replace(rows.images, crop=crop, device=device)
        ids = files.ids(rows.labels.tolist())
        return Split(name, files, targets, ids, device=device, shards=_shards(files.encoded, spec), epoch_rows=epoch_rows)
    assert rows.ids is not None
    pixels = rows.images.to(device)
    images = MemoryImages(fit(pixels)) if in_memory else MemoryImages(pixels, fit)
    return Split(name, images, targets, rows.ids, device=device, epoch_rows=epoch_rows)


def _shards(encoded: EncodedPictures, spec: DataSection) -> Shards | None:
    """Return the shards that rows are kept in, None where they are not."""
    if not isinstance(encoded, Members):
        return None
    return Shards(torch.from_numpy(encoded.places[:, 0].copy()), (spec.shards or ShardsSection()).buffer)


def _constants(source: StoredImages, spec: DataSection, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel, as `data.normalize` says."""
    if spec.normalize == "auto":
        mean, std = source.mean, source.std
    elif spec.normalize == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = spec.normalize
        if {len(mean), len(std)} != {channels}:
            raise EectlError(
                f"data.normalize has {len(mean)} means and {len(std)} deviations; the images have {channels} channel(s), "
                "give one of each per channel"
            )
    return reduced(mean, channels), reduced(std, channels)
