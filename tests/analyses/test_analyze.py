"""The verb `analyze`, whatever the question: its files, its labels, what goes where, and one line for every mistake."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from matplotlib.figure import Figure
from running import eectl, refused
from safetensors.torch import save_file
from toy_text import TOY, make_rows, write_csv, write_tokenizer

from eectl import __version__
from eectl.analyses.analyze import ANALYSES, _labels
from eectl.analyses.analyze import analyze as analyze_question
from eectl.analyses.probe import VIEWS
from eectl.analyses.settings import QUESTIONS
from eectl.cli import app as cli
from eectl.core.errors import EectlError
from eectl.core.figures import title
from eectl.core.tensor_files import read_any_tensors
from eectl.data import load_data
from eectl.models import build as models
from eectl.models.checkpoint import load_checkpoint, save_checkpoint
from eectl.recipe.choices import VIEW_CHOICES
from eectl.recipe.reading import make_recipe
from eectl.training.train import train

QUESTION = "loss-landscape"  # stands for all: it takes any network, and a line of three points is quick
QUICK = ["--points", "3", "--dimensions", "1", "--samples", "20", "--device", "cpu", "-q"]
SUFFIXES = ("json", "csv", "png", "pdf")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digits: joint of two seeds, disjoint, and joint on other rows."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "joint": (),
        "joint-1": ("seed=1",),
        "disjoint": ("regime=disjoint",),
        "fewer": ("data.limit=100",),
    }
    for name, more in changes.items():
        train(small_recipe("epochs=1", *more), out=folder / name, device="cpu", quiet=True)
    return {name: folder / name / "model.safetensors" for name in changes} | {
        "plain": folder / "disjoint" / "phase-1.safetensors"
    }


@pytest.fixture
def analyze():
    """Run the program in this process: (stdout, stderr)."""

    def run(*arguments, question=QUESTION):
        return eectl("analyze", question, *arguments, *QUICK)

    return run


@pytest.fixture
def refuse(tmp_path):
    """Run it where it must refuse, with one line and no file; the line."""

    def run(*arguments, question=QUESTION, options=QUICK):
        before = sorted(tmp_path.rglob("*"))
        line = refused("analyze", question, *arguments, *options)
        assert len(line.splitlines()) == 1 and line.startswith("eectl: "), line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def read(folder):
    return json.loads((folder / f"{QUESTION}.json").read_text())


def test_the_four_files(runs, tmp_path, analyze):
    paths = [runs["joint"], runs["disjoint"]]
    out, err = analyze(*paths, "-o", tmp_path / "new" / "folder", "--seed", "3")
    files = {suffix: tmp_path / "new" / "folder" / f"{QUESTION}.{suffix}" for suffix in SUFFIXES}
    assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(files.values())
    assert files["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and files["pdf"].read_bytes()[:5] == b"%PDF-"
    report = json.loads(files["json"].read_text())
    assert list(report) == [
        "kind", "schema", "eectl", "question", "seed", "settings", "checkpoints", "values", "reading", "notes", "digest",
    ]  # fmt: skip
    about = ("analysis", 1, __version__, QUESTION, 3)
    assert tuple(report[name] for name in ("kind", "schema", "eectl", "question", "seed")) == about
    assert report["settings"] == {
        "split": "train", "samples": 20, "points": 3, "span": 1.0, "dimensions": 1, "only": "all", "reestimate": False,
    }  # fmt: skip
    for path, found in zip(paths, report["checkpoints"], strict=True):
        checkpoint = load_checkpoint(path)
        rows = load_data(checkpoint.about.data_spec, device=torch.device("cpu")).splits["train"]
        regime = path.parent.name
        assert found == {
            "label": regime, "path": str(path), "weights": checkpoint.digest, "network": "resnet20", "regime": regime, "seed": 0,
            "after": [1, 4], "data": "digits", "splits": {"train": rows.fingerprint},
        }  # fmt: skip
    assert len(report["reading"]) == 2 and all(sentence.endswith(".") for sentence in report["reading"])
    with open(files["csv"], newline="") as handle:
        reader = csv.DictReader(handle)
        records = list(reader)
    assert reader.fieldnames == ["label", "exit", "x", "loss", "rows"]
    expected = [
        (one["label"], str(each["exit"]), x, loss)
        for one in report["values"]["networks"]
        for each in (*one["exits"], one["total"])
        for x, loss in zip(report["values"]["coordinates"], each["loss"], strict=True)
    ]
    assert [(each["label"], each["exit"], float(each["x"]), float(each["loss"])) for each in records] == expected
    said = " ".join(out.split())
    assert all(sentence in said for sentence in report["reading"]) and "mean loss at the weights" in said
    assert err == f"{', '.join(map(str, files.values()))}: written\n"


def test_seeds_and_overwriting(runs, tmp_path, analyze, refuse):
    analyze(runs["joint"], "-o", tmp_path)
    first, pictures = read(tmp_path), [(tmp_path / f"{QUESTION}.{suffix}").read_bytes() for suffix in ("csv", "png")]
    assert "loss-landscape.json exists; give another name, or --overwrite to replace it" in refuse(runs["joint"], "-o", tmp_path)
    analyze(runs["joint"], "-o", tmp_path, "--overwrite")
    assert read(tmp_path) == first
    assert [(tmp_path / f"{QUESTION}.{suffix}").read_bytes() for suffix in ("csv", "png")] == pictures
    analyze(runs["joint"], "-o", tmp_path, "--overwrite", "--seed", "1")
    assert read(tmp_path)["values"] != first["values"]
    (tmp_path / f"{QUESTION}.json").unlink()
    assert "loss-landscape.csv exists" in refuse(runs["joint"], "-o", tmp_path)


def test_json_alone_is_on_stdout(runs, tmp_path, analyze):
    checkpoint = load_checkpoint(runs["joint"])
    splits = {**checkpoint.about.splits, "test": {**checkpoint.about.splits["test"], "fingerprint": "0" * 64}}
    save_checkpoint(tmp_path / "noted.safetensors", checkpoint.model, replace(checkpoint.about, splits=splits))
    out, err = analyze(tmp_path / "noted.safetensors", "-o", tmp_path, "--json")
    assert json.loads(out) == read(tmp_path)
    note, written = err.splitlines()
    assert note == "note: the test split is not the one recorded when the checkpoint was trained"
    assert written.endswith("written")


def test_labels(runs):
    """The regime where it tells them apart, else with the seed, else the folder, else the whole path."""
    joint, again, disjoint, plain = (
        (load_checkpoint(runs[name]).about, runs[name]) for name in ("joint", "joint-1", "disjoint", "plain")
    )
    copy, beside = ((joint[0], Path("copies") / f"{name}.safetensors") for name in "ab")
    expected = {
        ("joint", "disjoint", "backbone"): [joint, disjoint, plain],
        ("joint, seed 0", "joint, seed 1"): [joint, again],
        ("joint, seed 0", "joint, seed 1", "disjoint, seed 0"): [joint, again, disjoint],
        ("joint", "copies"): [joint, copy],
        ("copies/a.safetensors", "copies/b.safetensors"): [copy, beside],
    }
    for labels, given in expected.items():
        assert tuple(_labels(*map(list, zip(*given, strict=True)))) == labels


def test_labels_the_user_gives(runs, tmp_path, analyze):
    analyze(runs["joint"], runs["joint-1"], "--label", "one", "--label", "two", "-o", tmp_path)
    report = read(tmp_path)
    assert [each["label"] for each in report["checkpoints"]] == ["one", "two"]
    assert [each["label"] for each in report["values"]["networks"]] == ["one", "two"]


def test_options_that_do_not_fit(runs, tmp_path, refuse):
    out = ["-o", tmp_path / "out"]
    joint, disjoint = runs["joint"], runs["disjoint"]
    assert "--label: 1 for 2 checkpoints; give one for each" in refuse(joint, disjoint, "--label", "a", *out)
    assert "--label: 'a' stands twice" in refuse(joint, disjoint, "--label", "a", "--label", "a", *out)
    assert f"{joint} is named twice" in refuse(joint, joint.parent / ".." / "joint" / joint.name, *out)
    assert "unknown split 'tset' (did you mean 'test'?); known: train, validation, calibration, test" in refuse(
        joint, "--split", "tset", *out
    )
    (tmp_path / "file").write_text("")
    assert f"-o {tmp_path / 'file'}: a file; name a folder" in refuse(joint, "-o", tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file; name a folder" in refuse(joint, "-o", tmp_path / "file" / "below")


def test_checkpoints_that_do_not_fit(runs, tmp_path, refuse):
    out = ["-o", tmp_path / "out"]
    plain = [runs["joint"], runs["plain"], *out]
    assert f"{runs['plain']}: no exits, which gradient-dominance is about; put some on it with eectl attach-heads" in refuse(
        *plain, question="gradient-dominance", options=["--samples", "20", "--device", "cpu", "-q"]
    )
    assert f"{runs['fewer']} and {runs['joint']} differ in their train rows" in refuse(runs["joint"], runs["fewer"], *out)
    assert "nowhere.safetensors: cannot be read (No such file or directory)" in refuse(tmp_path / "nowhere.safetensors", *out)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(runs["joint"].read_bytes()[:-1000])
    assert f"{cut}: not a safetensors file, or cut short" in refuse(runs["joint"], cut, *out)
    assert f"{runs['joint'].parent}: a folder; name a .safetensors file in it" in refuse(runs["joint"].parent, *out)


def test_rows_that_thorough_share_are_enough(runs, tmp_path, analyze, refuse):
    """Other training rows are no matter to a question about the test split."""
    analyze(runs["joint"], runs["fewer"], "--split", "test", "-o", tmp_path)
    one, other = read(tmp_path)["checkpoints"]
    assert one["splits"] == other["splits"] and list(one["splits"]) == ["test"]
    both = [runs["joint"], runs["fewer"], "--split", "test", "--reestimate", "-o", tmp_path / "out"]
    assert "differ in their train rows" in refuse(*both)  # where BatchNorm's statistics would come from


def test_data_that_is_not_there(runs, tmp_path, refuse):
    checkpoint = load_checkpoint(runs["joint"])
    recipe = {**checkpoint.about.recipe, "data": {**checkpoint.about.recipe["data"], "name": "fashion-mnist", "root": "/nowhere"}}
    save_checkpoint(tmp_path / "lost.safetensors", checkpoint.model, replace(checkpoint.about, recipe=recipe))
    assert "/nowhere" in refuse(tmp_path / "lost.safetensors", "-o", tmp_path / "out")


def test_another_data_set_and_a_split_it_lacks(runs, tmp_path, monkeypatch, refuse):
    monkeypatch.setitem(models.BACKBONES, TOY.name, TOY.build)
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(200, seed=1))
    data = {
        "name": "text",
        "root": str(tmp_path / "data"),
        "target": "mood",
        "tokenizer": write_tokenizer(tmp_path / "tokenizer"),
    }
    base = {"backbone": {"name": TOY.name}, "exits": {"after": [0, 1]}, "regime": "joint", "epochs": 1, "batch_size": 16}
    train(make_recipe(base | {"data": data}, where="test"), out=tmp_path / "run", device="cpu", quiet=True)
    texts = tmp_path / "run" / "model.safetensors"
    assert "differ in their train rows; give checkpoints of one data set" in refuse(runs["joint"], texts, "-o", tmp_path / "out")
    assert "text: there is no test split; add a test file beside train" in refuse(
        texts, "--split", "test", "-o", tmp_path / "out"
    )


@pytest.mark.process
def test_every_question_has_its_command_and_none_needs_torch_for_help():
    import typer

    commands = typer.main.get_command(cli.app).commands["analyze"].commands
    assert set(commands) == set(ANALYSES)
    for arguments in ([], [QUESTION]):
        code = (
            f"import sys; sys.argv = ['eectl', 'analyze', *{arguments}, '--help']\n"
            "from eectl.cli.app import main\n"
            "try:\n    main()\n"
            "except SystemExit as stop:\n    print('code', stop.code)\n"
            "print('loaded', sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert "loaded []" in said and "code 0" in said
        assert (QUESTION in said) == (not arguments) or "Example" in said


def test_the_function_returns_what_the_file_holds_and_prints_nothing(runs, tmp_path, capsys):
    said = []
    found = analyze_question(QUESTION, str(runs["joint"]), out=str(tmp_path), points=3, dimensions=1, samples=20, say=said.append)
    assert capsys.readouterr() == ("", "")
    assert json.loads(json.dumps(found.to_json())) == read(tmp_path) and said[-1].endswith("written")
    assert read(tmp_path)["settings"]["points"] == 3


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (QUESTION, {"pionts": 3}, ["'pionts'", "did you mean 'points'", "points, span, dimensions, only, reestimate, samples"]),
        (QUESTION, {"points": "3"}, ["points is '3'", "a whole number"]),
        (QUESTION, {"reestimate": 1}, ["reestimate is 1", "True or False"]),
        (QUESTION, {"span": True}, ["span is True", "a number"]),
        (QUESTION, {"split": "dev"}, ["unknown split 'dev'", "calibration"]),
        ("numerical-rank", {"view": "poled"}, ["--view 'poled'", "did you mean 'pooled'"]),
        ("loss", {}, ["unknown question 'loss'", "mode-connectivity"]),
    ],
)
def test_options_that_a_question_does_not_take(tmp_path, question, options, words):
    with pytest.raises(EectlError) as refused:
        analyze_question(question, tmp_path / "nowhere.safetensors", out=tmp_path / "out", **options)
    assert all(word in str(refused.value) for word in words), refused.value


def test_all_checkpoints_are_looked_at_before_the_first_is_loaded(runs, tmp_path, refuse):
    """The first one's weights were altered, which only loading them tells; so what is wrong with the second is told first."""
    tensors, metadata = read_any_tensors(runs["joint"])
    damaged = tmp_path / "damaged.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, damaged, metadata=metadata)
    dominance = {"question": "gradient-dominance", "options": ["--samples", "20", "--device", "cpu", "-q"]}
    assert "the weights are not those that were saved" in refuse(damaged, "-o", tmp_path / "out")
    assert "nowhere.safetensors: cannot be read" in refuse(damaged, tmp_path / "nowhere.safetensors", "-o", tmp_path / "out")
    assert f"{runs['plain']}: no exits" in refuse(damaged, runs["plain"], "-o", tmp_path / "out", **dominance)
    assert "differ in their train rows" in refuse(damaged, runs["fewer"], "-o", tmp_path / "out")


def test_commands_have_the_settings_of_their_questions():
    import typer

    commands = typer.main.get_command(cli.app).commands["analyze"].commands
    assert list(QUESTIONS) == list(ANALYSES) and set(VIEW_CHOICES) == set(VIEWS)
    for name, question in QUESTIONS.items():
        options = {each.name: each for each in commands[name].params}
        for each in fields(question.settings):
            assert options[each.name].default == each.default and options[each.name].help == each.metadata["help"]


def test_a_title_names_data_and_network_and_papers_have_none(runs, tmp_path, analyze):
    figure = Figure()
    title(figure, "digits, resnet20: loss landscape", paper=True)
    assert not figure.texts and figure.get_suptitle() == ""
    title(figure, "digits, resnet20: loss landscape", paper=False)
    assert figure.get_suptitle() == "digits, resnet20: loss landscape" and not figure.axes
    analyze(runs["joint"], "-o", tmp_path / "a")
    analyze(runs["joint"], "-o", tmp_path / "b", "--paper")
    one, other = ((tmp_path / name / f"{QUESTION}.png").read_bytes() for name in "ab")
    assert one != other and read(tmp_path / "a")["values"] == read(tmp_path / "b")["values"]


def test_what_a_question_needs_is_looked_at_before_the_first_is_loaded(runs, tmp_path, refuse):
    tensors, metadata = read_any_tensors(runs["joint"])
    damaged = tmp_path / "run" / "damaged.safetensors"
    damaged.parent.mkdir()
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, damaged, metadata=metadata)
    quick = ["--device", "cpu", "-q", "-o", tmp_path / "out"]
    tracked = {"question": "gradient-dominance", "options": ["--tracked", *quick]}
    assert f"{damaged}: no metrics.jsonl beside it" in refuse(damaged, **tracked)
    shutil.copy(runs["joint"].parent / "metrics.jsonl", damaged.parent)
    assert "nothing was tracked" in refuse(damaged, **tracked)
    moved = tmp_path / "moved.safetensors"
    about = load_checkpoint(runs["joint"]).about
    data = {**about.data, "classes": [*about.data["classes"], "more"]}
    other = replace(about, spec=about.spec.model_copy(update={"num_outputs": 11}), data=data)
    save_checkpoint(moved, load_checkpoint(runs["joint"]).model, other)
    assert "has outputs 10" in refuse(damaged, moved, question="mode-connectivity", options=quick)
