"""Finding the images of a folder data set, `root/train/<class>/…`, and refusing what would train on something else than meant.

Reads names, and one image for its size; decoding is `images`' business.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.data.encoded import EncodedPictures, Files
from eectl.data.images import FileImages, Part, StoredImages
from eectl.data.pictures import EXTENSIONS, SHOWN, open_image, shown_path, warnings_heard
from eectl.recipe.data_section import DataSection

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
UNASKED = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders; what macOS leaves is hidden
LISTED = ", ".join(EXTENSIONS[:12]) + ", …"
LAYOUT = "expected: train/<class>/*.png (or jpg, …), and optionally val/ and test/ with the same classes; or <class>/*.png alone"


def load_folder(spec: DataSection, download: bool) -> StoredImages:
    """Return the images under `data.root`, by class folder: `train/<class>/`, with `val/` and `test/` where they are there.

    A root without any of these three holds the class folders of the training images itself. Classes are sorted by name, files by
    path.

    Files that are no images are left out, and a note says how many.

    Raises:
        EectlError: for a missing root, another layout, a class without images, a single class, or splits with other classes.
    """
    root = spec.folder
    with reading(root):
        is_folder = root.is_dir()
    if not is_folder:
        advice = "; --download does not apply to a folder of yours" if download else ""
        raise EectlError(f"data.root is '{root}': no such folder; {LAYOUT}{advice}")
    found = {name: only_folder(root, names) for name, names in FOLDERS.items()}
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
    others: list[Path] = []
    parts = {}
    for name, folder in found.items():
        if folder is None:
            continue
        check_same_classes(folder, classes, train, layout=LAYOUT)
        files = class_files(folder, classes, others)
        shape = shape or first_shape(Files((files[0][0],), root), spec)
        parts[name] = file_part(files, root, shape, spec, resize=spec.image_size is not None)
    return StoredImages(classes, IMAGENET_MEAN, IMAGENET_STD, parts, _left_out(others, root))


def class_files(folder: Path, classes: tuple[str, ...], others: list[Path] | None = None) -> list[tuple[Path, int]]:
    """Return the image files of each class's folder, sorted by path, with the class's number; what is no image goes to `others`.

    Raises EectlError for a class without images.
    """
    found: list[tuple[Path, int]] = []
    for label, class_ in enumerate(classes):
        images, rest = list_images(folder / class_)
        if not images:
            there = f" among its {len(rest)} files" if rest else ""
            place = shown_path(folder / class_)
            raise EectlError(f"{place}: no images in this class folder{there}; add some ({LISTED}) or remove it")
        for path in images:
            with reading(path):
                is_file = path.is_file()
            if not is_file:
                raise EectlError(f"{shown_path(path)}: a link to a file that is not there, or no file; mend it or take it out")
            found.append((path, label))
        if others is not None:
            others += rest
    return found


def _left_out(others: Sequence[Path], root: Path) -> tuple[str, ...]:
    """Return the note on files in class folders that are no images."""
    if not others:
        return ()
    kinds = Counter(path.suffix.lower() or "no extension" for path in others)
    by_kind = ", ".join(f"{count:,} {shown_path(kind)}" for kind, count in kinds.most_common(SHOWN))
    first = ", ".join(shown_path(path.relative_to(root)) for path in sorted(others)[:SHOWN])
    more = "" if len(kinds) <= SHOWN else ", …"
    return (
        f"{shown_path(root)}: {len(others):,} file{'s' * (len(others) > 1)} of types that eectl does not read "
        f"{'are' if len(others) > 1 else 'is'} left out ({by_kind}{more}): {first}{', …' if len(others) > SHOWN else ''}",
    )


def file_part(
    files: Sequence[tuple[Path, int]], root: Path, shape: tuple[int, int, int], spec: DataSection, *, resize: bool
) -> Part:
    """Return labelled image files as a part; with `resize` they may have any size, else all have that of `shape`."""
    encoded = Files(tuple(path for path, _ in files), root)
    return encoded_part(encoded, np.array([label for _, label in files], dtype=np.int64), shape, spec, resize=resize)


def encoded_part(
    encoded: EncodedPictures, labels: NDArray[Any], shape: tuple[int, int, int], spec: DataSection, *, resize: bool
) -> Part:
    """Return encoded pictures and their labels [row] as a part; with `resize` they may have any size."""
    short = (spec.resize or shape[1]) if resize else None
    return Part(FileImages(encoded, shape, short, spec.workers, torch.device("cpu"), spec.interpolation, spec.background), labels)


def only_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    """Return the one folder below `root` with one of these names, None where there is none; raises EectlError for two."""
    with reading(root):
        present = [root / name for name in names if (root / name).is_dir()]
    if len(present) > 1:
        raise EectlError(f"data.root is '{root}': both {' and '.join(names)} are there and mean the same; keep one")
    return present[0] if present else None


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders below `folder`, sorted; raises EectlError for one that cannot be shown or stored."""
    with reading(folder):
        names = sorted(item.name for item in folder.iterdir() if not item.name.startswith(".") and item.is_dir())
    for name in names:
        if name != shown_path(name):
            raise EectlError(f"{shown_path(folder / name)}: a class's name is made of printable characters; rename the folder")
    return tuple(names)


def check_same_classes(folder: Path, classes: tuple[str, ...], train: Path, *, layout: str) -> None:
    """Raise EectlError where the class folders below `folder` are not those named, which `train` says or has."""
    here = class_names(folder)
    for name in here:
        if name not in classes:
            raise EectlError(f"{folder / name}: class '{name}' is not among the {len(classes)} in {train}; {layout}")
    for name in classes:
        if name not in here:
            raise EectlError(f"{folder}: class '{name}' of {train} is missing; {layout}")


def list_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the image files at any depth below a folder, told by their names, and the other files, both sorted.

    What is hidden is in neither, and links to folders are followed. Raises EectlError for what cannot be read, and for a link to
    a folder that it lies in.
    """
    images: list[Path] = []
    others: list[Path] = []
    inside: dict[Path, tuple[Path, ...]] = {folder: (_real(folder),)}  # a folder → where it and those above it really are

    def refuse(error: OSError) -> None:
        raise EectlError(f"{shown_path(error.filename or folder)}: cannot be read ({error.strerror}); mend it or take it out")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        above = inside.pop(Path(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(parent, name)
            real = _real(path)
            if any(place.is_relative_to(real) for place in above):
                raise EectlError(f"{shown_path(path)}: a link to a folder that it lies in; take it out")
            inside[path] = (*above, real)
        for name in names:
            if not name.startswith(".") and name.lower() not in UNASKED:
                (images if name.lower().endswith(EXTENSIONS) else others).append(Path(parent, name))
    return sorted(images), sorted(others)


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def first_shape(encoded: EncodedPictures, spec: DataSection) -> tuple[int, int, int]:
    """Return the channels, height and width that all images have or get: image_size, or the size of the first, as it is shown."""
    channels = spec.channels or 3
    if spec.image_size is not None:
        return channels, spec.image_size, spec.image_size
    with warnings_heard():
        image = open_image(encoded.path(0), "RGB", background=spec.background, content=encoded.whole(0))
    return channels, image.height, image.width
