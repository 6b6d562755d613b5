"""The published data sets' own file formats, read from small files written here, and what happens when they are broken."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.recipe.data_section import DataSection

CPU = torch.device("cpu")


def write_idx(folder: Path, *, train: int = 100, test: int = 30, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count) % 10
        files = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, count)
            + (np.arange(count) % 10).astype(np.uint8).tobytes(),
        }
        for name, data in files.items():
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


def write_cifar(root: Path, kind: type[datasets.CIFAR10], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Batches in the published layout; torchvision is told these files' checksums instead of the published ones."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 100 if kind is datasets.CIFAR100 else 10
    generator = np.random.default_rng(1)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for which in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, which):
            data = generator.integers(0, 256, (10 * classes, 3072), dtype=np.uint8)
            labels = list(np.arange(10 * classes) % classes)
            data[:, 1024:2048] = np.array(labels, dtype=np.uint8)[:, None]  # the green plane holds the label
            entries.append([name, write(name, {"data": data, "labels" if classes == 10 else "fine_labels": labels})])
        monkeypatch.setattr(kind, which, entries)
    checksum = write(kind.meta["filename"], {kind.meta["key"]: [f"class-{i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "layout"), [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_files_are_read_where_they_are(tmp_path, name, layout, packed):
    write_idx(tmp_path / layout, packed=packed)
    data = load_data(DataSection(name=name, root=tmp_path), device=CPU)
    assert {key: len(split) for key, split in data.splits.items()} == {
        "train": 80,
        "validation": 10,
        "calibration": 10,
        "test": 30,
    }
    assert data.info.input_shape == (1, 28, 28) and len(data.info.classes) == 10
    for split in data.splits.values():
        assert torch.equal(split.rows(torch.arange(len(split)))[:, 0, 0, 0].long(), split.labels)


def test_idx_files_are_read_as_torchvision_reads_them(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    theirs = datasets.MNIST(tmp_path, train=False)
    ours = load_data(DataSection(name="mnist", root=tmp_path), device=CPU).splits["test"]
    assert torch.equal(ours.rows(torch.arange(30))[:, 0], theirs.data) and torch.equal(ours.labels, theirs.targets)


def test_a_missing_idx_set_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(EectlError, match=r"fashion-mnist is not there; .*FashionMNIST/raw.*--download") as caught:
        load_data(DataSection(name="fashion-mnist", root=tmp_path), device=CPU)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _label_11(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")


def _no_idx(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("file", "breakage", "packed", "message"),
    [
        ("train-images-idx3-ubyte", _cut, False, "cut short"),
        ("train-images-idx3-ubyte.gz", _cut, True, "cut short"),
        ("t10k-images-idx3-ubyte", _no_idx, False, "not an idx file"),
        ("t10k-labels-idx1-ubyte.gz", _no_idx, True, "cannot be read"),
        ("t10k-labels-idx1-ubyte", _label_11, False, "labels up to 11"),
        ("train-labels-idx1-ubyte", Path.unlink, False, "is missing"),
    ],
)
def test_broken_idx_files_are_named_in_one_line(tmp_path, file, breakage, packed, message):
    write_idx(tmp_path, packed=packed)
    breakage(tmp_path / file)
    with pytest.raises(EectlError, match=message) as caught:
        load_data(DataSection(name="mnist", root=tmp_path), device=CPU)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_is_read_channels_first_with_its_constants(tmp_path, monkeypatch, name, kind, inside):
    folder = write_cifar(tmp_path, kind, monkeypatch)
    data = load_data(DataSection(name=name, root=folder if inside else tmp_path), device=CPU)
    assert data.info.input_shape == (3, 32, 32) and data.info.classes[7] == "class-7"
    assert data.info.mean[0] == (0.4914 if name == "cifar10" else 0.5071)
    for split in data.splits.values():
        images = split.rows(torch.arange(len(split)))
        assert (images[:, 1].flatten(1).long() == split.labels[:, None]).all()
        assert images[:, 0].float().std() > 50
    assert not data.copies.overlaps
    grey = load_data(DataSection(name=name, root=tmp_path, channels=1), device=CPU)
    assert grey.info.input_shape == (1, 32, 32) and len(grey.info.mean) == 1
    colour, one = data.splits["test"].rows(torch.arange(9)).float(), grey.splits["test"].rows(torch.arange(9)).float()
    luma = 0.2989 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    assert (one[:, 0] - luma).abs().max() <= 0.51


def test_a_missing_or_altered_cifar_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(EectlError, match=r"cifar10 is looked for in .*cifar-10-batches-py and it is not there; .*--download"):
        load_data(DataSection(name="cifar10", root=tmp_path), device=CPU)
    folder = write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    _cut(folder / "data_batch_2")
    with pytest.raises(EectlError, match="incomplete or not the published ones") as caught:
        load_data(DataSection(name="cifar10", root=tmp_path), device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("EECTL_TEST_FASHION_MNIST" not in os.environ, reason="EECTL_TEST_FASHION_MNIST names no folder of idx files")
def test_the_real_fashion_mnist():
    data = load_data(DataSection(name="fashion-mnist", root=Path(os.environ["EECTL_TEST_FASHION_MNIST"])), device=CPU)
    train, test = data.splits["train"], data.splits["test"]
    assert (len(train), len(test)) == (48_000, 10_000)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    pixels = train.rows(torch.arange(len(train))).float() / 255
    assert pixels.mean().item() == pytest.approx(data.info.mean[0], abs=0.001)
    assert pixels.std().item() == pytest.approx(data.info.std[0], abs=0.001)
    assert sum(each.count for each in data.copies.overlaps if each.is_of_test) < 10
