"""data.test and data.limit: what is carved and cut, by class and by seed, where the data set has no such rows of its own."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.errors import EectlError
from eectl.data import data_info, load_data
from eectl.data.carving import carve, rank_groups
from eectl.recipe.data_section import DataSection
from eectl.recipe.reading import make_recipe

CPU = torch.device("cpu")
LABELS = np.array([0] * 120 + [1] * 60 + [2] * 20)


def rows_of(**changes: object) -> dict[str, np.ndarray]:
    return carve(LABELS, DataSection.model_validate({"name": "folder", **changes}), "abc")


def write_images(folder: Path, count: int, *, first: int) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("ant", "bee")):
        write_images(tmp_path / "photos" / name, 40, first=100 * number)
    return tmp_path / "photos"


def folder(root: Path, **changes: object):
    return load_data(DataSection.model_validate({"name": "folder", "root": root, "workers": 0, **changes}), device=CPU)


def sizes(data) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def test_a_test_split_is_carved_by_class_and_nothing_is_lost():
    rows = rows_of(test=0.15)
    assert {name: len(each) for name, each in rows.items()} == {"test": 30, "validation": 20, "calibration": 20, "train": 130}
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(200))
    assert Counter(LABELS[rows["test"]].tolist()) == {0: 18, 1: 9, 2: 3}
    assert all((each[1:] > each[:-1]).all() for each in rows.values())


def test_a_test_split_depends_on_its_share_and_the_seed():
    test = rows_of(test=0.15)["test"].tolist()
    assert rows_of(test=0.15, validation=0.2, limit=50)["test"].tolist() == test
    assert rows_of(test=0.15, split_seed=1)["test"].tolist() != test
    assert "test" not in rows_of()


def test_limits_cut_the_splits_they_name_by_class():
    whole, cut = rows_of(test=0.2), rows_of(test=0.2, limit={"train": 60, "validation": 10, "calibration": 500, "test": 20})
    assert {name: len(each) for name, each in cut.items()} == {"test": 20, "validation": 10, "calibration": 20, "train": 60}
    for name, each in cut.items():
        assert set(each.tolist()) <= set(whole[name].tolist())
    assert Counter(LABELS[cut["test"]].tolist()) == {0: 12, 1: 6, 2: 2}


def test_a_number_limits_the_training_rows():
    assert {name: each.tolist() for name, each in rows_of(limit=60).items()} == {
        name: each.tolist() for name, each in rows_of(limit={"train": 60}).items()
    }
    limit = make_recipe({"data": {"limit": 5}}, where="x", changes=["data.split_seed=1"]).data.limit
    assert (limit.train, limit.test, limit.of("train"), limit.of("calibration")) == (5, None, 5, None)
    assert make_recipe({}, where="x", changes=["data.limit.test=7"]).data.limit.test == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 0.5, "validation": 0.3, "calibration": 0.3}, r"validation \+ calibration \+ test is 1\.1"),
        ({"name": "digits", "test": 0.1}, "digits has a test split of its own"),
        ({"limit": 0}, r"data\.limit: is 0"),
        ({"limit": "many"}, r"data\.limit: is 'many'.*train: 5000"),
        ({"limit": True}, r"data\.limit: is True"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(EectlError, match=message):
        make_recipe({"data": {"name": "folder", **changes}}, where="x")


def test_a_limit_too_small_for_every_class_is_named():
    with pytest.raises(EectlError, match=r"^data\.limit\.test: 2 of 30"):
        rows_of(test=0.15, limit={"test": 2})


def test_class_folders_may_lie_in_the_root(root):
    data = folder(root)
    assert data.info.classes == ("ant", "bee") and sizes(data) == {"train": 64, "validation": 8, "calibration": 8}
    for name in ("ant", "bee"):
        (root / "train").mkdir(exist_ok=True)
        shutil.move(root / name, root / "train" / name)
    moved = folder(root)
    assert torch.equal(moved.splits["train"].labels, data.splits["train"].labels)
    assert moved.splits["train"].fingerprint == data.splits["train"].fingerprint  # content, not place


def test_a_data_set_without_test_rows_is_told_and_carved(root):
    (note,) = folder(root).notes
    assert "no test split" in note and "data.test=0.15" in note and str(root) in note
    data = folder(root, test=0.2, limit={"train": 20})
    assert data.notes == () and sizes(data) == {"train": 20, "validation": 8, "calibration": 8, "test": 16}
    ids = np.concatenate([split.ids for split in data.splits.values()])
    assert len(np.unique(ids)) == 52
    assert data.splits["test"].fingerprint != folder(root, test=0.2, split_seed=3).splits["test"].fingerprint
    streamed = folder(root, test=0.2, image_size=6, in_memory=False)
    assert torch.equal(streamed.splits["test"].labels, data.splits["test"].labels)


def test_test_rows_of_its_own_are_kept_and_can_be_limited(root):
    for name in ("ant", "bee"):
        (root / "train").mkdir(exist_ok=True)
        shutil.move(root / name, root / "train" / name)
        write_images(root / "test" / name, 10, first=500 if name == "ant" else 600)
    assert sizes(folder(root))["test"] == 20 and folder(root).notes == ()
    data = folder(root, limit={"test": 6})
    assert torch.bincount(data.splits["test"].labels).tolist() == [3, 3]
    assert set(data.splits["test"].ids) < set(folder(root).splits["test"].ids)
    with pytest.raises(EectlError, match=r"data\.test is 0\.1.*test split of its own"):
        folder(root, test=0.1)


def test_a_folders_facts_need_no_image_but_one(root):
    for path in sorted((root / "bee").iterdir()):
        path.write_text("no image")
    info = data_info(DataSection(name="folder", root=root))
    assert (info.classes, info.input_shape) == (("ant", "bee"), (3, 8, 8))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "tokenizer")


def texts(path: Path, tokenizer: str, **changes: object):
    section = {"name": "text", "root": path, "target": "mood", "tokenizer": tokenizer, **changes}
    return load_data(DataSection.model_validate(section), device=CPU)


def test_one_file_of_texts_is_the_training_file(tmp_path, tokenizer):
    write_csv(tmp_path / "mine.csv", make_rows(100))
    alone = texts(tmp_path / "mine.csv", tokenizer, test=0.2)
    assert sizes(alone) == {"train": 60, "validation": 10, "calibration": 10, "test": 20}
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "mine.csv", tmp_path / "folder" / "train.csv")
    beside = texts(tmp_path / "folder", tokenizer, test=0.2)
    assert {name: split.fingerprint for name, split in alone.splits.items()} == {
        name: split.fingerprint for name, split in beside.splits.items()
    }
    assert any("data.test=0.15" in note for note in texts(tmp_path / "mine.csv", tokenizer).notes)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(EectlError, match=r"mine\.txt': not a file that eectl reads; it takes csv, tsv"):
        texts(tmp_path / "mine.txt", tokenizer)


def test_a_regressions_splits_are_drawn_by_its_tenths(tmp_path, tokenizer):
    write_csv(tmp_path / "train.csv", make_rows(200))
    write_csv(tmp_path / "test.csv", make_rows(100, seed=1))
    options = {"target": "score", "task": "regression"}
    whole = texts(tmp_path, tokenizer, **options).splits["test"].labels
    limited = texts(tmp_path, tokenizer, **options, limit={"test": 20, "validation": 10}).splits
    assert (len(limited["test"]), len(limited["validation"])) == (20, 10)
    assert abs(limited["test"].labels.mean() - whole.mean()) < whole.std() / 2
    carved = texts(tmp_path / "train.csv", tokenizer, **options, test=0.1).splits
    assert {name: len(split) for name, split in carved.items()} == {"train": 140, "validation": 20, "calibration": 20, "test": 20}


def test_groups_of_equal_size_go_by_rank():
    assert rank_groups(np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]), 3).tolist() == [2, 0, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("values", "refused"), [([n / 8 for n in range(40)], True), ([0.5, 1.0, 1.5], False), (range(30), False)]
)
def test_many_numbers_with_fractions_are_no_classes(tmp_path, tokenizer, values, refused):
    rows = [["text", "mood"], *([f"good {number}", value] for number in range(10) for value in values)]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    if refused:
        with pytest.raises(EectlError, match=r"40 different numbers in 400 rows.*--task regression"):
            texts(tmp_path / "mine.csv", tokenizer)
    else:
        assert len(texts(tmp_path / "mine.csv", tokenizer).info.classes) == len(values)
