"""The verb `bench`: what it writes, what it says, and one line for every mistake."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_recipe
from running import eectl, refused
from toy_text import TOY, make_rows, write_csv, write_tokenizer

from eectl.core.errors import EectlError
from eectl.evaluation.bench import _choose_rows, parse_batch_sizes
from eectl.evaluation.calibrate import calibrate
from eectl.models import build as models
from eectl.models.checkpoint import load_checkpoint, save_checkpoint
from eectl.recipe.reading import make_recipe
from eectl.training.attach import attach_heads
from eectl.training.train import train

QUICK = ["--batch-size", "1,16", "--seconds", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A joint network on digits with its policy, and one with other exits."""
    folder = tmp_path_factory.mktemp("bench")
    train(small_recipe("epochs=1"), out=folder / "joint", device="cpu", quiet=True)
    path = folder / "joint" / "model.safetensors"
    calibrate(path, budgets=[50, 100], out=folder / "policy.json", device="cpu")
    options = {"after": "2", "placement": None, "head": "auto", "seed": None, "overwrite": False}
    attach_heads(path, out=folder / "other.safetensors", **options)
    return folder


@pytest.fixture
def refuse():
    return partial(refused, "bench")


@pytest.fixture
def bench():
    return partial(eectl, "bench")


def test_the_file_is_what_calibrating_on_latency_reads(bench, work, tmp_path, monkeypatch, capsys):
    path, file = work / "joint" / "model.safetensors", tmp_path / "b.json"
    out, err = bench(path, "--policy", work / "policy.json", *QUICK, "--json", "-o", file)
    found = json.loads(out)
    assert found == json.loads(file.read_text())
    assert (found["kind"], found["schema"], found["threads"]) == ("bench", 1, torch.get_num_threads())
    assert found["checkpoint"] == load_checkpoint(path).digest
    assert "CPU" in found["device"] and found["channels_last"] is True
    assert [each["batch_size"] for each in found["measured"]] == [1, 16]
    for each in found["measured"]:
        assert each["plain_seconds"] > 0 and len(each["prefix_seconds"]) == 3
        assert {entry["budget"] for entry in each["early_exit"]} == {50.0, 100.0}
        assert all(sum(entry["left"]) == each["num_rows"] for entry in each["early_exit"])
    following = err.splitlines()[-1].removeprefix("next: eectl ")
    assert following == f"calibrate-thresholds {path} --cost latency:1 --bench {file}"
    eectl(*following.split(), "-o", tmp_path / "time.json", "--device", "cpu")
    policy = json.loads((tmp_path / "time.json").read_text())
    assert policy["cost"] == "latency" and policy["plain_cost"] == round(1e9 * found["measured"][0]["plain_seconds"])
    _, err = bench(path, "--policy", work / "policy.json", "--batch-size", "16", *QUICK[2:], "-o", tmp_path / "one.json")
    assert err.splitlines()[-1] == f"next: eectl calibrate-thresholds {path} --cost latency --bench {tmp_path / 'one.json'}"
    out, err = bench(path, "--budgets", "100", *QUICK)  # calibrates on the way
    assert "batch size 16: what early exit reached" in out and "plain backbone" in out
    assert "next:" not in err


def test_budgets_that_are_out_of_reach(bench, refuse, work):
    path = work / "joint" / "model.safetensors"
    out, _ = bench(path, "--budgets", "1,100", "--batch-size", "4", *QUICK[2:], "--json")
    assert json.loads(out)["out_of_reach"] == [1.0]
    assert "no budget is within reach: leaving at the first exit costs" in refuse_after(refuse, path, "--budgets", "1", *QUICK)


def refuse_after(refuse, *arguments):
    """The last line where something was said before."""
    return refuse(*arguments).splitlines()[-1]


def test_mistakes_are_one_line(refuse, work, tmp_path):
    path = work / "joint" / "model.safetensors"
    plain = tmp_path / "plain.safetensors"
    checkpoint = load_checkpoint(path)
    bare = checkpoint.about.spec.model_copy(update={"after": (), "heads": ()})
    model = type(checkpoint.model)(checkpoint.model.backbone)
    save_checkpoint(plain, model, type(checkpoint.about)(**{**vars(checkpoint.about), "spec": bare}))
    (tmp_path / "there.json").write_text("mine")
    policy = work / "policy.json"
    cases = {
        (plain,): "has no attached exits, so there is no threshold to choose; run eectl attach-heads first",
        (path, "--batch-size", "1,x"): "--batch-size 1,x: 'x' is not a batch size; give whole numbers from 1",
        (path, "--batch-size", "1,512"): "--batch-size 512: a batch needs as many rows, and the test split has 359",
        (path, "--batch-size", "64", "--rows", "32"): "and --rows gives 32; give smaller sizes or more rows",
        (path, "--policy", policy, "--budgets", "30"): "policy.json has no thresholds for 30%",
        (path, "--policy", policy, "--criterion", "margin"): "leave out --criterion",
        (work / "other.safetensors", "--policy", policy): "policy.json was made for another checkpoint",
        (work / "other.safetensors", "--criterion", "patience"): "criterion patience compares exits",
        (path, "-o", tmp_path / "there.json"): "there.json exists; give another name, or --overwrite",
        (path, "-o", path, "--overwrite"): "is read by this command",
        (path, "--budgets", "0"): "'0' is not a budget",
    }
    for arguments, words in cases.items():
        line = refuse(*arguments)
        assert words in line and line.count("\n") == 1, line
    assert Path(tmp_path / "there.json").read_text() == "mine"
    refuse(path, "--rows", "0", code=2)


class Texts:
    """As much of a test split as choosing rows reads."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return 400


def test_rows_are_drawn_by_seed_and_texts_come_by_length():
    lengths = torch.randint(1, 30, (400,), generator=torch.Generator().manual_seed(0))
    texts, images = (SimpleNamespace(data=SimpleNamespace(splits={"test": Texts(each)})) for each in (lengths, None))
    drawn = {seed: _choose_rows(images, (1, 8), None, seed).tolist() for seed in (0, 1)}
    assert [len(set(rows)) for rows in drawn.values()] == [256, 256] and drawn[0] != drawn[1]
    by_length = _choose_rows(texts, (1, 8), None, 0)
    assert sorted(by_length.tolist()) == sorted(drawn[0])
    assert lengths[by_length].tolist() == sorted(lengths[by_length].tolist(), reverse=True)
    assert len(_choose_rows(images, (1, 150), None, 0)) == 300
    assert len(_choose_rows(images, (1, 300), None, 0)) == 400


def test_texts_of_any_length_and_a_test_split_that_is_missing(bench, refuse, tmp_path, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, TOY.name, TOY.build)
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(200, seed=1))
    data = {"name": "text", "root": str(tmp_path / "data"), "target": "mood", "tokenizer": write_tokenizer(tmp_path / "words")}
    base = {"backbone": {"name": TOY.name}, "exits": {"after": [0, 1]}, "regime": "joint", "epochs": 1, "batch_size": 16}
    train(make_recipe(base | {"data": data}, where="test"), out=tmp_path / "run", device="cpu", quiet=True)
    path = tmp_path / "run" / "model.safetensors"
    assert "text: there is no test split; add a test file beside train" in refuse(path)
    write_csv(tmp_path / "data" / "test.csv", make_rows(50, seed=2))
    out, _ = bench(path, "--budgets", "100,200", "--batch-size", "8", *QUICK[2:], "--json")
    found = json.loads(out)
    assert found["channels_last"] is False
    assert found["measured"][0]["num_rows"] in (
        32,
        40,
        48,
    )  # of the six batches of 8 that 50 rows fill, as many as there is time for


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,2", "1.5", "²", "2,2", "1000000"])
def test_batch_sizes(text):
    with pytest.raises(EectlError, match=r"^--batch-size .*: "):
        parse_batch_sizes(text)
    assert parse_batch_sizes("256, 1,32") == (1, 32, 256) == parse_batch_sizes([32, 256, 1]) and parse_batch_sizes(8) == (8,)
