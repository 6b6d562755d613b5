"""Finding the images of a folder data set, `root/train/<class>/…`, and refusing what would train on something else than meant.

Reads names, and one image for its size; decoding is `images`' business.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eectl.core.errors import EectlError
from eectl.data.images import FileImages, Part, StoredImages
from eectl.recipe.data_section import DataSection

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
LAYOUT = "expected: train/<class>/*.png (or jpg, …), and optionally val/ and test/ with the same classes; or <class>/*.png alone"


def load_folder(spec: DataSection, download: bool) -> StoredImages:
    """Return the images under `data.root`, by class folder: `train/<class>/`, with `val/` and `test/` where they are there.

    A root without any of these three holds the class folders of the training images itself. Classes are sorted by name, files by
    path.

    Raises:
        EectlError: for a missing root, another layout, a class without images, a single class, or splits with other classes.
    """
    root = spec.root.expanduser()
    if not root.is_dir():
        advice = "; --download does not apply to a folder of yours" if download else ""
        raise EectlError(f"data.root is '{root}': no such folder; {LAYOUT}{advice}")
    found = {name: _only(root, names) for name, names in FOLDERS.items()}
    if not any(found.values()) and class_names(root):
        found["train"] = root
    train = found["train"]
    if train is None:
        raise EectlError(f"data.root is '{root}': no train/ in it; {LAYOUT}")
    classes = class_names(train)
    if len(classes) < 2:
        only = f"the one class '{classes[0]}'" if classes else "no class folders"
        raise EectlError(f"{train}: {only}; two or more are needed; {LAYOUT}")
    shape: tuple[int, int, int] | None = None
    parts = {}
    for name, folder in found.items():
        if folder is None:
            continue
        check_same_classes(folder, classes, train, layout=LAYOUT)
        files = class_files(folder, classes)
        shape = shape or _shape(files[0][0], spec)
        parts[name] = file_part(files, root, shape, spec, resize=spec.image_size is not None)
    return StoredImages(classes, IMAGENET_MEAN, IMAGENET_STD, parts)


def class_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return the image files of each class's folder, sorted by path, with the class's number."""
    return [(path, label) for label, class_ in enumerate(classes) for path in _images(folder / class_)]


def file_part(
    files: Sequence[tuple[Path, int]], root: Path, shape: tuple[int, int, int], spec: DataSection, *, resize: bool
) -> Part:
    """Return labelled image files as a part; with `resize` they may have any size, else all have that of `shape`."""
    short = (spec.resize or shape[1]) if resize else None
    paths = tuple(path for path, _ in files)
    images = FileImages(paths, root, shape, short, spec.workers, torch.device("cpu"), spec.interpolation)
    return Part(images, np.array([label for _, label in files], dtype=np.int64))


def _only(root: Path, names: tuple[str, ...]) -> Path | None:
    present = [root / name for name in names if (root / name).is_dir()]
    if len(present) > 1:
        raise EectlError(f"data.root is '{root}': both {' and '.join(names)} are there and mean the same; keep one")
    return present[0] if present else None


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders below `folder`, sorted."""
    return tuple(sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")))


def check_same_classes(folder: Path, classes: tuple[str, ...], train: Path, *, layout: str) -> None:
    """Raise EectlError where the class folders below `folder` are not those named, which `train` says or has."""
    here = class_names(folder)
    for name in here:
        if name not in classes:
            raise EectlError(f"{folder / name}: class '{name}' is not among the {len(classes)} in {train}; {layout}")
    for name in classes:
        if name not in here:
            raise EectlError(f"{folder}: class '{name}' of {train} is missing; {layout}")


def _images(folder: Path) -> list[Path]:
    """Return the image files at any depth below a class folder, sorted."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [Path(parent, name) for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not found:
        raise EectlError(f"{folder}: no images in this class folder; add some ({', '.join(EXTENSIONS)}) or remove it")
    for path in found:
        if not path.exists():
            raise EectlError(f"{path}: a link to a file that is not there; mend it or take it out")
    return sorted(found)


def _shape(first: Path, spec: DataSection) -> tuple[int, int, int]:
    """Return the channels, height and width that all images have or get: image_size, or the size of the first."""
    from PIL import Image

    channels = spec.channels or 3
    if spec.image_size is not None:
        return channels, spec.image_size, spec.image_size
    try:
        with Image.open(first) as image:
            return channels, image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EectlError(f"{first}: not an image ({' '.join(str(error).split())}); mend it or take it out") from error
