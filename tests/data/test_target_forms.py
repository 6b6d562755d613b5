"""Labels, levels and numbers of images in Parquet, in the datasets library and in shards, against metadata.csv of the same."""

import csv
import json
import tarfile

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from toy_pictures import add, encoded, picture
from toy_text import make_rows, write_jsonl, write_tokenizer

from eectl.core.errors import EectlError
from eectl.core.tensor_files import read_any_tensors
from eectl.data import arrow_tables, data_info, load_data, outline
from eectl.recipe.data_section import DataSection
from eectl.training.train import train
from tests.conftest import small_recipe

CPU = torch.device("cpu")
TAGS = ("calm", "deep", "warm")  # in alphabetical order, which is that of a table's labels
LEVELS = ("low", "mid", "high")
COUNTS = {"train": 90, "test": 20}
TASKS = {
    "tags": {"task": "multilabel", "target": "tags"},
    "flags": {"task": "multilabel", "target": list(TAGS)},
    "level": {"task": "ordinal", "target": "level", "levels": list(LEVELS)},
    "grade": {"task": "ordinal", "target": "grade"},
    "numbers": {"task": "regression", "target": ["x", "y"]},
    "number": {"task": "regression", "target": "x"},
}


def rows_of(part):
    """Facts of each row as a table has them."""
    generator = np.random.default_rng(len(part))
    for number in range(COUNTS[part]):
        there = generator.random(3) < 0.5
        facts = {"tags": [tag for tag, is_there in zip(TAGS, there, strict=True) if is_there]}
        facts |= {tag: int(is_there) for tag, is_there in zip(TAGS, there, strict=True)}
        grade = int(generator.integers(3))
        facts |= {"level": LEVELS[grade], "grade": grade + 1, "x": float(generator.normal()), "y": float(generator.normal())}
        yield number + 1000 * (part == "test"), facts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same rows as files with metadata.csv, in Parquet, as the datasets library saves them, and in shards."""
    root = tmp_path_factory.mktemp("forms")
    datasets.disable_progress_bars()
    kinds = {
        "image": datasets.Image(),
        "tags": datasets.Sequence(datasets.ClassLabel(names=list(TAGS))),
        "level": datasets.ClassLabel(names=list(LEVELS)),
        "hot": datasets.Sequence(datasets.Value("float32")),
        "bits": datasets.Sequence(datasets.Value("int8")),
        **{name: datasets.Value("int64") for name in (*TAGS, "grade")},
        **{name: datasets.Value("float64") for name in "xy"},
    }
    saved = {}
    for name in ("parquet", "shards"):
        (root / name).mkdir()
    for part in COUNTS:
        (root / "files" / part).mkdir(parents=True)
        listed, cells = [], []
        for number, facts in rows_of(part):
            content = encoded(picture(number, number % 3, size=(8, 8)))
            (root / f"files/{part}/{number:05}.png").write_bytes(content)
            listed.append({"file_name": f"{number:05}.png", **facts, "tags": "|".join(facts["tags"])})
            bits = [facts[tag] for tag in TAGS]
            cells.append({"image": content, **facts, "hot": [float(bit) for bit in bits], "bits": bits})
        with (root / f"files/{part}/metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, listed[0])
            writer.writeheader()
            writer.writerows(listed)
        parquet.write_table(pyarrow.Table.from_pylist(cells), root / f"parquet/{part}.parquet")
        with tarfile.open(root / f"shards/{part}-0.tar", "w") as archive:
            for (number, _), each in zip(rows_of(part), cells, strict=True):
                add(archive, f"{number:05}.png", each["image"])
                add(archive, f"{number:05}.json", json.dumps({key: each[key] for key in each if key != "image"}).encode())
        images = [{**each, "image": {"bytes": each["image"], "path": None}} for each in cells]
        columns = {key: [each[key] for each in images] for key in kinds}
        columns["tags"] = [[TAGS.index(tag) for tag in tags] for tags in columns["tags"]]
        columns["level"] = [LEVELS.index(level) for level in columns["level"]]
        saved[part] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict(saved).save_to_disk(str(root / "saved"))
    return root


def places(root):
    return {
        "files": {"name": "folder", "root": str(root / "files")},
        "parquet": {"name": "folder", "root": str(root / "parquet"), "image": "image"},
        "saved": {"name": f"hfds/{root / 'saved'}", "image": "image"},
        "shards": {"name": "wds", "root": str(root / "shards")},
    }


def load(**section):
    return load_data(DataSection(**{"workers": 0, **section}), device=CPU)


def same_rows(one, other):
    assert one.info.classes == other.info.classes and one.info.num_outputs == other.info.num_outputs
    assert one.splits.keys() == other.splits.keys()
    for name, split in one.splits.items():
        assert torch.equal(split.labels, other.splits[name].labels) and split.fingerprint == other.splits[name].fingerprint
        rows = torch.arange(len(split))
        assert torch.equal(split.rows(rows), other.splits[name].rows(rows))


@pytest.mark.parametrize("form", ["parquet", "saved", "shards"])
@pytest.mark.parametrize("kind", TASKS)
def test_targets_are_those_of_the_same_images_in_files(root, kind, form):
    files, other = (load(**places(root)[name], **TASKS[kind]) for name in ("files", form))
    same_rows(files, other)
    spec = DataSection(**places(root)[form], **TASKS[kind], workers=0)
    assert data_info(spec).classes == other.info.classes
    assert (
        outline(spec).labels["test"].tolist()
        == outline(DataSection(**places(root)["files"], **TASKS[kind])).labels["test"].tolist()
    )


@pytest.mark.parametrize("form", ["parquet", "saved", "shards"])
@pytest.mark.parametrize("column", ["hot", "bits"])
def test_a_list_of_0_and_1_has_one_for_each_label(root, form, column):
    files = load(**places(root)["files"], **TASKS["tags"])
    other = load(**places(root)[form], task="multilabel", target=column)
    assert other.info.classes == ("0", "1", "2")
    for name, split in files.splits.items():
        assert torch.equal(split.labels, other.splits[name].labels)


def test_levels_keep_the_librarys_order_without_a_word(root):
    named, found = (load(**places(root)["saved"], **{**TASKS["level"], "levels": levels}) for levels in (LEVELS, None))
    same_rows(named, found)
    assert found.info.classes == LEVELS


def test_the_only_column_that_a_task_may_have_is_found(root, tmp_path):
    for task, target in (("multilabel", "tags"), ("ordinal", "level")):  # the ones that the library marked
        same_rows(load(**places(root)["saved"], task=task), load(**places(root)["saved"], task=task, target=target))
    table = parquet.read_table(root / "parquet/train.parquet")
    for task, target in (("multilabel", "tags"), ("regression", "x"), ("ordinal", "grade")):
        parquet.write_table(table.select(["image", target]), tmp_path / "train.parquet")
        same = {"name": "folder", "root": tmp_path, "task": task}
        same_rows(load(**same), load(**same, target=target))
    parquet.write_table(table.select(["image", "x", "y"]), tmp_path / "train.parquet")
    with pytest.raises(EectlError, match="no column 'label', and 2 others may be the target"):
        load(name="folder", root=tmp_path, task="regression")


@pytest.mark.slow
def test_the_same_images_train_to_the_same_weights(root, tmp_path):
    weights = {}
    for form in ("files", "shards"):
        data = {**places(root)[form], **TASKS["tags"], "workers": 0}
        changes = [f"data={json.dumps(data)}", "batch_size=8", "epochs=1", "regime=joint", "exits.after=[1]"]
        train(small_recipe(*changes), out=tmp_path / form, device="cpu")
        weights[form] = read_any_tensors(tmp_path / form / "model.safetensors")[0]
    assert all(torch.equal(value, weights["shards"][name]) for name, value in weights["files"].items())


def write_rows(path, cells, *, ending="json"):
    with tarfile.open(path, "w") as archive:
        for number, cell in enumerate(cells):
            add(archive, f"{number:03}.png", encoded(picture(number, number % 3, size=(8, 8))))
            add(archive, f"{number:03}.{ending}", cell)


def test_a_shards_labels_may_be_the_json_alone_or_a_text(root, tmp_path):
    cells = [facts["tags"] for _, facts in rows_of("train")]
    write_rows(tmp_path / "train-0.tar", [json.dumps(tags).encode() for tags in cells])
    lists = load(name="wds", root=tmp_path, task="multilabel")
    write_rows(tmp_path / "train-0.tar", ["|".join(tags).encode() for tags in cells], ending="cls")
    same_rows(lists, load(name="wds", root=tmp_path, task="multilabel"))
    write_rows(tmp_path / "train-0.tar", [json.dumps([TAGS.index(tag) for tag in tags]).encode() for tags in cells])
    (tmp_path / "classes.txt").write_text("\n".join(TAGS))
    same_rows(lists, load(name="wds", root=tmp_path, task="multilabel"))


def test_a_number_may_be_a_cls_and_a_key_that_is_named_goes_before_it(root, tmp_path):
    write_rows(tmp_path / "train-0.tar", [f"{facts['x']!r}\n".encode() for _, facts in rows_of("train")], ending="cls")
    alone = load(name="wds", root=tmp_path, task="regression")
    assert sorted(alone.splits["train"].labels.tolist()) == pytest.approx(
        sorted(load(**places(root)["shards"], task="regression", target="x").splits["train"].labels.tolist())
    )
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for number in range(60):
            add(archive, f"{number}.png", encoded(picture(number, number % 3, size=(8, 8))))
            add(archive, f"{number}.cls", b"%d" % (number % 2))
            add(archive, f"{number}.json", json.dumps({"kind": "abc"[number % 3], "label": "z"}).encode())
    assert load(name="wds", root=tmp_path).info.classes == ("0", "1")
    assert load(name="wds", root=tmp_path, target="kind").info.classes == ("a", "b", "c")


GOOD = [b'{"label": ["a"]}', b'{"label": ["b"]}'] * 20
ODD = [
    ("multilabel", b'{"label": 3}', "says 3; give a list"),
    ("multilabel", b'{"label": {"a": 1}}', "says {'a': 1}; give a list"),
    ("multilabel", b'{"label": [["a"]]}', "has ['a'] among its labels"),
    ("multilabel", b'{"label": ["a", ""]}', "has '' among its labels"),
    ("multilabel", b'{"label": ["\\u001b[31m"]}', "among its labels"),
    ("multilabel", b'{"label": ["\\ud800"]}', "among its labels"),
    ("multilabel", json.dumps({"label": [0] * 10_001}).encode(), "says 10,001 labels; give a list of up to 10,000"),
    ("multilabel", b'{"label": [0, 0]}', "names a label twice"),
    ("multilabel", b'{"label": [0.5]}', "has 0.5 among its labels"),
    ("multilabel", b'{"label": [true]}', "has True among its labels"),
    ("multilabel", b"7", "its .json has no key 'label'"),
    ("regression", b'{"label": [1]}', "says [1], which is no number"),
    ("regression", b'{"label": NaN}', "target 'label' is nan, not a number"),
    ("regression", b'{"label": "' + b"1" * 2000 + b'"}', "which is no number"),
    ("regression", b'{"label": 1e300}', "its square is too large"),
    ("regression", b'{"label": 1' + b"0" * 400 + b"}", "not a number"),
    ("ordinal", b'{"label": 1.5}', "says 1.5, which is no class"),
    ("ordinal", b'{"label": "high"}', "has levels such as 'high', whose order is not known"),
]


@pytest.mark.parametrize(("task", "cell", "words"), ODD)
def test_what_no_target_can_be_is_named_with_its_shard_and_row(tmp_path, task, cell, words):
    good = GOOD if task == "multilabel" else [b'{"label": 1}', b'{"label": 2}'] * 20
    write_rows(tmp_path / "train-0.tar", [*good, cell])
    with pytest.raises(EectlError) as caught:
        load(name="wds", root=tmp_path, task=task)
    said = str(caught.value)
    assert words in said and "\n" not in said and "train-0.tar" in said and ("040.png" in said or "has levels such as" in said)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([[0], [3]] * 20, "row 2: column 'tags' has 3 among its labels, and its 3 labels count from 0"),
        ([[0], [-1]] * 20, "row 2: column 'tags' has -1 among its labels, and its 3 labels count from 0"),
        ([[0], None] * 20, "row 2: column 'tags' has None among its labels"),
    ],
)
def test_labels_that_the_library_does_not_name_are_refused_by_row(tmp_path, cells, words):
    kinds = {"image": datasets.Image(), "tags": datasets.Sequence(datasets.ClassLabel(names=list(TAGS)))}
    table = datasets.Dataset.from_dict(
        {"image": [picture(0, 0)] * 40, "tags": [[0]] * 40}, features=datasets.Features(kinds)
    ).data.table
    table = table.set_column(1, table.schema.field("tags"), pyarrow.array(cells, table.schema.field("tags").type))
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(EectlError, match=words):
        load(name="folder", root=tmp_path, task="multilabel", target="tags")


@pytest.mark.parametrize(
    "feature",
    [
        {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["x", "y"]}},
        {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["x", "y"]}, "length": -1},
        {"_type": "LargeList", "feature": {"_type": "ClassLabel", "names": ["x", "y"]}},
        [{"_type": "ClassLabel", "names": ["x", "y"]}],
    ],
)
def test_all_ways_in_which_the_library_wrote_lists_of_classes_are_known(tmp_path, feature):
    images = [encoded(picture(number, 0, size=(8, 8))) for number in range(40)]
    about = json.dumps({"info": {"features": {"tags": feature, "image": {"_type": "Image"}, "odd": [], "none": None}}}).encode()
    table = pyarrow.table({"image": images, "tags": [[0], [1, 0]] * 20}).replace_schema_metadata({b"huggingface": about})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = load(name="folder", root=tmp_path, task="multilabel")
    assert data.info.classes == ("x", "y") and data.splits["train"].labels.mean(dim=0)[0] == 1


def test_labels_beyond_number_are_refused(tmp_path, monkeypatch):
    images = [encoded(picture(number, 0, size=(8, 8))) for number in range(2)]
    parquet.write_table(pyarrow.table({"image": images, "tags": [[0.0] * 10_001] * 2}), tmp_path / "train.parquet")
    with pytest.raises(EectlError, match="names 10,001 labels, and 1 to 10,000 are taken"):
        load(name="folder", root=tmp_path, task="multilabel")
    monkeypatch.setattr(arrow_tables, "MOST_LISTED", 20_001)
    with pytest.raises(EectlError, match="column 'tags' lists 20,002 values; at most 20,001"):
        load(name="folder", root=tmp_path, task="multilabel")


def test_lists_of_0_and_1_of_another_length_are_refused(root, tmp_path):
    images = [encoded(picture(number, 0, size=(8, 8))) for number in range(40)]
    parquet.write_table(pyarrow.table({"image": images, "tags": [[0, 1, 1], [1, 0, 1]] * 20}), tmp_path / "train.parquet")
    parquet.write_table(pyarrow.table({"image": images[:4], "tags": [[0, 1, 1, 1]] * 4}), tmp_path / "test.parquet")
    with pytest.raises(
        EectlError, match=r"test.parquet: row 1: column 'tags' has 4 numbers, and the training rows have 3 labels"
    ):
        load(name="folder", root=tmp_path, task="multilabel", target="tags")


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """Texts with labels as JSONL, and as the datasets library saves them."""
    root = tmp_path_factory.mktemp("moods")
    kinds = {"text": datasets.Value("string"), "tags": datasets.Sequence(datasets.ClassLabel(names=list(TAGS)))}
    kinds |= {
        "word": datasets.Value("string"),
        "code": datasets.Value("int64"),
        "mood": datasets.ClassLabel(names=["a", "b", "c", "d"]),
    }
    saved = {}
    for (name, count), seed in zip((("train", 120), ("test", 30)), (0, 1), strict=True):
        made = [{"text": row["text"]} for row in make_rows(count, seed=seed)]
        for place, row in enumerate(made):
            row |= {
                "tags": [tag for bit, tag in enumerate(TAGS) if (place % 8) >> bit & 1],
                "word": ("yes", "no", "maybe")[place % 3],
            }
            row |= {"code": (3, 7, 40)[place % 3], "mood": "abd"[place % 3]}
        write_jsonl(root / f"{name}.jsonl", made)
        columns = {key: [row[key] for row in made] for key in made[0]}
        columns["tags"] = [[TAGS.index(tag) for tag in tags] for tags in columns["tags"]]
        columns["mood"] = ["abcd".index(mood) for mood in columns["mood"]]
        saved[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict(saved).save_to_disk(str(root / "saved"))
    write_tokenizer(root / "tokenizer")
    return root


@pytest.mark.parametrize(
    ("task", "target", "classes"),
    [
        ("multilabel", "tags", TAGS),
        ("classification", "mood", ("a", "b", "d")),
        ("classification", "word", ("maybe", "no", "yes")),
        ("classification", "code", ("3", "7", "40")),
    ],
)
def test_texts_of_the_library_have_the_classes_of_a_table_with_the_same_rows(moods, task, target, classes):
    rest = {"tokenizer": str(moods / "tokenizer"), "copies": "keep", "task": task, "target": target, "text": "text"}
    table = load_data(DataSection(name="text", root=moods, **rest), device=CPU)
    library = load_data(DataSection(name=f"hfds/{moods / 'saved'}", **rest), device=CPU)
    assert library.info.classes == table.info.classes == classes
    same_rows(table, library)
    assert any("no training row is of class c" in note for note in library.notes) == (target == "mood")
