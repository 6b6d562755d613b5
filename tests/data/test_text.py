"""Texts: tokens against a naive reading, the order of batches, splits, file formats, and what is refused."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from toy_text import make_rows, naive_read, write_csv, write_jsonl, write_tokenizer

from eectl.core.errors import EectlError
from eectl.data import data_info, eval_batches, load_data, num_batches, train_batches
from eectl.data.text import load_tokenizer
from eectl.recipe.data_section import DataSection
from eectl.recipe.text_sets import NEWSGROUPS, TEXT_SETS

CPU = torch.device("cpu")
TRAIN, TEST = make_rows(200, seed=1), make_rows(40, seed=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def load(tmp_path, tokenizer):
    """Loads `tmp_path/data`; write files there first."""

    def call(**changes):
        fields = {"name": "text", "root": tmp_path / "data", "target": "mood", "tokenizer": tokenizer} | changes
        return load_data(DataSection.model_validate(fields), device=CPU)

    (tmp_path / "data").mkdir()
    return call


@pytest.fixture
def folder(tmp_path, load):
    write_csv(tmp_path / "data" / "train.csv", TRAIN)
    write_csv(tmp_path / "data" / "test.csv", TEST)
    return tmp_path / "data"


# --- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_batches_equal_a_naive_reading(load, tmp_path, tokenizer, columns):
    rows = [row | {"other": other["text"]} for row, other in zip(TRAIN, reversed(TRAIN), strict=True)]
    write_csv(tmp_path / "data" / "train.csv", rows)
    write_csv(tmp_path / "data" / "test.csv", rows[:40])
    split = load(text=columns).splits["test"]
    vocabulary = load_tokenizer(tokenizer)
    seen = []
    for batch in eval_batches(split, batch_size=7):
        expected = [naive_read(vocabulary, *(rows[row][name] for name in columns)) for row in batch.rows.tolist()]
        longest = max(len(ids) for ids, _ in expected)
        assert batch.inputs.dtype == torch.int64 and batch.inputs.shape == (len(expected), 3, (longest + 7) // 8 * 8)
        for row, (ids, types) in zip(batch.inputs.tolist(), expected, strict=True):
            empty = [0] * (batch.inputs.shape[2] - len(ids))
            assert row == [ids + empty, [1] * len(ids) + empty, types + empty]
        assert batch.targets.tolist() == [["down", "level", "up"].index(rows[row]["mood"]) for row in batch.rows.tolist()]
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(40))


def test_padding_is_the_tokenizers_own(load, folder, tokenizer, tmp_path):
    other = load_tokenizer(tokenizer)
    other.pad_token = "cast"
    other.save_pretrained(tmp_path / "padded")
    batch = next(eval_batches(load(tokenizer=str(tmp_path / "padded")).splits["test"], batch_size=40))
    assert (batch.inputs[:, 0][batch.inputs[:, 1] == 0] == other.convert_tokens_to_ids("cast")).all()
    assert (batch.inputs[:, 1] == 0).any()


def test_long_texts_are_cut_and_counted(load, folder, tokenizer):
    data = load(max_length=13, validation=0.2)
    assert data.info.input_shape == (3, 13)
    split = data.splits["test"]
    words = [len(row["text"].split()) for row in TEST]
    assert split.lengths.tolist() == [min(count + 2, 13) for count in words]
    assert next(eval_batches(split, batch_size=40)).inputs.shape[2] == 13  # never past max_length, though 13 is no multiple of 8
    cut = sum(count > 11 for count in words)
    assert f", {cut} of 40 test texts are longer than 13 tokens and were cut; data.max_length keeps more" in data.notes[0]
    for batch in eval_batches(split, batch_size=40):
        assert all(ids[length - 1] == 3 for ids, length in zip(batch.inputs[:, 0], split.lengths[batch.rows], strict=True))
    assert load(max_length=22).notes == ()
    assert data.info.largest_token == 17


# --- order -------------------------------------------------------------------------------------------------------------


def test_training_batches_are_grouped_by_length_and_lose_nothing(load, folder):
    split = load(limit=155).splits["train"]
    steps = num_batches(split, 8)
    assert steps == 19

    def batches(epoch=0, **options):
        return [batch.rows.tolist() for batch in train_batches(split, batch_size=8, seed=3, epoch=epoch, **options)]

    order = batches()
    flat = [row for rows in order for row in rows]
    assert len(order) == steps and len(set(flat)) == len(flat) == 8 * steps
    assert order == batches() and order != batches(1) and set(flat) != {row for rows in batches(1) for row in rows}
    assert batches(start=5) == order[5:]
    shares = [batches(rank=rank, world=3) for rank in range(3)]
    for step, rows in enumerate(order):
        assert [shares[rank][step] for rank in range(3)] == [rows[rank::3] for rank in range(3)]
    lengths = split.lengths
    spread = sum(int(lengths[rows].max() - lengths[rows].min()) for rows in order) / steps
    assert spread <= 2 < 12 < int(lengths.max() - lengths.min())  # all batches lie within one window
    means = [float(lengths[rows].float().mean()) for rows in order]
    assert means != sorted(means) and means != sorted(means, reverse=True)


# --- splits ------------------------------------------------------------------------------------------------------------


def test_regression_splits_are_drawn_evenly_over_the_target(load, folder):
    data = load(target="score", task="regression")
    assert (data.info.task, data.info.num_outputs, data.info.classes, data.info.kind) == ("regression", 1, (), "text")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 160, "validation": 20, "calibration": 20, "test": 40,
    }  # fmt: skip
    values = sorted(row["score"] for row in TRAIN)
    tenths = np.array(values).reshape(10, 20)
    for name in ("validation", "calibration"):
        split = data.splits[name]
        assert split.labels.dtype == torch.float32
        drawn = np.sort(split.labels.numpy()).reshape(10, 2)  # two of each tenth
        assert (drawn >= tenths[:, :1]).all() and (drawn <= tenths[:, -1:]).all()
    assert data.splits["test"].labels.tolist() == [row["score"] for row in TEST]
    three = [data.splits[name].labels for name in ("train", "validation", "calibration")]
    assert sorted(torch.cat(three).tolist()) == values
    assert len(load(target="score", task="regression", limit=7).splits["train"]) == 7


def test_fingerprints_see_texts_targets_and_tokenizer(load, folder, tmp_path):
    first = load().splits
    again, shorter = load().splits, load(max_length=5).splits
    assert {name: split.fingerprint for name, split in first.items()} == {name: s.fingerprint for name, s in again.items()}
    assert (first["test"].ids == shorter["test"].ids).all() and first["test"].fingerprint != shorter["test"].fingerprint
    other = load(target="score", task="regression").splits["test"]
    assert not np.isin(other.ids, first["test"].ids).any()
    write_csv(folder / "test.csv", [TEST[0] | {"text": TEST[0]["text"] + " "}, *TEST[1:]])
    assert (load().splits["test"].ids != first["test"].ids).sum() == 1


@pytest.mark.parametrize(("labels", "expected"), [([10, 9, 2], ("2", "9", "10")), (["b", "B", "10"], ("10", "B", "b"))])
def test_classes_are_sorted_as_numbers_or_as_texts(load, tmp_path, labels, expected):
    write_jsonl(tmp_path / "data" / "train.jsonl", [row | {"mood": labels[i % 3]} for i, row in enumerate(TRAIN)])
    data = load()
    assert data.info.classes == expected and "test" not in data.splits
    assert data_info(DataSection(name="text", root=tmp_path / "data", target="mood", tokenizer="x")).classes == expected


# --- files -------------------------------------------------------------------------------------------------------------


def test_all_formats_hold_the_same(load, tmp_path):
    prints = []
    for kind in ("csv", "tsv", "jsonl", "parquet", "parts"):
        for name, rows in (("train", TRAIN), ("test", TEST)):
            path = tmp_path / "data" / f"{name}.{kind}"
            if kind in ("csv", "tsv"):
                write_csv(path, rows, delimiter="," if kind == "csv" else "\t")
            elif kind == "jsonl":
                write_jsonl(path, rows)
            elif kind == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(str(path))
            else:
                for part in (0, 1):
                    file = path.with_name(f"{name}-0000{part}-of-00002.parquet")
                    datasets.Dataset.from_list(rows[part * 15 :] if part else rows[:15]).to_parquet(str(file))
        prints.append({name: split.fingerprint for name, split in load().splits.items()})
        for path in (tmp_path / "data").iterdir():
            path.unlink()
    assert all(each == prints[0] for each in prints)


def test_own_validation_file_and_odd_cells(load, folder):
    long = 'the film, was\n"very" good ' * 6000  # 150,000 characters: over csv's own limit
    write_csv(folder / "validation.csv", [*TEST[:9], TEST[9] | {"text": long}])
    data = load(max_length=10)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 180, "validation": 10, "calibration": 20, "test": 40,
    }  # fmt: skip
    assert data.splits["validation"].labels.tolist() == [["down", "level", "up"].index(row["mood"]) for row in TEST[:10]]


def write_newsgroups(root: Path) -> None:
    for part, count in (("train", 12), ("test", 2)):
        for group in NEWSGROUPS:
            place = root / f"20news-bydate-{part}" / group
            place.mkdir(parents=True)
            for number in range(count):
                text = f"Subject: {group} {number}\nFrom: a\n\nX wrote:\n> old\nnews {part} {number} \xe9\n\n--\nme\n"
                (place / str(number)).write_bytes(text.encode("latin1"))


def test_newsgroups_from_a_folder(tmp_path, tokenizer):
    from eectl.data.text_sources import TEXT_DATASETS

    write_newsgroups(tmp_path)
    spec = DataSection(name="20newsgroups", root=tmp_path, tokenizer=tokenizer)
    whole = TEXT_DATASETS["20newsgroups"](spec, False)
    assert whole.classes == NEWSGROUPS and len(whole.classes) == 20 == len(set(whole.classes))
    assert whole.parts["train"].targets.tolist() == [label for label in range(20) for _ in range(12)]
    assert whole.parts["test"].texts[3][0].startswith("Subject: comp.graphics 1\nFrom: a")
    bare = TEXT_DATASETS["20newsgroups"](spec.model_copy(update={"strip": ("quotes", "footers", "headers")}), False)
    assert bare.parts["test"].texts[3] == ("news test 1 \xe9\n",)
    data = load_data(spec, device=CPU)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 192, "validation": 24, "calibration": 24, "test": 40,
    }  # fmt: skip
    (tmp_path / "20news-bydate-test" / "sci.med" / "0").unlink()
    (tmp_path / "20news-bydate-test" / "sci.med" / "1").unlink()
    with pytest.raises(EectlError, match=r"20news-bydate-test: no posts in sci\.med/; expected: 20news-bydate-train/<group>/"):
        load_data(spec, device=CPU)


def glue_rows(task: str, count: int, seed: int):
    known = TEXT_SETS[f"glue/{task}"]
    texts = [row["text"] for row in make_rows(count * len(known.text), seed=seed)]
    columns = {name: texts[place * count : (place + 1) * count] for place, name in enumerate(known.text)}
    labels = [index % len(known.classes) if known.classes else 0.5 * (index % 11) for index in range(count)]
    return columns | {"label": labels, "idx": list(range(count))}


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"])
def test_glue_in_the_librarys_formats(tmp_path, tokenizer, task):
    dev = "validation_matched" if task == "mnli" else "validation"
    parts = {
        "train": datasets.Dataset.from_dict(glue_rows(task, 100, 3)),
        dev: datasets.Dataset.from_dict(glue_rows(task, 30, 4)),
    }
    parts["test"] = datasets.Dataset.from_dict(glue_rows(task, 10, 5) | {"label": [-1] * 10})
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for name, part in parts.items():
        part.to_parquet(str(tmp_path / "files" / "glue" / task / f"{name}.parquet"))
    spec = DataSection(name=f"glue/{task}", root=tmp_path / "saved", tokenizer=tokenizer)
    saved = load_data(spec, device=CPU)
    files = load_data(spec.model_copy(update={"root": tmp_path / "files"}), device=CPU)
    assert {n: s.fingerprint for n, s in saved.splits.items()} == {n: s.fingerprint for n, s in files.splits.items()}
    assert {name: len(split) for name, split in files.splits.items()} == {
        "train": 80, "validation": 10, "calibration": 10, "test": 30,
    }  # fmt: skip
    assert files.splits["test"].labels.tolist() == glue_rows(task, 30, 4)["label"]
    assert saved.info.task == ("regression" if task == "stsb" else "classification")
    nowhere = data_info(spec.model_copy(update={"root": tmp_path / "nowhere"}))
    assert (nowhere.classes, nowhere.num_outputs, nowhere.task) == (saved.info.classes, saved.info.num_outputs, saved.info.task)


def test_glue_labels_by_name_in_tsv(tmp_path, tokenizer):
    for name, count in (("train", 60), ("dev", 20)):
        columns = glue_rows("rte", count, 6)
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        named = [row | {"label": ("entailment", "not_entailment")[row["label"]]} for row in rows]
        write_csv(tmp_path / f"{name}.tsv", named, delimiter="\t")
    test = load_data(DataSection(name="glue/rte", root=tmp_path, tokenizer=tokenizer), device=CPU).splits["test"]
    assert test.labels.tolist() == glue_rows("rte", 20, 6)["label"]
    with (tmp_path / "dev.tsv").open("a") as file:
        file.write('"good\tthe "film\tentailment\t20\n' + 'bad" plot\tcast\tentailment\t21\n')  # quotes are text in TSV
    splits = load_data(DataSection(name="glue/rte", root=tmp_path, tokenizer=tokenizer), device=CPU).splits
    assert splits["test"].lengths[20:].tolist() == [3 + 2 + 3, 3 + 3 + 1]


# --- what is refused ---------------------------------------------------------------------------------------------------


def changed(row: int, **cells):
    return [each | cells if index == row else each for index, each in enumerate(TRAIN)]


REFUSED = [
    ({"text": "body"}, TRAIN, r"train\.csv: no column 'body'; it has 'text', 'score', 'mood'; set data\.text and data\.target"),
    ({"target": "scores"}, TRAIN, r"no column 'scores' \(did you mean 'score'\?\)"),
    ({}, changed(11, text="  "), r"train\.csv: row 12: column 'text' is empty"),
    ({}, changed(4, mood=""), r"train\.csv: row 5: column 'mood' is empty; every row needs a class"),
    ({"task": "regression", "target": "score"}, changed(7, score="n/a"), r"row 8: column 'score' is 'n/a', not a number"),
    ({"task": "regression", "target": "score"}, changed(7, score="nan"), r"row 8: column 'score' is 'nan', not a number"),
    (
        {"task": "regression", "target": "score"},
        changed(0, score=""),
        r"row 1: column 'score' is empty; regression needs a number",
    ),
    (
        {"target": "score"},
        [row | {"score": i / 7} for i, row in enumerate(TRAIN)],
        r"200 different numbers in 200 rows, which are",
    ),
    ({}, [row | {"mood": "up"} for row in TRAIN], r"has the one class 'up'; two or more are needed"),
    ({}, TRAIN[:3], r"data\.validation: 0 of 3 texts is too small a split"),
    ({"task": "regression", "target": "score"}, TRAIN[:3], r"data\.validation: 0\.1 of 3 texts leaves a split without rows"),
    (
        {"tokenizer": "/nowhere/at all"},
        TRAIN,
        r"data\.tokenizer: '/nowhere/at all': no such folder; name one with tokenizer\.json",
    ),
    ({"tokenizer": "no/such-one"}, TRAIN, r"'no/such-one' is no folder, and it is not in the hub's cache; .*or give --download"),
]


@pytest.mark.parametrize(("changes", "rows", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_refused(load, folder, changes, rows, message):
    write_csv(folder / "train.csv", rows)
    with pytest.raises(EectlError, match=message) as caught:
        load(**changes)
    assert "\n" not in str(caught.value)


def test_refused_files(load, tmp_path, tokenizer):
    folder = tmp_path / "data"
    with pytest.raises(
        EectlError, match=r"no train file in it \(it is empty\); expected: train\.csv \(or csv, tsv, jsonl, parquet\)"
    ):
        load()
    with pytest.raises(
        EectlError, match=r"data\.root is '.*/nowhere': no such folder; expected: train\.csv .*columns text, mood"
    ):
        load(root=tmp_path / "nowhere")
    write_jsonl(folder / "train.jsonl", TRAIN)
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + '\n{"text": "cut sho')
    with pytest.raises(EectlError, match=r"train\.jsonl: line 202: not JSON \(Unterminated string"):
        load()
    (folder / "train.jsonl").write_text('{"text": "a", "mood": "x"}\n{"text": "b"}\n')
    with pytest.raises(EectlError, match=r"train\.jsonl: line 2: no column 'mood'; it has 'text'"):
        load()
    write_csv(folder / "train.csv", TRAIN)
    with pytest.raises(EectlError, match=r"train\.csv and train\.jsonl mean the same split; keep one"):
        load()
    (folder / "train.jsonl").unlink()
    write_csv(folder / "test.csv", [TEST[0], TEST[1] | {"mood": "sideways"}])
    with pytest.raises(EectlError, match=r"test\.csv: row 2: column 'mood' is 'sideways', which is not among the 3 classes"):
        load()
    (folder / "test.csv").unlink()
    (folder / "train.csv").write_text("text,mood\nno quotes, here,up\n")
    with pytest.raises(EectlError, match=r"train\.csv: line 2: 3 cells for 2 columns"):
        load()
    (folder / "train.csv").write_bytes("text,mood\ncaf\xe9,up\n".encode("latin1"))
    with pytest.raises(EectlError, match=r"train\.csv: not UTF-8"):
        load()
    (folder / "train.csv").unlink()
    (folder / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(EectlError, match=r"train\.parquet: not Parquet, or cut short"):
        load()
    (tmp_path / "bare").mkdir()
    (folder / "train.parquet").unlink()
    write_csv(folder / "train.csv", TRAIN)
    with pytest.raises(EectlError, match=r"holds no tokenizer \(tokenizer\.json, …\), but nothing"):
        load(tokenizer=str(tmp_path / "bare"))
    with pytest.raises(EectlError, match=r"glue/rte is not there; expected: train and validation \(or dev\) as csv"):
        load_data(DataSection(name="glue/rte", root=tmp_path / "bare", tokenizer=tokenizer), device=CPU)
