"""The published data sets' own file formats, read from small files written here, and what happens when they are broken."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision import datasets

from eectl.core.errors import EectlError
from eectl.data import load_data, sources
from eectl.data.plain_pickle import read_plain
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


def write_cifar(
    root: Path, kind: type[datasets.CIFAR10], monkeypatch: pytest.MonkeyPatch, *, protocol: int | None = None
) -> Path:
    """Batches in the published layout; torchvision is told these files' checksums instead of the published ones."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 100 if kind is datasets.CIFAR100 else 10
    generator = np.random.default_rng(1)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, protocol):
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, protocol=protocol)
    ours = load_data(DataSection(name="cifar10", root=tmp_path), device=CPU).splits["test"]
    theirs = datasets.CIFAR10(tmp_path, train=False)
    images = ours.rows(torch.arange(len(ours)))
    assert (images.permute(0, 2, 3, 1).numpy() == theirs.data).all() and ours.labels.tolist() == theirs.targets
    assert images.is_contiguous() and images.dtype == torch.uint8


# What a pickle of Python 2 and NumPy 1 says for {"data": an array of 2 × 3 bytes, "labels": [1, 2], "name": "x"}, as CIFAR's do.
OF_PYTHON_2 = (
    b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x06\x00\x7f\x80\xff\n\x01tbU\x06labels](K\x01K\x02eU\x04nameU\x01xu."
)


def test_pickles_of_python_2_are_read(tmp_path):
    (tmp_path / "batch").write_bytes(OF_PYTHON_2)
    expected = pickle.loads(OF_PYTHON_2, encoding="latin1")
    found = read_plain(tmp_path / "batch")
    assert (found["data"] == expected["data"]).all() and found["data"].dtype == np.uint8 and found["data"].shape == (2, 3)
    assert {name: found[name] for name in ("labels", "name")} == {"labels": [1, 2], "name": "x"}


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i4", "i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_whole_numbers_are_read_as_they_were(tmp_path, dtype, order, protocol):
    array = np.asarray(np.random.default_rng(0).integers(0, 100, (3, 4, 2)).astype(dtype), order=order)
    (tmp_path / "x").write_bytes(pickle.dumps({"a": array, "n": array[0, 0, 0]}, protocol=protocol))
    found = read_plain(tmp_path / "x")
    assert (found["a"] == array).all() and found["a"].dtype == array.dtype and found["n"] == array[0, 0, 0]


class Runs:
    """What runs a command as soon as it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def _later(module, name):
    """A pickle that only names a thing."""
    return b"\x80\x02}U\x01xc" + module + b"\n" + name + b"\ns."


HOSTILE = {
    "a command": lambda mark: pickle.dumps({"data": Runs(os.system, f"touch {mark}")}),
    "code": lambda mark: pickle.dumps({"data": Runs(exec, f"open({str(mark)!r}, 'w')")}),
    "a file": lambda mark: pickle.dumps({"data": Runs(open, str(mark), "w")}),
    "a name": lambda _: _later(b"builtins", b"eval"),
    "a name within": lambda _: _later(b"numpy", b"load"),
    "objects": lambda mark: pickle.dumps({"data": np.array([Runs(os.system, f"touch {mark}")], dtype=object)}),
    "another root": lambda _: pickle.dumps([1, 2]),
    "too few bytes": lambda _: OF_PYTHON_2.replace(b"K\x02K\x03\x86", b"K\x7fK\x7f\x86"),
    "a huge array": lambda _: OF_PYTHON_2.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
    "a changed function": lambda _: b"\x80\x02}U\x01xcnumpy.core.multiarray\n_reconstruct\n}U\x01aK\x01sbs.",
    "an object of its own id": lambda _: b"\x80\x02Pmine\n.",
    "the end": lambda _: OF_PYTHON_2[:80],
    "no pickle": lambda _: b"<html>not found</html>",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_of_more_than_data_is_refused_and_runs_nothing(tmp_path, monkeypatch, kind):
    mark = tmp_path / "it-ran"
    folder = write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    (folder / "data_batch_3").write_bytes(HOSTILE[kind](mark))
    listed = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in datasets.CIFAR10.train_list]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", listed)
    with pytest.raises(EectlError, match=r"data_batch_3: not the published file") as caught:
        load_data(DataSection(name="cifar10", root=tmp_path), device=CPU)
    assert str(caught.value).isprintable() and not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"data": np.zeros((5, 3072), np.uint8), "labels": [0, 1, 2, 3]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]},
        {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.int16), "labels": [0, 1]},
        {"data": [1, 2], "labels": [0, 1]},
        {"labels": [0, 1]},
        {},
    ],
)
def test_a_batch_that_is_none_is_refused(tmp_path, monkeypatch, content):
    folder = write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    checksum = hashlib.md5((folder / "test_batch").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", checksum]])
    with pytest.raises(EectlError, match="test_batch: not a batch of CIFAR"):
        load_data(DataSection(name="cifar10", root=tmp_path), device=CPU)


@pytest.fixture
def served(tmp_path):
    """A folder, and the address at which this machine serves it."""
    (tmp_path / "published").mkdir()
    handler = partial(QuietHandler, directory=tmp_path / "published")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield tmp_path / "published", f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_download_unpacks_what_its_checksum_says_and_nothing_beside_the_folder(tmp_path, monkeypatch, served):
    published, address = served
    folder = write_cifar(published, datasets.CIFAR10, monkeypatch)

    def publish(*outside):
        with tarfile.open(published / "cifar.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
            for name in outside:
                archive.add(folder / "test_batch", name)
        packed = (published / "cifar.tar.gz").read_bytes()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}cifar.tar.gz")
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())

    publish()
    here = load_data(DataSection(name="cifar10", root=published), device=CPU)
    there = load_data(DataSection(name="cifar10", root=tmp_path / "new"), device=CPU, download=True)
    assert {name: split.fingerprint for name, split in there.splits.items()} == {
        name: split.fingerprint for name, split in here.splits.items()
    }
    publish("../outside")
    with pytest.raises(EectlError, match=r"cifar-10-python\.tar\.gz: cannot be unpacked"):
        load_data(DataSection(name="cifar10", root=tmp_path / "newer"), device=CPU, download=True)
    assert not (tmp_path / "outside").exists()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(EectlError, match="cifar10 cannot be downloaded into"):
        load_data(DataSection(name="cifar10", root=tmp_path / "newest"), device=CPU, download=True)


def test_a_download_of_idx_files_reads_nothing_that_lies_about(tmp_path, monkeypatch, served):
    """torchvision's own loader would read processed/training.pt with torch.load."""
    (published, address), root = served, tmp_path / "root"
    write_idx(published, packed=True)
    resources = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(published.iterdir())]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}gone/", address])
    (root / "MNIST" / "processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (root / "MNIST" / "processed" / name).write_bytes(b"not read")
    data = load_data(DataSection(name="mnist", root=root), device=CPU, download=True)
    assert len(data.splits["test"]) == 30
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}gone/"])
    with pytest.raises(EectlError, match="mnist cannot be downloaded"):
        load_data(DataSection(name="mnist", root=tmp_path / "other"), device=CPU, download=True)


def test_an_idx_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path, packed=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2**21)))
    monkeypatch.setattr(sources, "MOST_BYTES", 2**20)
    with pytest.raises(EectlError, match="holds more than 1 MiB"):
        load_data(DataSection(name="mnist", root=tmp_path), device=CPU)


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
