"""Runs with networks of timm's that are traced: stopped and resumed, in two processes, in captured and in compiled steps."""

import os
import signal

import pytest
import torch
from tape import Tape

from eectl.core.errors import Interrupted
from eectl.core.progress import Display
from eectl.training.train import train
from tests.training.test_captured import check, run
from tests.training.test_train import same, torchrun, weights

PVT = "{name: timm/pvt_v2_b0, args: {depths: [1, 1, 1, 1], embed_dims: [8, 16, 20, 16]}, drop_path: 0.2}"
STILL = PVT.replace(", drop_path: 0.2", "")  # draws nothing, and has no BatchNorm
CONVIT = "{name: timm/convit_tiny, args: {depth: 3, embed_dim: 12}, drop_path: 0.2}"  # other code in train mode
EFFICIENTFORMER = "{name: timm/efficientformerv2_s0, drop_path: 0.2}"  # keeps what follows from its weights in eval mode
MOBILEVIT = "{name: timm/mobilevit_xxs, drop_path: 0.2}"
FAMILIES = [PVT, *(pytest.param(each, marks=pytest.mark.thorough) for each in (CONVIT, EFFICIENTFORMER, MOBILEVIT))]

NAMES = ["pvt", "convit", "efficientformer", "mobilevit"]


@pytest.fixture
def tiny(small):
    """A recipe of a few steps on images of 32 pixels."""

    def make(backbone, *changes):
        own = ["data.image_size=32", "data.limit=60", "batch_size=16", "exits.after=[1]", f"backbone={backbone}"]
        return small(*own, *changes)

    return make


@pytest.mark.parametrize("backbone", FAMILIES, ids=NAMES)
def test_a_run_that_was_stopped_within_an_epoch_goes_on_to_the_same_weights(tiny, tmp_path, monkeypatch, backbone):
    recipe, steps = tiny(backbone, "regime=mixed", "epochs=2", "phases={1: {epochs: 1}}"), []
    train(recipe, out=tmp_path / "calm", device="cpu", track_to="none")

    def step(_):
        steps.append(1)
        if len(steps) == 8:  # of three an epoch: the second of the third epoch
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "step", step)
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", device="cpu", track_to="none")
    train(recipe, out=tmp_path / "run", device="cpu", track_to="none", resume=True)
    assert 9 <= len(steps) < 8 + 9
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
def test_two_processes_train_as_one_does(tiny, tmp_path):
    """The same steps but for rounding, with batches that do not divide by two."""
    recipe = tiny(STILL, "data.augment={}", "batch_size=15", "optimizer.name=sgd", "optimizer.lr=0.05")
    train(recipe, out=tmp_path / "one", device="cpu")
    done = torchrun("train", tmp_path / "one" / "recipe.yaml", "--device", "cpu", "-q", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("backbone", [CONVIT, EFFICIENTFORMER, MOBILEVIT], ids=NAMES[1:])
def test_two_processes_give_the_same_weights_twice(tiny, tmp_path, backbone):
    """With statistics of BatchNorm, and what dropping paths draws."""
    recipe = tiny(backbone, "regime=mixed", "epochs=1")
    train(recipe, out=tmp_path / "seen", device="cpu", track_to="none")
    line = ["train", tmp_path / "seen" / "recipe.yaml", "--device", "cpu", "-q", "-o"]
    for name in ("one", "two"):
        done = torchrun(*line, tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
    assert same(weights(tmp_path / "one" / "model.safetensors"), weights(tmp_path / "two" / "model.safetensors"))


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiler does not look into functions that a tape watches."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("backbone", FAMILIES, ids=NAMES)
@pytest.mark.usefixtures("uncompiled")
def test_captured_steps_give_the_bits_of_plain_ones(tiny, tmp_path, backbone):
    """EfficientFormerV2 with its channels first: last, it gives other rounding where its memory stays in place (see below)."""
    layout = ["channels_last=false"] if backbone == EFFICIENTFORMER else []
    recipe = tiny(backbone, "regime=disjoint", "epochs=2", *layout)
    assert check(recipe, tmp_path / "backbone").replays >= 3
    assert check(recipe, tmp_path / "heads", phase=1).replays >= 3  # the backbone in eval mode


@pytest.mark.thorough
@pytest.mark.usefixtures("uncompiled")
def test_captured_steps_with_channels_last_differ_by_rounding(tiny, tmp_path):
    recipe, tape = tiny(EFFICIENTFORMER, "regime=disjoint", "epochs=2", "optimizer={name: sgd, lr: 0.01}"), Tape()
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    captured, _, _ = run(recipe, tmp_path / "captured", compile=True, make_recorder=lambda _: tape)
    assert tape.replays >= 3
    for name in plain:
        torch.testing.assert_close(captured[name], plain[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("backbone", FAMILIES, ids=NAMES)
@pytest.mark.parametrize("phase", [0, 1], ids=["backbone", "heads"])
def test_steps_compile_as_a_whole(tiny, tmp_path, backbone, phase):
    recipe = tiny(backbone.replace(", drop_path: 0.2", ""), "regime=disjoint", "epochs=1")
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False, phase=phase)
    compiled, _, said = run(recipe, tmp_path / "compiled", compile=True, compiler="eager", phase=phase)
    assert not said
    drift = max((plain[name] - compiled[name]).abs().max().item() for name in plain if plain[name].is_floating_point())
    assert drift < 1e-3
