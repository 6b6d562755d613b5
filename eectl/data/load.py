"""From the recipe's data section to splits that are ready to train on: the one place where reading and splitting meet."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.folder import IMAGENET_MEAN, IMAGENET_STD
from eectl.data.images import FileImages, MemoryImages, Part, StoredImages, prepare, reduced
from eectl.data.pictures import Oddities, look_for_frames
from eectl.data.sources import DATASETS, FACTS, VARIANTS
from eectl.data.splits import DataInfo, Dataset, Inputs, Rows, Split, carve, check_test, content_ids, limited, without_test
from eectl.data.text import load_text, text_info
from eectl.recipe.choices import SPLIT_CHOICES
from eectl.recipe.data_section import DataSection

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
    check_test(spec, source.parts)
    carved = carve(train.labels, spec, source.classes, own=source.parts)
    chosen = {name: (train, rows) for name, rows in carved.items()}
    for name, part in source.parts.items():
        if name != "train":
            chosen[name] = part, limited(np.arange(len(part.labels)), part.labels, name, spec)
    info = _info(source, spec)
    size = math.prod(info.input_shape) * sum(len(rows) for _, rows in chosen.values())
    crop = spec.augment.resized_crop if isinstance(train.images, FileImages) and train.images.resize else None
    in_memory = size <= MEMORY_LIMIT and crop is None if spec.in_memory == "auto" else spec.in_memory
    crop = None if in_memory else crop
    prepared = partial(prepare, shape=_shape(train, spec), interpolation=spec.interpolation)
    odd = Oddities()
    splits: dict[str, Split] = {
        name: _split(name, *chosen[name], fit=prepared, in_memory=in_memory, device=device, crop=crop, odd=odd)
        for name in SPLIT_CHOICES
        if name in chosen
    }
    augment = spec.augment if crop is None else spec.augment.model_copy(update={"resized_crop": None})
    notes = *source.notes, *odd.notes, *without_test(spec, splits)
    return Dataset(info, splits, notes, augment=augment)


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
    if spec.variant is not None and spec.variant not in VARIANTS.get(spec.name, ()):
        known = f"it comes as {', '.join(VARIANTS[spec.name])}" if spec.name in VARIANTS else "it has none"
        raise EectlError(f"data.variant is '{spec.variant}', which {spec.name} does not have; {known}")
    return DATASETS[spec.name](spec, download)


def _info(source: StoredImages, spec: DataSection) -> DataInfo:
    shape = _shape(source.parts["train"], spec)
    mean, std = _constants(source, spec, shape[0])
    return DataInfo(spec.name, source.classes, shape, mean, std)


def _shape(part: Part, spec: DataSection) -> tuple[int, int, int]:
    channels, height, width = part.images.shape if isinstance(part.images, FileImages) else part.images.shape[1:]
    return spec.channels or channels, spec.image_size or height, spec.image_size or width


def _split(
    name: str, part: Part, rows: Rows, *, fit: Callable[[Tensor], Tensor], in_memory: bool, device: torch.device,
    crop: tuple[float, float] | None, odd: Oddities,
) -> Split:  # fmt: skip
    """Return some rows of a part as a split; `fit` brings stored pixels to the network's shape, `odd` takes what is odd."""
    labels = part.labels[rows]
    targets = torch.from_numpy(labels)
    images: Inputs
    if isinstance(part.images, FileImages):
        files = replace(part.images.select(rows, device), crop=crop)
        if not in_memory:
            look_for_frames(files.paths, odd)
            return Split(name, files, targets, files.ids(labels.tolist()), device=device)
        pixels = files.load(odd)
    else:
        pixels = part.images[torch.from_numpy(rows)]
    ids = content_ids(pixels.numpy(), labels.tolist())
    pixels = pixels.to(device)
    images = MemoryImages(fit(pixels)) if in_memory else MemoryImages(pixels, fit)
    return Split(name, images, targets, ids, device=device)


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
