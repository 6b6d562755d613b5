"""`analyze gradient-dominance`: finished networks against separate backward passes, runs' curves by hand, and users' mistakes."""

import csv
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from running import eectl
from toy_text import TOY, make_rows, write_csv, write_tokenizer

from eectl.analyses.analyze import analyze
from eectl.analyses.dominance.dominance import _moments
from eectl.analyses.settings import DominanceSettings
from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.models import build as models
from eectl.models.checkpoint import load_checkpoint, save_checkpoint
from eectl.recipe.reading import make_recipe
from eectl.training.gradient_dominance import Dominance
from eectl.training.train import train
from tests.training.test_tracking import naive

QUESTION = "gradient-dominance"
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tracked joint run, and an untracked mixed one."""
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("runs")
    options = {"joint": {"track": QUESTION, "track_every": 2}, "mixed": {}}
    for regime, more in options.items():
        recipe = small_recipe(f"regime={regime}", "loss_weights=linear", "label_smoothing=0.1")
        train(recipe, out=folder / regime, device="cpu", quiet=True, **more)
    return folder


def answer(paths, out, **settings):
    more = {name: settings.pop(name) for name in ("seed", "batch_size") if name in settings}
    analyze(QUESTION, paths, out=out, device="cpu", **settings, **more)
    return json.loads((out / f"{QUESTION}.json").read_text())


def by_hand(path, split="train", train_mode=False):
    """Cosines, prefix cosines and norms over a whole split as one batch, by separate passes in float64."""
    checkpoint = load_checkpoint(path)
    data = load_data(checkpoint.about.data_spec, device=torch.device("cpu"))
    rows = data.splits[split]
    images = (rows.rows(torch.arange(len(rows))).double() / 255 - data.info.mean[0]) / data.info.std[0]
    model = checkpoint.model.double().train(train_mode)

    def losses_of(net):
        return [F.cross_entropy(output.logits, rows.labels, label_smoothing=0.1) for output in net(images)]

    return naive(model, losses_of, [1 / 6, 2 / 6, 3 / 6], [1, 2, 3])


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
def test_a_finished_network_by_separate_passes(runs, tmp_path, train_mode):
    path = runs / "joint" / "model.safetensors"
    found = answer([path], tmp_path, samples=10_000, batch_size=10_000, train_mode=train_mode)["values"]["networks"][0]
    cosine, prefix, norms = by_hand(path, train_mode=train_mode)
    within = 5e-4 if train_mode else 1e-4  # BatchNorm over few cells: float32 alone moves a cosine by 2e-4 between two layouts
    assert found["cosine"]["mean"] == pytest.approx(cosine, abs=within)
    assert found["prefix_cosine"]["mean"] == pytest.approx(prefix, abs=within)
    assert found["norms"] == [pytest.approx(row, rel=1e-3) for row in norms]
    assert found["weights"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    gram = torch.tensor(found["gram"]).sum(dim=0)
    assert gram.diagonal().sqrt().tolist() == pytest.approx([math.hypot(*row) for row in norms], rel=1e-3)
    assert found["pairs"][0][2] == pytest.approx((gram[0, 2] / (gram[0, 0] * gram[2, 2]).sqrt()).item())
    assert (found["batches"], found["rows"], found["mode"]) == (1, 150, "train" if train_mode else "eval")
    assert found["cosine"]["sd"] == [None] * 3


def test_batches_files_and_two_networks(runs, tmp_path):
    paths = [runs / regime / "model.safetensors" for regime in ("joint", "mixed")]
    before = [path.read_bytes() for path in paths]
    report = answer(paths, tmp_path, samples=100, train_mode=True)
    assert [path.read_bytes() for path in paths] == before
    assert report["settings"] == {"split": "train", "samples": 100, "train_mode": True, "tracked": False}
    assert [one["label"] for one in report["values"]["networks"]] == ["joint", "mixed"]
    for one in report["values"]["networks"]:
        assert (one["batches"], one["batch_size"], one["rows"]) == (3, 32, 96)
        assert all(0 < sd < 1 for sd in one["cosine"]["sd"])
    with open(tmp_path / f"{QUESTION}.csv", newline="") as handle:
        records = list(csv.DictReader(handle))
    networks = report["values"]["networks"]
    assert [float(record["cosine"]) for record in records] == [value for one in networks for value in one["cosine"]["mean"]]
    assert [(record["label"], record["exit"], record["after"]) for record in records[:3]] == [
        ("joint", "1", "1"), ("joint", "2", "4"), ("joint", "3", ""),
    ]  # fmt: skip
    assert (tmp_path / f"{QUESTION}.pdf").stat().st_size > 1000
    assert len(report["reading"]) == 2 and "3 batches of 32 train images in train mode" in report["reading"][1]
    again = answer(paths, tmp_path / "again", samples=100, train_mode=True)["values"]
    other = answer(paths, tmp_path / "other", samples=100, train_mode=True, seed=1)["values"]
    assert again == report["values"] and other != again
    whole = [answer(paths[:1], tmp_path / f"whole-{seed}", samples=10_000, seed=seed)["values"] for seed in (0, 1)]
    assert whole[0] != whole[1]  # the same rows in other batches: none holds neighbours, which share a class in a folder's order


def test_train_mode_leaves_the_network_as_it_was(runs, monkeypatch):
    """BatchNorm statistics and mode, under the question itself."""
    from contextlib import contextmanager

    from eectl.analyses.dominance.dominance import ask_dominance
    from eectl.analyses.question import Context, Subject
    from eectl.core.distributed import World
    from eectl.evaluation.opened import open_session

    @contextmanager
    def count(_what, _total):
        yield lambda: None

    session = open_session(runs / "joint" / "model.safetensors", world=World(0, 1, torch.device("cpu")))
    model, drawn = session.checkpoint.model, torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = ask_dominance([Subject("one", session)], DominanceSettings(samples=64, train_mode=True), Context(0, None, count))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), drawn)
    plain = ask_dominance([Subject("one", session)], DominanceSettings(samples=64), Context(0, None, count))
    assert plain.values["networks"][0]["cosine"] != found.values["networks"][0]["cosine"]


def test_mean_and_deviation_leave_out_what_has_no_direction():
    values = torch.tensor([[0.2, 0.5], [0.6, math.nan], [0.4, math.nan]], dtype=torch.float64)
    found = _moments([Dominance(row, row, row, row) for row in values], "prefix")
    assert found["mean"] == pytest.approx([0.4, 0.5])
    assert found["sd"] == pytest.approx([0.2, math.nan], nan_ok=True)


def test_an_exit_without_a_gradient_is_named_and_nothing_written(runs, tmp_path):
    checkpoint = load_checkpoint(runs / "joint" / "model.safetensors")
    for parameter in checkpoint.model.exits[1].parameters():
        parameter.data.zero_()
    path = tmp_path / "dead.safetensors"
    save_checkpoint(path, checkpoint.model, checkpoint.about)
    with pytest.raises(EectlError, match=r"dead.safetensors: exit 2's gradient on the backbone is 0 on all 4 batches"):
        answer([path], tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    for parameter in checkpoint.model.exits[1].parameters():
        parameter.data.fill_(math.nan)
    save_checkpoint(path, checkpoint.model, checkpoint.about)
    with pytest.raises(EectlError, match="the gradient of exit 2 is not finite"):
        answer([path], tmp_path / "out")


def write_metrics(folder, phases):
    """A run's metrics: {phase: [(cosines by exit number, batches)]} epoch by epoch, phase 1 without any."""
    rest = {"step": 1, "lr": 0.1, "improved": True, "seconds": 1.0}
    rest |= {name: [1.0, 1.0, 1.0] for name in ("train_loss", "validation_loss", "validation_score")}
    lines = [{"phase": 1, "epoch": 1, **rest}]
    for phase, epochs in phases.items():
        for epoch, (cosines, batches) in enumerate(epochs, 1):
            found = {
                "exits": list(cosines), "cosine": list(cosines.values()), "batches": batches, "every": 4,
                "prefix_cosine": [value and value / 0.8 for value in cosines.values()], "norms": [[1.0, 0.5, 0]] * len(cosines),
            }  # fmt: skip
            lines.append({"phase": phase, "epoch": epoch, "gradient_dominance": found, **rest})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_two_tracked_runs_by_hand(runs, tmp_path):
    for name in ("joint", "mixed"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "model.safetensors", tmp_path / name)
    write_metrics(tmp_path / "joint", {2: [({1: 0.5, 2: 0.6, 3: 0.3}, 7), ({1: 0.3, 2: 0.7, 3: 0.5}, 8)]})
    nothing = ({1: None, 2: None, 3: None}, 0)
    write_metrics(tmp_path / "mixed", {2: [({2: 0.2, 3: 0.8}, 7), nothing], 3: [({1: 0.1, 2: 0.4, 3: 0.7}, 1)]})
    report = answer([tmp_path / name / "model.safetensors" for name in ("joint", "mixed")], tmp_path / "out", tracked=True)
    joint, mixed = report["values"]["runs"]
    assert [checkpoint["splits"] for checkpoint in report["checkpoints"]] == [{}, {}]  # no rows are read, so none must agree
    assert joint["mean_cosine"] == pytest.approx([0.4, 0.65, 0.4])
    assert mixed["mean_cosine"] == pytest.approx([0.1, 0.3, 0.75])
    assert joint["mean_prefix_cosine"] == pytest.approx([0.5, 0.8125, 0.5])
    assert report["values"]["difference"] == {"mixed − joint": pytest.approx([-0.3, -0.35, 0.35])}
    assert mixed["cosine"][0] == [None, 0.2, 0.8] and mixed["phases"] == [2, 3] and mixed["epochs"] == [1, 1]
    assert report["notes"] == ["mixed: 1 of 3 epochs had no measured batch"]
    assert "exit 2 of 3 in joint (0.65), exit 3 of 3 in mixed (0.75)" in report["reading"][0]
    assert "is -0.30 for the first exit and +0.35 for the last" in report["reading"][0]
    assert "15 batches in joint, 8 batches in mixed" in report["reading"][1]


def test_tracked_while_training(runs, tmp_path):
    path = runs / "joint" / "model.safetensors"
    said, _ = eectl("analyze", QUESTION, path, "-o", tmp_path, "--tracked", "--device", "cpu")
    assert "Over the tracked epochs" in said
    found = json.loads((tmp_path / f"{QUESTION}.json").read_text())["values"]["runs"][0]
    assert found["batches"] == [2, 2] and found["every"] == [2, 2]
    logged = [json.loads(line)["gradient_dominance"] for line in (runs / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert found["cosine"] == [row["cosine"] for row in logged]


def test_mistakes_with_tracked_runs_and_samples(runs, tmp_path):
    path = runs / "mixed" / "model.safetensors"
    with pytest.raises(EectlError, match=r"metrics.jsonl: nothing was tracked; train with --track gradient-dominance"):
        answer([path], tmp_path / "out", tracked=True)
    shutil.copy(path, tmp_path / "alone.safetensors")
    with pytest.raises(EectlError, match=r"alone.safetensors: no metrics.jsonl beside it"):
        answer([tmp_path / "alone.safetensors"], tmp_path / "out", tracked=True)
    write_metrics(tmp_path, {2: [({1: None}, 0)]})
    with pytest.raises(EectlError, match="no epoch was long enough to measure a batch; train with a smaller --track-every"):
        answer([tmp_path / "alone.safetensors"], tmp_path / "out", tracked=True)
    with pytest.raises(EectlError, match="--samples 1: at least 2"):
        answer([path], tmp_path / "out", samples=1)
    with pytest.raises(EectlError, match="--batch-size 1: at least 2; BatchNorm"):
        answer([path], tmp_path / "out", batch_size=1, train_mode=True)
    with pytest.raises(EectlError, match=r"phase-1.safetensors: no exits, which gradient-dominance is about"):
        answer([runs / "mixed" / "phase-1.safetensors"], tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_regression_on_texts(tmp_path, monkeypatch):
    """Tracked in training, then measured: padding of a batch must not matter."""
    monkeypatch.setitem(models.BACKBONES, TOY.name, TOY.build)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(300, seed=1))
    data = {"name": "text", "root": str(tmp_path / "data"), "target": "score", "task": "regression", "tokenizer": tokenizer,
            "max_length": 20}  # fmt: skip
    base = {
        "data": data,
        "backbone": {"name": TOY.name},
        "exits": {"after": [0, 1]},
        "regime": "joint",
        "epochs": 1,
        "batch_size": 16,
    }
    train(make_recipe(base, where="test"), out=tmp_path / "run", device="cpu", quiet=True, track=QUESTION, track_every=3)
    path = tmp_path / "run" / "model.safetensors"
    found = answer([path], tmp_path / "out", samples=10_000, batch_size=10_000)["values"]["networks"][0]
    checkpoint = load_checkpoint(path)
    split = load_data(checkpoint.about.data_spec, device=torch.device("cpu")).splits["train"]

    def losses_of(model):  # row by row, so nothing is padded
        texts = [split.rows(torch.tensor([row])) for row in range(len(split))]
        outputs = [[output.logits.squeeze() for output in model(text)] for text in texts]
        return [F.mse_loss(torch.stack(column), split.labels) for column in zip(*outputs, strict=True)]

    cosine, prefix, norms = naive(checkpoint.model, losses_of, [1 / 3] * 3, [1, 2, 3])
    assert found["cosine"]["mean"] == pytest.approx(cosine, abs=1e-4)
    assert found["prefix_cosine"]["mean"] == pytest.approx(prefix, abs=1e-4)
    assert found["norms"] == [pytest.approx(row, rel=1e-3) for row in norms]
    tracked = answer([path], tmp_path / "tracked", tracked=True)["values"]["runs"][0]
    assert tracked["batches"] and all(value is not None for value in tracked["mean_cosine"])
