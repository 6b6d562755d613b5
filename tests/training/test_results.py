"""What a run leaves for people: a table, a picture, an epoch's lines, and a word on exits that are no use."""

import csv
import json
import math
from dataclasses import replace

import pytest

from eectl.core.progress import epoch_header, epoch_line, shown_exits
from eectl.models.checkpoint import read_about
from eectl.training import results
from eectl.training.find_recipe import find_recipe
from eectl.training.tables import weak_exits_in_training
from eectl.training.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from tests.conftest import small_recipe

    said = []
    folder = tmp_path_factory.mktemp("results") / "run"
    done = train(small_recipe("epochs=2"), regime="disjoint", out=str(folder), device="cpu", say=said.append)
    return folder, done, said


def test_the_table_has_the_numbers_of_the_metrics(finished):
    folder, _, _ = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["phase"] for row in table] == ["1", "1", "3", "3"] and len(rows) == 4
    for line, row in zip(table, rows, strict=True):
        for name in results.PER_EXIT:
            found = [line[f"{name}_{number}"] for number in (1, 2, 3)]
            given = ["" if value is None else str(value) for value in row[name]]
            assert found == given + [""] * (3 - len(given))


def test_the_picture_is_there_and_none_is_no_harm(finished, small, tmp_path, monkeypatch):
    assert (finished[0] / "curves.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(results, "render", lambda *_: (_ for _ in ()).throw(RuntimeError("no fonts")))
    said = []
    done = train(small("epochs=1"), out=tmp_path / "run", device="cpu", say=said.append)
    assert done.path.exists() and any("no fonts" in line and "metrics.jsonl" in line for line in said)


def test_train_prints_nothing_and_says_what_the_command_shows(finished, small, tmp_path, capsys):
    _, done, said = finished
    train(small("epochs=1"), out=tmp_path / "run", device="cpu")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert any(line.startswith("phase 1: backbone") for line in said) and any("train loss" in line for line in said)
    assert done.to_json()["path"].endswith("model.safetensors")
    json.dumps(done.to_json())


def test_shorthands_and_the_folder_are_those_of_the_command(small):
    found = find_recipe("digits", changes=["epochs=7"], given={"regime": "joint", "seed": 3, "phase": 2, "data_root": None})
    assert (found.recipe.epochs, found.recipe.regime, found.recipe.seed, found.recipe.phase) == (7, "joint", 3, 2)
    assert str(found.folder) == "runs/digits-joint-phase-2-seed-3"
    assert find_recipe(small()).recipe == small()
    assert find_recipe(small(), given={"epochs": 9}).recipe == small("epochs=9")


@pytest.mark.parametrize("num_exits", [1, 2, 5, 6, 8, 12, 34])
@pytest.mark.parametrize(("name", "score"), [("accuracy", 1.0), ("MSE", 1.234e-05)])
def test_an_epochs_line_fits_80_columns_below_its_header(num_exits, name, score):
    row = {"epoch": 1000, "train_loss": [12.345] * (num_exits - 1) + [math.nan], "lr": 1.25e-05, "seconds": 1.0}
    row["validation_score"] = [score] * num_exits
    line = epoch_line(row, num_epochs=1000, seconds=12345.6, since_improvement=10, score_name=name)
    header = epoch_header(num_exits, name).splitlines()
    assert max(map(len, [line, *header])) <= 80
    assert len(line.removesuffix(" -10")) == len(header[-1])
    assert all(f"exit {number}" in header[-1] for number in shown_exits(num_exits))
    assert {1, num_exits} <= set(shown_exits(num_exits)) and len(shown_exits(num_exits)) == min(num_exits, 5)


def test_an_exit_that_is_worse_than_an_earlier_one_is_pointed_out(finished):
    about = read_about(finished[0] / "model.safetensors")
    rows = about.splits["validation"]["size"]

    def lines(*scores, task="classification"):
        last = dict(about.history[-1]) | {"validation": {"score": list(scores), "loss": [0.0] * 3}}
        data = dict(about.data) | {"task": task}
        return weak_exits_in_training(replace(about, history=[*about.history[:-1], last], data=data))

    error = math.sqrt(0.9 * 0.1 / rows)
    assert lines(0.9, 0.95, 0.97) == lines(0.9 + 0.9 * error, 0.95, 0.97) == []
    (line,) = lines(0.9 + 1.1 * error, 0.9, 0.99)
    assert line.startswith("exit 2 (accuracy 90.00) is worse than exit 1")
    assert [line[:6] for line in lines(0.9, 0.5, 0.6)] == ["exit 2", "exit 3"]
    for task in ("multilabel", "ordinal"):  # more is better there too
        assert lines(0.5, 0.9, 1.0, task=task) == [] and [line[:6] for line in lines(0.9, 0.5, 0.6, task=task)] == [
            "exit 2",
            "exit 3",
        ]
    assert lines(0.9, 0.5, 0.5, task="regression") == [] and len(lines(0.5, 0.9, 0.4, task="regression")) == 1
