"""Copies among splits: found by bytes, pixels and strings against a naive count, named, refused, dropped or kept as asked."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import eectl, refused
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.errors import EectlError
from eectl.data import Dataset, load_data, outline
from eectl.data.copies import SAMPLE, Contents, encoded_ids, settle_copies
from eectl.data.encoded import Files
from eectl.recipe.data_section import DataSection

CPU = torch.device("cpu")


def file_ids(paths):
    files = Files(tuple(paths), Path("/"))
    return encoded_ids([(files, row) for row in range(len(paths))])


def write_image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of 100 training and 20 test images, two of which are also training images: one of another class."""
    photos = tmp_path / "photos"
    for number in range(100):
        write_image(photos / "train" / ("cat" if number < 60 else "dog") / f"{number:02}.png", number)
    for number in range(18):
        write_image(photos / "test" / ("cat" if number < 9 else "dog") / f"{number:02}.png", 1000 + number)
    shutil.copy(photos / "train/cat/03.png", photos / "test/cat/same.png")
    shutil.copy(photos / "train/cat/05.png", photos / "test/dog/other.png")
    return photos


def section(root: Path, **changes: object) -> DataSection:
    return DataSection.model_validate({"name": "folder", "root": root, "workers": 0, **changes})


def load(root: Path, **changes: object) -> Dataset:
    return load_data(section(root, **changes), device=CPU)


def images(data: Dataset) -> dict[str, list[bytes]]:
    """The bytes of each image of each split."""
    return {
        name: [each.numpy().tobytes() for each in split.rows(torch.arange(len(split)))] for name, split in data.splits.items()
    }


def in_common(found: dict[str, list[bytes]]) -> dict[tuple[str, str], int]:
    """How many rows of the smaller of two splits are in the other, counted naively; pairs with none are left out."""
    counts = {}
    for pair in combinations(found, 2):
        small, large = sorted(pair, key=lambda name: len(found[name]))
        if count := sum(each in found[large] for each in found[small]):
            counts[small, large] = count
    return counts


def contents(first: int, values: list[int], labels: list[int] | None = None) -> Contents:
    ids = np.array(values, dtype=np.uint64)
    return Contents(ids, np.array(labels or [0] * len(ids)), lambda row: f"{first + row}")


def test_files_of_equal_bytes_and_no_others_get_one_number(tmp_path):
    base = np.random.default_rng(0).integers(0, 256, 4 * SAMPLE, dtype=np.uint8)
    first, last, middle = base.copy(), base.copy(), base.copy()
    first[0] ^= 1
    last[-1] ^= 1
    middle[2 * SAMPLE] ^= 1
    kinds = [base, first, last, middle, base[:-1], base[:10], base[:0], base, last, base[:10], base[:0], base[1:11]]
    paths = [tmp_path / str(number) for number in range(len(kinds))]
    for path, kind in zip(paths, kinds, strict=True):
        path.write_bytes(kind.tobytes())
    ids = file_ids(paths)
    for a, b in combinations(range(len(kinds)), 2):
        assert (ids[a] == ids[b]) == (kinds[a].tobytes() == kinds[b].tobytes()), (a, b)
    assert len(file_ids([])) == 0 and len(file_ids(paths[:1])) == 1


def test_a_file_of_its_own_size_is_not_opened_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "folder").mkdir()  # has a size, and cannot be opened
    assert len(set(file_ids([tmp_path / "a", tmp_path / "folder"]))) == 2
    with pytest.raises(EectlError, match=r"missing: cannot be read \(No such file"):
        file_ids([tmp_path / "a", tmp_path / "missing"])
    with pytest.raises(EectlError, match=r"folder: cannot be read \(Is a directory\)"):
        file_ids([tmp_path / "folder", tmp_path / "folder"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_are_found_named_and_refused(root, in_memory):
    data = load(root, in_memory=in_memory)
    assert in_common(images(data)) == {("test", "train"): 2}
    assert [(each.smaller, each.larger, each.count) for each in data.copies.overlaps] == [("test", "train", 2)]
    with pytest.raises(
        EectlError, match=r"^data\.copies: 2 of the 20 images in test are also in train \(.*data\.copies=drop"
    ) as caught:
        data.copies.check()
    assert "train/cat/03.png = test/cat/same.png, train/cat/05.png = test/dog/other.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any("train/cat/05.png = test/dog/other.png" in note and "different label" in note for note in data.copies.notes())


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_are_dropped_everywhere_but_in_test(root, in_memory):
    for number in (7, 8, 9, 70):  # more of them, wherever they were carved to
        shutil.copy(root / f"train/{'dog' if number > 60 else 'cat'}/{number:02}.png", root / f"train/cat/again-{number}.png")
    kept, data = load(root, in_memory=in_memory, copies="keep"), load(root, in_memory=in_memory, copies="drop")
    kept.copies.check()
    data.copies.check()
    before, after = images(kept), images(data)
    assert ("test", "train") in in_common(before) and not in_common(after) and not data.copies.overlaps
    assert after["test"] == before["test"] and data.splits["test"].fingerprint == kept.splits["test"].fingerprint
    stay = set[bytes]()
    for name in ("test", "calibration", "validation", "train"):
        assert after[name] == [each for each in before[name] if each not in stay]
        stay |= set(before[name])
    lost = {name: len(before[name]) - len(after[name]) for name in before}
    assert data.copies.dropped == {name: count for name, count in lost.items() if count}
    assert any("left out" in note and "train/cat/0" in note for note in data.copies.notes())
    for name, split in data.splits.items():
        assert len(split.labels) == len(split.ids) == len(after[name])


def test_where_nothing_is_shared_no_key_changes_a_fingerprint(root):
    for name in ("cat/same", "dog/other"):
        (root / f"test/{name}.png").unlink()
    found = [load(root, in_memory=memory, copies=wish) for memory in (True, False) for wish in ("error", "drop", "keep")]
    for data in found:
        data.copies.check()
        assert data.copies.notes() == []
    prints = [{name: split.fingerprint for name, split in data.splits.items()} for data in found]
    assert prints[0] == prints[1] == prints[2] != prints[3] == prints[4] == prints[5]


def test_a_split_that_loses_a_class_or_all_rows_is_one_line(root, tmp_path):
    for path in (root / "train/dog").iterdir():
        shutil.copy(path, root / "test/dog" / f"copy-{path.name}")
    with pytest.raises(EectlError, match=r"data\.copies is drop, and in calibration: no image of class 'dog'"):
        load(root, copies="drop")
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    with pytest.raises(EectlError, match=r"data\.copies is drop, and all 10 images in calibration are also in another split"):
        load(root, copies="drop")


def test_a_few_copies_are_a_note_and_more_an_error():
    parts = {"train": contents(0, [*range(1000)]), "test": contents(5000, [*range(995, 1495)])}
    kept, few = settle_copies(parts, "error", noun="images", labelled=True)
    few.check()
    assert few.of_test() == ["5 of the 500 images in test are also in train (995 = 5000, 996 = 5001, 997 = 5002, …)"]
    assert {name: len(rows) for name, rows in kept.items()} == {"train": 1000, "test": 500}
    parts["test"] = contents(5000, [*range(994, 1494)])
    with pytest.raises(EectlError, match="6 of the 500 images in test"):
        settle_copies(parts, "error", noun="images", labelled=True)[1].check()
    settle_copies(parts, "keep", noun="images", labelled=True)[1].check()
    parts = {"train": contents(0, [*range(100)]), "validation": contents(300, [*range(50)])}
    _, between = settle_copies(parts, "error", noun="images", labelled=True)
    between.check()  # no result is reported on validation rows
    assert between.of_test() == [] and len(between.notes()) == 1


def test_labels_that_contradict_each_other_are_pointed_out_within_a_split_too():
    parts = {"train": contents(0, [1, 2, 2, 3, 3], [0, 0, 1, 1, 1]), "test": contents(10, [4, 1], [1, 0])}
    assert settle_copies(parts, "keep", noun="images", labelled=True)[1].conflict.startswith("2 images have the same content")
    assert "(1 = 2)" in settle_copies(parts, "keep", noun="images", labelled=True)[1].conflict
    assert settle_copies(parts, "keep", noun="texts", labelled=False)[1].conflict == ""  # numbers may differ


def test_texts_that_people_repeat_are_no_copies_but_others_are(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    train, test = make_rows(200, seed=1), make_rows(40, seed=2)
    short = [{"text": "fine", "score": 0.5, "mood": "up"}] * 5

    def read(*, copies="error", more, repeated=short):
        write_csv(tmp_path / "data" / "train.csv", train + repeated)
        write_csv(tmp_path / "data" / "test.csv", test + more)
        given = {"name": "text", "root": tmp_path / "data", "target": "mood", "tokenizer": str(tokenizer), "copies": copies}
        spec = DataSection.model_validate(given)
        data = load_data(spec, device=CPU)
        planned = outline(spec)
        assert planned.copies == data.copies
        assert {name: len(labels) for name, labels in planned.labels.items()} == {
            name: len(split) for name, split in data.splits.items()
        }
        return data

    (tmp_path / "data").mkdir()
    data = read(more=short)
    data.copies.check()
    assert any("5 of the 45 texts in test are also in train" in note for note in data.copies.of_test())
    with pytest.raises(EectlError, match=r"\d of the 50 texts in test are also in train \(train row \d+ = test row 4\d"):
        read(more=train[:10]).copies.check()
    dropped = read(copies="drop", more=train[:10], repeated=[])
    assert sum((dropped.copies.dropped or {}).values()) == 10 and len(dropped.splits["test"]) == 50


def test_training_is_refused_before_it_starts_and_what_was_trained_is_evaluated(root, tmp_path):
    line = [
        "train",
        "digits",
        "--data",
        root,
        "--set",
        "data.image_size=8",
        "--set",
        "data.workers=0",
        "--set",
        "exits.after=[1]",
    ]
    line += ["--epochs", "1", "--regime", "joint", "--device", "cpu", "-o", tmp_path / "run"]
    for more in (["--set", "data.in_memory=true"], ["--set", "data.in_memory=false"], ["--dry-run"]):
        said = refused(*line, *more)
        assert "2 of the 20 images in test are also in train (train/cat/03.png = test/cat/same.png" in said
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()
    out, said = eectl(*line, "--set", "data.copies=drop", "--dry-run")
    assert "rows: train 78, validation 10" in out and "left out images that are also in another split" in said
    for wish, in_memory, noted in (("drop", "true", False), ("keep", "false", True)):
        eectl(*line, "--set", f"data.copies={wish}", "--set", f"data.in_memory={in_memory}", "--overwrite")
        for protocol in ("calibrated", "paper"):
            _, said = eectl("evaluate", tmp_path / "run" / "model.safetensors", "--protocol", protocol, "--device", "cpu")
            assert ("2 of the 20 images in test are also in train" in said) == noted


def test_test_rows_that_training_has_not_seen_may_hold_no_copies(root, tmp_path):
    line = ["train", "digits", "--data", root, "--set", "data.image_size=8", "--epochs", "1", "--regime", "joint"]
    line += ["--set", "exits.after=[1]"]
    shutil.move(root / "test", tmp_path / "test")
    eectl(*line, "--device", "cpu", "-o", tmp_path / "run")
    shutil.move(tmp_path / "test", root / "test")
    said = refused("evaluate", tmp_path / "run" / "model.safetensors", "--device", "cpu")
    assert "data.copies: 2 of the 20 images in test are also in train" in said
