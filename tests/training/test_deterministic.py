"""`deterministic: true`: the same bits from a seed and after a resume, torch's settings in the run, and what has no such form."""

import os
import signal

import pytest
import torch
from conftest import small_recipe

from eectl.core.errors import EectlError, Interrupted
from eectl.core.tensor_files import read_any_tensors
from eectl.models.checkpoint import read_about
from eectl.models.heads import ExitOutput, LinearHead
from eectl.training.step import PlainStep
from eectl.training.train import train
from eectl.training.validation import Validator

RECIPE = ("deterministic=true", "epochs=3")


def weights(folder):
    return read_any_tensors(folder / "model.safetensors")[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deterministic") / "run"
    train(small_recipe(*RECIPE), out=folder, device="cpu")
    return folder


def test_the_same_bits_again(small, run, tmp_path, monkeypatch):
    seen, real = [], Validator.__call__

    def validate(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(*arguments, **options)

    monkeypatch.setattr(Validator, "__call__", validate)
    train(small("epochs=3"), out=tmp_path / "again", device="cpu", deterministic=True)
    assert same(weights(run), weights(tmp_path / "again"))
    assert seen == [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    assert read_about(run / "model.safetensors").history[-1]["deterministic"] is True


def test_a_run_that_was_stopped(small, run, tmp_path, monkeypatch):
    real, steps = PlainStep.__call__, []

    def step(*arguments, **options):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(PlainStep, "__call__", step)
    with pytest.raises(Interrupted):
        train(small(*RECIPE), out=tmp_path / "run", device="cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    train(small(*RECIPE), out=tmp_path / "run", device="cpu", resume=True)
    assert same(weights(run), weights(tmp_path / "run"))


def test_an_operation_without_a_deterministic_form_is_named(small, tmp_path, monkeypatch):
    real = LinearHead.says

    def says(self, read, earlier):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return ExitOutput(real(self, read, earlier).logits)

    monkeypatch.setattr(LinearHead, "says", says)
    with pytest.raises(EectlError, match=r"put_ has no deterministic form here; --set deterministic=false, or take another head"):
        train(small(*RECIPE, "exits.head=linear"), out=tmp_path / "run", device="cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    train(small("epochs=1", "exits.head=linear"), out=tmp_path / "other", device="cpu")  # it runs without


def test_the_precision_of_a_run(small, tmp_path):
    train(small("epochs=1", "precision=tf32"), out=tmp_path / "tf32", device="cpu")
    assert read_about(tmp_path / "tf32" / "model.safetensors").precision == "float32"  # a CPU has no TF32
    train(small("epochs=1"), out=tmp_path / "bf16", device="cpu", precision="bf16")
    about = read_about(tmp_path / "bf16" / "model.safetensors")
    assert (about.precision, about.recipe["precision"]) == ("bf16", "bf16")
    with pytest.raises(EectlError, match="precision: is 'fp8'; input should be 'auto', 'float32', 'tf32' or 'bf16'"):
        train(small(), out=tmp_path / "none", device="cpu", precision="fp8")
