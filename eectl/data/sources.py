"""The data sets of images that eectl knows, each a function from the recipe's data section to images as they are stored.

Nothing is resized or moved to a device here. A set that is missing is downloaded only where that was asked for.
"""

import gzip
import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.archives import load_imagenet, load_imagenette, load_tinyimagenet
from eectl.data.folder import load_folder
from eectl.data.images import Part, StoredImages
from eectl.data.splits import stratified
from eectl.recipe.choices import IMAGE_CHOICES, in_order
from eectl.recipe.data_section import DataSection

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS_TEST_SHARE = 0.2
IDX_KINDS = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}


def load_digits(spec: DataSection, _: bool) -> StoredImages:
    """Return scikit-learn's bundled 1,797 digits, 8×8 grey; a fifth, drawn by class and split_seed, is the test split."""
    from sklearn import datasets

    bundle = datasets.load_digits()
    labels = bundle.target.astype(np.int64)
    images = torch.from_numpy(np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None])
    train, test = stratified(
        np.arange(len(labels)), labels, round(DIGITS_TEST_SHARE * len(labels)), spec.split_seed, place="digits"
    )
    parts = {"train": Part(images[train], labels[train]), "test": Part(images[test], labels[test])}
    return StoredImages(DIGITS, (0.3053,), (0.3760,), parts)


def _load_idx(
    name: str, dataset: str, classes: tuple[str, ...], mean: float, std: float, spec: DataSection, download: bool
) -> StoredImages:
    """Return MNIST or Fashion-MNIST from its idx files, gzipped or not, in `data.root` or where torchvision puts them."""
    root = spec.root.expanduser()
    folders = (root, root / dataset / "raw")
    if download and not any(_idx_file(folder, "train", "images") for folder in folders):
        _download(name, dataset, root)
    for folder in folders:
        if _idx_file(folder, "train", "images"):
            parts = {part: _idx_part(folder, prefix, len(classes)) for part, prefix in (("train", "train"), ("test", "t10k"))}
            return StoredImages(classes, (mean,), (std,), parts)
    raise EectlError(
        f"data.root is '{root}': {name} is not there; looked for train-images-idx3-ubyte (or .gz) in {folders[0]} and "
        f"{folders[1]}; set data.root to the folder of the four idx files, or give --download"
    )


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    plain = folder / f"{prefix}-{kind}-{IDX_KINDS[kind]}"
    return next((path for path in (plain, plain.with_name(plain.name + ".gz")) if path.is_file()), None)


def _idx_part(folder: Path, prefix: str, num_classes: int) -> Part:
    arrays = {}
    for kind in IDX_KINDS:
        path = _idx_file(folder, prefix, kind)
        if path is None:
            raise EectlError(f"{folder}: {prefix}-{kind}-{IDX_KINDS[kind]} (or .gz) is missing; the other idx files are there")
        arrays[kind] = _read_idx(path, dimensions=3 if kind == "images" else 1)
    images, labels = arrays["images"], arrays["labels"].astype(np.int64)
    if len(images) != len(labels) or labels.max(initial=0) >= num_classes:
        raise EectlError(f"{folder}: {prefix} has {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}; "
                         f"they must match and stay below {num_classes}; fetch the files again")  # fmt: skip
    return Part(torch.from_numpy(images[:, None]), labels)


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Return the uint8 array of an idx file: 0, 0, 8, number of dimensions, big-endian sizes, bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise EectlError(f"{path}: cannot be read, or cut short ({error}); fetch it again") from error
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], dtype=">u4")) if len(data) >= start else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != math.prod(shape):
        raise EectlError(f"{path}: not an idx file of {dimensions} dimension(s), or cut short; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


def _load_cifar(
    name: str, dataset: str, mean: tuple[float, ...], std: tuple[float, ...], spec: DataSection, download: bool
) -> StoredImages:
    """Return CIFAR through torchvision, which checks the published checksums; `data.root` is its folder, or holds it."""
    from torchvision import datasets

    loader = getattr(datasets, dataset)
    root = spec.root.expanduser()
    if root.name == loader.base_folder:
        root = root.parent
    if download:
        _download(name, dataset, root)
    try:
        stored = {part: loader(root, train=part == "train") for part in ("train", "test")}
    except (RuntimeError, OSError) as error:
        folder = root / loader.base_folder
        fault = "its files are incomplete or not the published ones" if folder.is_dir() else "it is not there"
        raise EectlError(
            f"data.root is '{spec.root}': {name} is looked for in {folder} and {fault}; expected: the unpacked "
            f"{loader.filename} ({', '.join(file for file, _ in loader.train_list + loader.test_list)}); or give --download"
        ) from error
    parts = {part: Part(_channels_first(data.data), np.array(data.targets, dtype=np.int64)) for part, data in stored.items()}
    return StoredImages(tuple(stored["train"].classes), mean, std, parts)


def _channels_first(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _download(name: str, dataset: str, root: Path) -> None:
    """Let torchvision download a data set into its own layout below `root`."""
    from torchvision import datasets

    try:
        getattr(datasets, dataset)(root, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise EectlError(f"{name} cannot be downloaded into {root} ({reason}); put it there by hand, or try again") from error


DATASETS: dict[str, Callable[[DataSection, bool], StoredImages]] = in_order(
    IMAGE_CHOICES,
    {
        "digits": load_digits,
        "mnist": partial(_load_idx, "mnist", "MNIST", DIGITS, 0.1307, 0.3081),
        "fashion-mnist": partial(_load_idx, "fashion-mnist", "FashionMNIST", FASHION, 0.2860, 0.3530),
        "cifar10": partial(_load_cifar, "cifar10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)),
        "cifar100": partial(_load_cifar, "cifar100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.267, 0.256, 0.276)),
        "tinyimagenet": load_tinyimagenet,
        "imagenette": load_imagenette,
        "imagenet": load_imagenet,
        "folder": load_folder,
    },
)
# Classes and stored shape (channels, height, width) of those whose facts are known before any file is read.
FACTS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "digits": (10, (1, 8, 8)),
    "mnist": (10, (1, 28, 28)),
    "fashion-mnist": (10, (1, 28, 28)),
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "tinyimagenet": (200, (3, 64, 64)),
    "imagenette": (10, (3, 224, 224)),
    "imagenet": (1000, (3, 224, 224)),
}
VARIANTS = {"imagenette": ("full", "320px", "160px")}  # what data.variant may be
