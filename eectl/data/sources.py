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

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.data.archives import download_archive, download_file, load_imagenet, load_imagenette, load_tinyimagenet
from eectl.data.carving import stratified
from eectl.data.folder import load_folder
from eectl.data.image_tables import load_hub_images, load_parquet, parquet_files
from eectl.data.images import Part, StoredImages
from eectl.data.listing import is_listed, load_listed
from eectl.data.plain_pickle import read_plain
from eectl.data.shards import load_shards
from eectl.recipe.choices import IMAGE_CHOICES, in_order
from eectl.recipe.data_section import DataSection

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS_TEST_SHARE = 0.2
MOST_BYTES = 2**28  # of an idx file, unpacked; the largest published one has 47 million
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
    root = spec.folder
    folders = (root, root / dataset / "raw")
    if download and not any(_idx_file(folder, "train", "images") for folder in folders):
        _download_idx(name, dataset, folders[-1])
    for folder in folders:
        if _idx_file(folder, "train", "images"):
            parts = {part: _idx_part(folder, prefix, len(classes)) for part, prefix in (("train", "train"), ("test", "t10k"))}
            return StoredImages(classes, (mean,), (std,), parts)
    raise EectlError(
        f"data.root is '{root}': {name} is not there; looked for train-images-idx3-ubyte (or .gz) in {folders[0]} and "
        f"{folders[1]}; set data.root to the folder of the four idx files, or give --download"
    )


def _download_idx(name: str, dataset: str, folder: Path) -> None:
    """Download the published idx files of MNIST or Fashion-MNIST into `folder`, from the first mirror that has them."""
    from torchvision import datasets

    kind = getattr(datasets, dataset)
    for file, checksum in kind.resources:
        for mirror in kind.mirrors:
            try:
                download_file(name, f"{mirror}{file}", folder, file=file, checksum=checksum)
                break
            except EectlError:
                if mirror == kind.mirrors[-1]:
                    raise


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
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise EectlError(f"{path}: cannot be read, or cut short ({error}); fetch it again") from error
    if len(data) > MOST_BYTES:
        raise EectlError(f"{path}: holds more than {MOST_BYTES >> 20} MiB, far more than the published file; fetch it again")
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], dtype=">u4")) if len(data) >= start else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != math.prod(shape):
        raise EectlError(f"{path}: not an idx file of {dimensions} dimension(s), or cut short; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


def _load_cifar(
    name: str, dataset: str, mean: tuple[float, ...], std: tuple[float, ...], spec: DataSection, download: bool
) -> StoredImages:
    """Return CIFAR from its published batches, compared with their checksums first; `data.root` is their folder, or holds it."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = getattr(datasets, dataset)
    root = spec.folder
    if root.name == kind.base_folder:
        root = root.parent
    folder = root / kind.base_folder
    files = {"train": kind.train_list, "test": kind.test_list, "meta": [(kind.meta["filename"], kind.meta["md5"])]}

    def are_whole() -> bool:
        with reading(folder):
            return all(check_integrity(folder / file, checksum) for listed in files.values() for file, checksum in listed)

    if download and not are_whole():
        download_archive(name, kind.url, root, file=kind.filename, checksum=kind.tgz_md5)
    if not are_whole():
        fault = "its files are incomplete or not the published ones" if folder.is_dir() else "it is not there"
        raise EectlError(
            f"data.root is '{spec.root}': {name} is looked for in {folder} and {fault}; expected: the unpacked "
            f"{kind.filename} ({', '.join(file for file, _ in kind.train_list + kind.test_list)}); or give --download"
        )
    classes = read_plain(folder / kind.meta["filename"]).get(kind.meta["key"])
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise EectlError(f"{folder / kind.meta['filename']}: no names of classes in it; fetch it again")
    parts = {}
    for part in ("train", "test"):
        batches = [_cifar_batch(folder / file, len(classes)) for file, _ in files[part]]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        parts[part] = Part(torch.from_numpy(images), labels)
    return StoredImages(tuple(classes), mean, std, parts)


def _cifar_batch(path: Path, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images [n, 3, 32, 32] and labels of one batch of CIFAR."""
    stored = read_plain(path)
    data, labels = stored.get("data"), stored.get("labels", stored.get("fine_labels"))
    fits = (
        isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)
        and isinstance(labels, list) and len(labels) == len(data)
        and all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
    )  # fmt: skip
    if not fits:
        raise EectlError(f"{path}: not a batch of CIFAR, which has 3,072 bytes and a label below {num_classes} for each image; "
                         "fetch it again")  # fmt: skip
    return np.asarray(data).reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def load_own(spec: DataSection, download: bool) -> StoredImages:
    """Return images of one's own: listed by a file, in Parquet where `data.root` is such or holds it, else in class folders."""
    with reading(spec.folder):
        files = parquet_files(spec.folder)
    if is_listed(spec) or (not files and spec.task != "classification"):
        return load_listed(spec)
    if not files:
        if spec.image is not None or spec.target != type(spec).model_fields["target"].default:
            key = "target" if spec.image is None else "image"
            raise EectlError(f"data.{key} is a column of Parquet, and there is no train.parquet in '{spec.root}'; leave it out")
        return load_folder(spec, download)
    if "train" not in files:
        raise EectlError(f"data.root is '{spec.root}': {next(iter(files.values()))[0].name}, and no train.parquet; add it")
    if (spec.folder / "train").is_dir():
        raise EectlError(f"data.root is '{spec.root}': {files['train'][0].name} and train/ mean the same split; keep one")
    return load_parquet(files, spec)


def stored_images(spec: DataSection, download: bool) -> StoredImages:
    """Return the images of a recipe's data section as they are stored."""
    return load_hub_images(spec, download) if spec.is_of_library else DATASETS[spec.name](spec, download)


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
        "folder": load_own,
        "wds": load_shards,
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
