"""The learning-rate range test against a loop written out and numbers by hand."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import eectl, refused

from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import Augmenter, load_data, train_batches
from eectl.training.find_lr import find_lr, ramp_rate, read_ramp, smooth
from eectl.training.network import first_network, with_exits
from eectl.training.train import train

CPU = torch.device("cpu")


def test_the_losses_are_those_of_a_loop_by_hand(small, tmp_path):
    """Over several epochs of five batches; a resnet with BatchNorm, two exits and its head, weighted."""
    recipe = small("optimizer={name: sgd, momentum: 0}", "data.augment={}", "channels_last=false", "loss_weights=[1, 2, 5]")
    found = find_lr(recipe, steps=30, device="cpu", out=tmp_path / "lr")
    data = load_data(recipe.data, device=CPU)
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    augmenter, losses, epoch = Augmenter(data.info, recipe.data.augment, 10), [], 0
    while len(losses) < len(found.losses):
        for batch in train_batches(data.splits["train"], batch_size=32, seed=derive_seed(recipe.seed, "order", 2), epoch=epoch):
            each = [F.cross_entropy(output.logits, batch.targets) for output in model(augmenter.eval(batch.inputs))]
            loss = (each[0] + 2 * each[1] + 5 * each[2]) / 8
            rate = np.geomspace(1e-7, 10, 30)[len(losses)] if len(losses) < 30 else 0
            losses.append(loss.item())
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= float(rate) * parameter.grad
        epoch += 1
    assert found.rates == pytest.approx(np.geomspace(1e-7, 10, 30)[: len(found.rates)])
    steady = [step for step, rate in enumerate(found.rates) if rate < 0.5]  # past that rounding grows
    assert len(steady) >= 20
    assert [found.losses[step] for step in steady] == pytest.approx([losses[step] for step in steady], rel=1e-3)
    rows = list(csv.DictReader((tmp_path / "lr" / "lr.csv").open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(found.losses, rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "lr").iterdir()) == ["lr.csv", "lr.png"]
    assert found.to_json()["phase"] == 2


def test_the_average_and_the_slope_by_hand():
    rates = np.array([ramp_rate(step, 100) for step in range(100)])
    centre = np.log10(rates)
    losses = 2.3 - 1.5 / (1 + np.exp(-4 * (centre + 2)))  # falls fastest at 1e-2
    weights = [np.array([0.9**k for k in range(n)][::-1]) for n in range(1, 101)]
    by_hand = [float((w * losses[: len(w)]).sum() / w.sum()) for w in weights]
    assert smooth(losses.tolist()) == pytest.approx(by_hand)
    found = read_ramp(losses.tolist(), phase=1, num_steps=100)
    steepest = 10 + int(np.argmin(np.gradient(np.array(by_hand))[10:-1]))
    assert found.suggestion == pytest.approx(rates[steepest]) and 1e-2 < found.suggestion < 1e-1 and not found.diverged


def test_a_loss_that_grows_ends_the_ramp_and_one_that_never_falls_suggests_nothing():
    losses = [1.0] * 50 + [1.5**k for k in range(1, 20)]
    found = read_ramp(losses, phase=1, num_steps=100)
    assert found.diverged and found.suggestion is None
    assert not read_ramp(losses[:50], phase=1, num_steps=100).diverged


@pytest.mark.parametrize("more", [["regime=alternating", "ema=0.9", "accumulate=2"], ["regime=disjoint"],
                                  pytest.param(["loss_weights=l2w"], marks=pytest.mark.thorough)])  # fmt: skip
def test_every_kind_of_phase_has_one(small, more):
    found = find_lr(small(*more), steps=12, device="cpu")
    assert len(found.rates) >= 5 and all(np.isfinite(found.losses[:5]))


def test_the_command_writes_a_plot_and_nothing_else(tmp_path):
    line = ["train", "digits", "--set", "data.limit=150", "--set", "exits.after=[1]", "--find-lr", "--device", "cpu", "-q"]
    out, said = eectl(*line, "-o", "lr.svg", cwd=tmp_path, columns=80)
    assert "learning-rate range test of phase 1" in out and "next: eectl train digits --set optimizer.lr=" in said
    assert [path.name for path in tmp_path.iterdir()] == ["lr.svg"] and max(map(len, out.splitlines())) <= 80
    assert "lr.svg exists" in refused(*line, "-o", "lr.svg", cwd=tmp_path)
    assert "a plot ends in .png, .pdf, .svg" in refused(*line, "-o", "lr.jpeg", cwd=tmp_path)
    assert "--find-lr and --resume do not go together" in refused(*line, "--resume", cwd=tmp_path)


def test_a_checkpoint_to_start_from_stays_as_it_is(small, tmp_path):
    """And phase 3 tries the heads."""
    train(small("epochs=1"), out=tmp_path / "run", device="cpu", quiet=True)
    start = tmp_path / "run" / "model.safetensors"
    before = start.read_bytes()
    found = find_lr(start=start, phase=3, changes=["regime=disjoint"], steps=15, device="cpu", out=tmp_path / "lr.png")
    assert found.phase == 3 and start.read_bytes() == before
    with pytest.raises(EectlError, match="too few"):
        find_lr("digits", steps=3, device="cpu")
