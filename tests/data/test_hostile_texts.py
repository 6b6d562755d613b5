"""Text files and tokenizers that are hostile or damaged: one line each, nothing runs, and nothing beyond the folder is read."""

import datetime
import io
import json
import os
import random
import shutil
import sys

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from toy_text import write_tokenizer

from eectl.core.errors import EectlError
from eectl.data.text import encode, load_tokenizer, padding_id
from eectl.data.text_sources import TEXT_DATASETS, load_files
from eectl.recipe.data_section import DataSection

HEAD = "text,label\n"


def load(path, **keys):
    return load_files(DataSection.model_validate({"name": "text", "root": str(path), "tokenizer": "x"} | keys), False)


def refusal(act):
    """The one line, of bearable length, that something is refused with."""
    with pytest.raises(EectlError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    return line


# --- tables -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "no column 'text'; it has none"),
        ("a.csv", b"\0" * 100_000, "no column 'text'; it has"),
        ("a.csv", (HEAD + "a,b\n").encode("utf-16"), "not UTF-8"),
        ("a.csv", (",".join(f"c{i}" for i in range(50_000)) + "\n").encode(), "and 49,988 more"),
        ("a.csv", ("x" * 500_000 + ",label\na,b\n").encode(), "no column 'text'"),
        ("a.csv", (HEAD + '"' + "x" * 17_000_000 + '",1\n').encode(), "line 2: field larger than field limit"),
        ("a.csv", (HEAD + '"never closed').encode(), "line 2"),
        ("a.tsv", b"text\tlabel\na\n", "line 2: 1 cells for 2 columns"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n' + b"[" * 100_000, "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a", "label": ' + b"9" * 10_000 + b"}", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}', "line 1: not JSON"),
        ("a.jsonl", b'{"text": "' + b"x" * 17_000_000 + b'"}', "line 1: more than 16,777,216 characters"),
        ("a.jsonl", b"5\n", "line 1: a int; each line is one object"),
        ("a.jsonl", b'{"' + b"k" * 100_000 + b'": 1}', "line 1: no column 'text'"),
        ("a.jsonl", b'{"text": [1], "label": 1}\n{"text": "b", "label": 2}\n', "column 'label'"),
        ("a.parquet", b"", "not Parquet, or cut short"),
        ("a.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "not Parquet, or cut short"),
    ],
)
def test_tables(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(lambda: load(tmp_path / name))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        *((value, "its square is too large to compute with") for value in ("1e20", "-1e16", "1" + "0" * 30)),
        *((value, "not a number") for value in ("nan", "inf", "1e999", "1_0", "１２", "0x10", "True", "9" * 5000)),
    ],
)
def test_targets(written, words, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{HEAD}a,1\nb,{written}\n", encoding="utf-8")
    line = refusal(lambda: load(path, task="regression"))
    assert "a.csv: row 2: column 'label' is" in line and words in line
    path.write_text(f"{HEAD}a,1e15\nb, -3.5 \nc,007\n")
    assert load(path, task="regression").parts["train"].targets.tolist() == [1e15, -3.5, 7]


def test_a_target_of_json_that_no_float_holds(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": ' + "9" * 400 + "}\n")
    assert "row 2: column 'label' is 999" in refusal(lambda: load(tmp_path / "a.jsonl", task="regression"))


def test_what_is_not_asked_for_may_be_odd(tmp_path):
    """Other tools write NaN, and rows hold more than a text and a class."""
    rows = [f'{{"text": "word {i}", "label": {i % 2}, "score": NaN, "more": [[{i}]]}}\n' for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    assert load(tmp_path / "a.jsonl").parts["train"].targets.tolist() == [0, 1] * 4


def test_parquet_of_other_types_and_with_flipped_bytes(tmp_path):
    path = tmp_path / "a.parquet"
    for cells in ([{"x": 1}] * 4, [datetime.date(2024, 1, 1)] * 4, [b"\xff"] * 4, [[1]] * 4):
        parquet.write_table(pyarrow.table({"text": list("abcd"), "label": cells}), path)
        assert "row 1: column 'label' is" in refusal(lambda: load(path))
    parquet.write_table(pyarrow.table({"text": [f"word {i}" for i in range(50)], "label": [1, 2] * 25}), path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        bad = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            load(path)
        except EectlError as error:
            assert "\n" not in str(error)


def test_parquet_of_more_rows_than_its_bytes_can_hold(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.repeat(pyarrow.scalar("a"), 3_000_000)
    parquet.write_table(pyarrow.table({"text": column, "label": column}), path)
    assert path.stat().st_size < 1_000_000
    assert "says that it has 3,000,000 rows" in refusal(lambda: load(path))


# --- what the datasets library saved --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """GLUE's RTE as save_to_disk writes it, and what loads it."""
    rows = {"sentence1": ["a", "b"] * 4, "sentence2": ["c", "d"] * 4, "label": [0, 1] * 4}
    part = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "rte")
    spec = DataSection.model_validate({"name": "glue/rte", "root": str(tmp_path / "rte"), "tokenizer": "x"})
    return tmp_path / "rte", lambda: TEXT_DATASETS["glue/rte"](spec, False)


def test_a_saved_set_names_no_file_elsewhere(saved, tmp_path):
    folder, act = saved
    assert act().parts["train"].targets.tolist() == [0, 1] * 4
    state = json.loads((folder / "train" / "state.json").read_text())
    elsewhere = tmp_path / "elsewhere.arrow"
    shutil.copy(folder / "train" / state["_data_files"][0]["filename"], elsewhere)
    for name in ("../../elsewhere.arrow", str(elsewhere), 3, None):
        (folder / "train" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        assert "names no files, or others than those beside it" in refusal(act)
    (folder / "train" / "state.json").write_text("[" * 100_000)
    assert "not JSON" in refusal(act)


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
def test_a_saved_set_that_is_damaged(name, saved):
    folder, act = saved
    path = folder / "train" / name
    for content in (b"", b"[1]", b"\0" * 5000, path.read_bytes()[: path.stat().st_size // 2]):
        path.write_bytes(content)
        refusal(act)
    path.unlink()
    refusal(act)


# --- tokenizers -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def configured(folder, **keys):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def read(folder):
    return encode(load_tokenizer(str(folder)), [("good film",)], max_length=8)


@pytest.mark.parametrize("owner", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("whole", [True, False])
def test_no_code_of_a_folder_runs_and_nothing_is_asked(owner, whole, folder, tmp_path, monkeypatch, capsys):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\nclass Config: pass\n")
    maps = {"AutoTokenizer": ["evil.Tok", "evil.Tok"], "AutoConfig": "evil.Config"}
    if owner == "config.json":
        (folder / owner).write_text(json.dumps({"model_type": "odd", "auto_map": maps}))
        (folder / "tokenizer_config.json").unlink()
    else:
        configured(folder, auto_map=maps, tokenizer_class="Tok")
    if not whole:
        (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    try:
        read(folder)
    except EectlError as error:
        assert "holds no tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("tokenizer.json", "tokenizer_config.json")
            for text in ("", "5", "[" * 100_000, '{"a": ' * 50_000)
        ),
        *(("tokenizer_config.json", "[1]"), ("tokenizer.json", "{}"), ("special_tokens_map.json", "[1")),
    ],
)
def test_files_of_a_tokenizer_that_are_damaged(name, content, folder):
    (folder / name).write_text(content)
    assert "holds no tokenizer" in refusal(lambda: read(folder))


@pytest.mark.parametrize(
    "keys",
    [
        *({"tokenizer_class": 5}, {"pad_token": 5}, {"added_tokens_decoder": "x"}, {"model_max_length": "x"}),
        *({"truncation_side": "up"}, {"tokenizer_class": "BertJapaneseTokenizer"}),
    ],
)
def test_a_configuration_of_nonsense(keys, folder):
    configured(folder, **keys)
    assert refusal(lambda: read(folder)).startswith("data.tokenizer: ")


@pytest.mark.parametrize("number", [-1, 1.5, 2**31, 3 * 10**9, 2**40])
def test_ids_that_no_token_has(number, folder):
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["vocab"]["good"] = number
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert refusal(lambda: read(folder)).startswith("data.tokenizer: ")


def test_devices_and_files_without_end(folder):
    path = folder / "tokenizer_config.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is not a file, but a device" in refusal(lambda: read(folder))
    path.unlink()
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2**30)
    assert "larger than 256 MiB" in refusal(lambda: read(folder))


def test_a_folder_as_it_should_be(folder):
    assert read(folder).ids.tolist() == [2, 4, 9, 3]
    assert read(folder).lengths.dtype == np.int64


class Odd:
    """A tokenizer that gives every text these tokens and types, and this padding."""

    def __init__(self, ids=(1, 2), types=(0, 0), pad_token_id=0):
        self.ids, self.types, self.pad_token_id = list(ids), list(types), pad_token_id

    def __call__(self, texts, **_):
        return {"input_ids": [self.ids for _ in texts], "token_type_ids": [self.types for _ in texts]}


def test_tokens_that_no_network_has_a_row_for():
    for tokenizer, words in ((Odd(ids=(1, -5)), "token ids below 0"), (Odd(types=(0, 7)), "types other than 0 and 1")):
        with pytest.raises(EectlError, match=words):
            encode(tokenizer, [("a",)], max_length=8)
    assert encode(Odd(types=(0, 1)), [("a",)], max_length=8).ids.tolist() == [1, 2]
    assert [padding_id(Odd(pad_token_id=each)) for each in (None, 0, 9)] == [0, 0, 9]
    with pytest.raises(EectlError, match="padding token -3"):
        padding_id(Odd(pad_token_id=-3))
