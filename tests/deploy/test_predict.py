"""`eectl predict` and `eectl.predict`: files in, rows out, in order; what cannot be read is named and stops nobody."""

import csv
import doctest
import io
import json
import sys

import numpy as np
import pytest
from deploy.made_models import copy_with_budget_50, made
from deploy.test_text import recipe_for
from PIL import Image
from toy_text import TOY, make_rows, write_csv, write_jsonl

import eectl
from eectl.cli import app as cli
from eectl.core.console import PlainConsole
from eectl.core.errors import EectlError
from eectl.core.streams import HANDLER, standard_streams
from eectl.deploy import predict as predict_module
from eectl.deploy.answers import RowAnswer
from eectl.deploy.rows_out import AnswerTable, RowOut, json_writer, writing_rows
from eectl.models import build as models

TEXTS = [row["text"] for row in make_rows(23, seed=5)]


@pytest.fixture(scope="module", autouse=True)
def toy():
    models.BACKBONES[TOY.name] = TOY.build
    yield
    del models.BACKBONES[TOY.name]


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moods")
    return made(recipe_for(folder, ["text"], "mood", "classification"), folder / "run")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return made(recipe_for(folder, ["text", "second"], "score", "regression"), folder / "run")


@pytest.fixture(scope="module")
def scans(tmp_path_factory, digit_rows):
    """Twenty digits as files, a file that is no image, and one more digit in a folder below."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "deep").mkdir()
    for row in range(20):
        Image.fromarray(digit_rows.pixels[row]).save(folder / f"{row:02}.png")
    (folder / "07x.png").write_text("no image")
    (folder / "notes.txt").write_text("not asked")
    Image.fromarray(digit_rows.pixels[20]).save(folder / "deep" / "20.png")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process; (stdout, stderr, exit code)."""

    def inner(*words, stdin=None):
        monkeypatch.setattr(sys, "argv", ["eectl", *map(str, words)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return out, err, stop.value.code or 0

    return inner


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_folder_comes_out_in_order_and_a_bad_file_is_one_line(digits, digit_rows, scans, run):
    asked = digits.checkpoint, scans, "--policy", digits.policy, "--budget", "60", "--device", "cpu", "--batch-size", "6"
    out, err, code = run("predict", *asked)
    model = eectl.load(digits.checkpoint, policy=digits.policy, budget=60, device="cpu")
    expected = model.predict(list(digit_rows.pixels[:21]))
    rows = rows_of(out)
    assert code == 1
    assert [row["file"] for row in rows] == [str(scans / f"{row:02}.png") for row in range(20)] + [str(scans / "deep" / "20.png")]
    assert [row["label"] for row in rows] == expected.labels and [row["exit"] for row in rows] == expected.exits
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities, abs=1e-5)
    assert [row["cost"] for row in rows] == pytest.approx(expected.costs)
    complaints = [line for line in err.splitlines() if "07x.png" in line]
    assert len(complaints) == 1 and "1 of 22" in err


def test_files_as_they_are_named_and_a_missing_one(digits, scans, run):
    out, err, code = run("predict", digits.checkpoint, scans / "03.png", scans / "none.png", scans / "01.png", "--device", "cpu")
    assert [row["file"][-6:] for row in rows_of(out)] == ["03.png", "01.png"] and code == 1
    assert sum("none.png" in line for line in err.splitlines()) == 1
    assert {row["exit"] for row in rows_of(out)} == {3} and "no policy" in err
    good = run("predict", digits.checkpoint, scans / "03.png", "--device", "cpu", "-q")
    assert good[1:] == ("", 0)
    lines = run("predict", digits.checkpoint, "-", "--device", "cpu", stdin=f"{scans / '03.png'}\n\n{scans / '01.png'}\n")
    assert rows_of(lines[0]) == rows_of(out) and lines[2] == 0


def test_out_as_jsonl_and_csv_with_the_likeliest_classes(digits, scans, run, tmp_path):
    asked = "predict", digits.checkpoint, scans / "01.png", scans / "02.png", "--top", "3", "--device", "cpu"
    piped = rows_of(run(*asked)[0])
    for name in ("a.jsonl", "a.csv"):
        out, err, code = run(*asked, "-o", tmp_path / name)
        assert (out, code) == ("", 0) and f"{tmp_path / name}: 2 rows" in err
    assert rows_of((tmp_path / "a.jsonl").read_text()) == piped
    assert [len(row["top"]) for row in piped] == [3, 3] and piped[0]["top"][0]["label"] == piped[0]["label"]
    table = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [float(row["probability_3"]) for row in table] == [row["top"][2]["probability"] for row in piped]
    assert [row["label_2"] for row in table] == [row["top"][1]["label"] for row in piped]
    assert set(table[0]) == {
        "file",
        "label",
        "probability",
        "exit",
        "cost",
        "label_2",
        "probability_2",
        "label_3",
        "probability_3",
    }
    one = json.loads(run(*asked, "--json")[0])
    assert one["rows"] == piped and (one["kind"], one["schema"], one["num_rows"], one["left"]) == ("prediction", 1, 2, [0, 0, 2])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "stdin"])
def test_texts_from_files_and_lines(moods, run, tmp_path, kind):
    rows = [{"id": number, "words": text} for number, text in enumerate(TEXTS)]
    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind != "stdin":
        write_csv(path, rows, delimiter="\t" if kind == "tsv" else ",")
    source = ["-"] if kind == "stdin" else [path, "--column", "words"]
    asked = *source, "--policy", moods.policy, "--budget", "100", "--device", "cpu", "--batch-size", "2"
    out, err, code = run("predict", moods.checkpoint, *asked, stdin="\n".join(TEXTS) if kind == "stdin" else None)
    expected = eectl.load(moods.checkpoint, policy=moods.policy, budget=100, device="cpu").predict(TEXTS)
    found = rows_of(out)
    assert code == 0, err
    assert [(row["row"], row["text"]) for row in found] == list(enumerate(TEXTS, 1))
    assert [row["label"] for row in found] == expected.labels and [row["exit"] for row in found] == expected.exits


def test_bytes_that_are_no_text_are_a_line_and_the_others_come(moods, run, tmp_path, monkeypatch):
    """On stdin and as an escape of JSON's, which both give half a character."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good film"}\n{"text": "\\ud800"}\n')
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good film\n\xff film\n"), encoding="utf-8"))
        piped = run("predict", moods.checkpoint, "-", "--device", "cpu")
    for out, err, code in (piped, run("predict", moods.checkpoint, path, "--device", "cpu")):
        assert code == 1 and [row["text"] for row in rows_of(out)] == ["good film"]
        assert sum("2: not UTF-8, or half a character" in line for line in err.splitlines()) == 1


def test_a_line_of_endless_nesting_is_a_line_and_the_others_come(moods, run, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good film"}\n{"text": ' + "[" * 100_000 + "\n")
    out, err, code = run("predict", moods.checkpoint, path, "--device", "cpu")
    assert code == 1 and [row["text"] for row in rows_of(out)] == ["good film"]
    assert sum("2: not JSON" in line for line in err.splitlines()) == 1


def test_pairs_and_numbers(pairs, run, tmp_path):
    rows = [{"text": text, "second": "good film"} for text in TEXTS]
    write_csv(tmp_path / "pairs.csv", rows)
    asked = "--device", "cpu", "--policy", pairs.policy, "--budget", "100"
    out, _, code = run("predict", pairs.checkpoint, tmp_path / "pairs.csv", *asked)
    model = eectl.load(pairs.checkpoint, policy=pairs.policy, budget=100, device="cpu")
    expected = model.predict([(text, "good film") for text in TEXTS])
    found = rows_of(out)
    assert code == 0 and [row["value"] for row in found] == pytest.approx(expected.values, abs=1e-5)
    assert set(found[0]) == {"file", "row", "text_1", "text_2", "value", "exit", "cost"}
    piped = run("predict", pairs.checkpoint, "-", *asked, stdin="\n".join(f"{text}\tgood film" for text in TEXTS))
    assert [row["value"] for row in rows_of(piped[0])] == pytest.approx(expected.values, abs=1e-5)


def test_rows_that_will_not_do_are_named_and_the_others_come(moods, run, tmp_path):
    lines = [
        '{"text": "good film"}',
        "{",
        "[1]",
        '{"text": ""}',
        '{"text": null}',
        '{"text": 4}',
        '{"other": "x"}',
        '{"text": "bad"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out, err, code = run("predict", moods.checkpoint, tmp_path / "t.jsonl", "--device", "cpu")
    assert [(row["row"], row["text"]) for row in rows_of(out)] == [(1, "good film"), (8, "bad")] and code == 1
    for number in range(2, 8):
        assert sum(f"row {number}:" in line for line in err.splitlines()) == 1
    (tmp_path / "t.csv").write_text("id,text\n1,good film\n2,a,b\n3,bad\n")
    out, err, code = run("predict", moods.checkpoint, tmp_path / "t.csv", "--device", "cpu")
    assert [row["row"] for row in rows_of(out)] == [1, 3] and code == 1 and "row 2: 3 cells" in err


def test_what_cannot_be_done_is_one_line(digits, moods, scans, run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("x")
    (tmp_path / "t.csv").write_text("id,review\n1,good\n")
    (tmp_path / "cut.csv").write_text('text\n"good')
    good, image, text = digits.checkpoint, scans / "01.png", moods.checkpoint
    cases = [
        ((good, image, "--policy", digits.policy), "1, 40, 60, 100"),
        ((good, image, "--policy", digits.policy, "--budget", "50"), "1, 40, 60, 100"),
        ((good, image, "--policy", digits.policy, "--budget", "1"), "out of reach"),
        ((good, image, "--budget", "50"), "needs a policy"),
        ((good, image, "--policy", moods.policy, "--budget", "100"), "another checkpoint"),
        ((good, tmp_path / "empty"), "no images"),
        ((good, tmp_path / "t.csv"), "takes images"),
        ((good, image, "--text", "review"), "takes images"),
        ((text, image), "takes texts"),
        ((text, scans), "takes texts"),
        ((text, tmp_path / "none.csv"), "no such file"),
        ((text, tmp_path / "t.csv"), "no column 'text'"),
        ((text, tmp_path / "t.csv", "--text", "reviews"), "did you mean 'review'"),
        ((text, tmp_path / "t.csv", "--text", "id", "--text", "review"), "one column"),
        ((text, tmp_path / "cut.csv"), "cut.csv"),
        ((good, "-", "-"), "stands twice"),
        ((good, image, "--top", "0"), "1 to 10"),
        ((good, image, "--top", "11"), "1 to 10"),
        ((good, image, "-o", tmp_path / "there.csv"), "exists"),
        ((good, image, "-o", tmp_path / "a.txt"), ".jsonl or .csv"),
        ((good, image, "-o", tmp_path / "empty"), "a folder"),
        ((good, image, "-o", image), ".jsonl or .csv"),
        ((scans, image), "a folder"),
        ((image, image), "not a safetensors file"),
        ((tmp_path / "no.safetensors", image), "No such file"),
    ]
    for words, said in cases:
        out, err, code = run("predict", *words, "--device", "cpu")
        assert (out, code) == ("", 1) and said in err and err.count("\n") == 1, (words, err)
    assert (tmp_path / "there.csv").read_text() == "x"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in run("predict", good, image)[1]


def test_nothing_is_left_where_a_file_breaks_on_the_way(moods, tmp_path):
    lines = [f"{number},good film\n" for number in range(400)]
    (tmp_path / "t.csv").write_text("id,text\n" + "".join(lines) + '400,"bad')
    with pytest.raises(EectlError, match=r"t\.csv: line 40\d"):
        eectl.predict(moods.checkpoint, tmp_path / "t.csv", out=tmp_path / "a.csv", device="cpu", batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]


def test_rows_are_handed_on_as_they_come_and_held_only_so_long(moods, tmp_path, monkeypatch):
    read = []
    real = predict_module.read_texts

    def counting(*arguments):
        for row in real(*arguments):
            read.append(row)
            yield row

    monkeypatch.setattr(predict_module, "read_texts", counting)
    write_csv(tmp_path / "t.csv", [{"text": text} for text in TEXTS * 10])
    seen = []
    done = eectl.predict(
        moods.checkpoint, tmp_path / "t.csv", device="cpu", batch_size=2,
        each=lambda rows, _: seen.append((len(rows), len(read))),
    )  # fmt: skip
    assert done.rows == () and done.num_rows == 230 == sum(count for count, _ in seen)
    assert seen[0] == (16, 16) and [there for _, there in seen] == [*range(16, 230, 16), 230]


def test_in_python_rows_are_returned_and_nothing_is_printed(digits, scans, capsys):
    done = eectl.predict(digits.checkpoint, [scans / "01.png", scans / "07x.png"], device="cpu")
    assert capsys.readouterr() == ("", "")
    assert [row.shown["file"] for row in done.rows] == [str(scans / "01.png")] and "07x.png" in done.failed[0]
    assert (done.num_rows, done.left, done.mean_cost, done.budget) == (1, (0, 0, 1), 1.0, None)


def test_rows_are_whole_json_in_any_encoding(tmp_path):
    row = RowOut({"file": "größer …\udcff.png"}, RowAnswer(1, 0.25, value=0.5))
    for encoding in ("utf-8", "ascii", "latin-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=HANDLER)
        with standard_streams():
            json_writer(stream)(row)
            stream.flush()
        assert json.loads(stream.buffer.getvalue().decode(encoding))["file"] == row.shown["file"]
    for name in ("a.jsonl", "a.csv"):
        with writing_rows(tmp_path / name) as write:
            write(row)
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["file"] == row.shown["file"]
    assert "größer …\\udcff.png" in (tmp_path / "a.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_and_says_everything(width):
    names = ["cat", "a class [with] brackets"]
    stream = io.StringIO()
    table = AnswerTable(PlainConsole(file=stream, width=width), classes=names, is_text=False)
    for start in range(2):
        for row in range(3):
            top = ((names[row % 2], 0.75), (names[1 - row % 2], 0.25))
            answer = RowAnswer(row + 1, 0.25 * (row + 1), label=top[0][0], probability=0.75, top=top)
            table.take(RowOut({"file": f"folder/{'very-' * 12}long-{start}{row}.png"}, answer))
        table.flush()
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join("".join(line.split()) for line in lines)
    assert sum(line.count("probability") for line in lines) == 1 and text.count("75.0%") == 6 + 2
    if width == 200:
        assert "a class [with] brackets" in stream.getvalue() and "long-12.png" in stream.getvalue()


def test_the_example_in_the_docstring_runs(digits, scans, tmp_path, monkeypatch):
    copy_with_budget_50(digits.folder, tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "images" / name)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(predict_module)
    assert found.attempted and not found.failed


def test_help_names_everything(run):
    out, _, code = run("predict", "--help")
    assert code == 0
    for option in ("--policy", "--budget", "--top", "--batch-size", "--device", "--text", "--column", "--overwrite", "--json"):
        assert option in out
