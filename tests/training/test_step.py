"""Objectives in the loop: what one step does against torch written out, and runs that stop and go on."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F

from eectl.core.errors import EectlError, Interrupted
from eectl.core.seeds import derive_seed
from eectl.data import load_data, train_batches
from eectl.exits.costs import measure_costs
from eectl.models import recompute
from eectl.models.checkpoint import read_about
from eectl.models.losses import TASKS, distil
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.training.test_train import rows, same, weights

CPU = torch.device("cpu")
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2, dropout: 0.3}}"
ONE_STEP = ("optimizer={name: sgd, lr: 0.1, momentum: 0}", "schedule.name=constant", "data.augment={}", "epochs=1",
            "batch_size=1000", "channels_last=false")  # fmt: skip


def the_batch(recipe):
    """The network before the first step, and that step's images and labels."""
    data = load_data(recipe.data, device=CPU)
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    order = derive_seed(recipe.seed, "order", 2)
    batch = next(train_batches(data.splits["train"], batch_size=recipe.batch_size, seed=order, epoch=0))
    return model, (batch.inputs.float() / 255 - data.info.mean[0]) / data.info.std[0], batch.targets


def descend(model, loss):
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def assert_trained_to(path, model, start):
    found = weights(path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        error = (found[name] - tensor).float().norm()
        assert error <= 0.01 * (tensor - start[name]).float().norm() + 1e-7, (name, error)


def by_hand(objective):
    def go(model, images, labels):
        outputs = model(images)
        logits = [output.logits for output in outputs]
        descend(model, objective(model, logits, [F.cross_entropy(each, labels) for each in logits]))

    return go


def ramp_by_hand(model, _logits, losses):
    costs = measure_costs(model, (1, 8, 8))
    maxima = [(costs.exits[0] - costs.heads[0]) / costs.plain, (costs.exits[1] - sum(costs.heads)) / costs.plain]
    first, second = (min(c, 0.01 + c / 4) for c in maxima)
    return first * losses[0] + second * losses[1] + losses[2]


def distilled_by_hand(_model, logits, losses):
    lesson = distil(logits, teacher="later", temperature=2.0, task=TASKS["classification"])
    return sum(losses) / 3 + 0.7 * lesson


def two_halves(model, images, labels):
    """Learned weighting with weights that stay at 1: a plain step on each half."""
    for half, own in zip(images.chunk(2), labels.chunk(2), strict=True):
        descend(model, sum(F.cross_entropy(output.logits, own) for output in model(half)) / 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["loss_weights=linear"], by_hand(lambda _model, _logits, losses: (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6)),
        (["loss_weights=sdn-ramp", "ramp_epochs=4"], by_hand(ramp_by_hand)),
        (["distillation={teacher: later, weight: 0.7, temperature: 2.0}"], by_hand(distilled_by_hand)),
        (["loss_weights=l2w", "l2w.epsilon=1e-9"], two_halves),
    ],
    ids=["linear", "sdn-ramp", "distillation", "l2w"],
)
def test_one_step_by_hand(small, tmp_path, changes, expected):
    recipe = small(*ONE_STEP, *changes)
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    model, images, labels = the_batch(recipe)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected(model, images, labels)
    assert_trained_to(tmp_path / "run", model, start)


def test_one_step_of_gradient_equilibrium(small, tmp_path):
    """A ResNet is a chain: the first segment moves by a third of the sum's gradient, the second by half, heads by all of it."""
    recipe = small(*ONE_STEP, "loss_weights=equilibrium")
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    model, images, labels = the_batch(recipe)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sum(F.cross_entropy(output.logits, labels) for output in model(images)).backward()
    for name, parameter in model.named_parameters():
        kind, number = model.part(name)
        if kind == "segment" and number < 3:
            parameter.grad /= 4 - number
    descend(model, torch.zeros((), requires_grad=True))
    assert_trained_to(tmp_path / "run", model, start)


STOPPED = {
    "l2w": ("loss_weights=l2w", "l2w={hidden: 20, interval: 2, lr: 1e-2}", "optimizer.name=sgd"),
    "sdn-ramp": ("loss_weights=sdn-ramp", "distillation.teacher=next"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_resume_ends_in_the_same_weights(small, tmp_path, monkeypatch, name):
    """Stopped twice by a signal after five steps, within an epoch; each resume goes on from there."""
    from eectl.core.progress import Display

    recipe = small("epochs=5", "patience=5", *STOPPED[name])
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    folder, steps = tmp_path / "run", []
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", lambda _: steps.append(1) or len(steps) % 5 or os.kill(os.getpid(), signal.SIGINT))
        for _ in range(2):
            with pytest.raises(Interrupted):
                train(recipe, out=folder, device="cpu", resume=True, quiet=True)
            assert ("l2w.first.weight" in weights(folder / "resume" / "state.safetensors")) == (name == "l2w")
    assert len(steps) == 10 and len(rows(folder)) == 2
    train(recipe, out=folder, device="cpu", resume=True, quiet=True)
    assert same(weights(folder / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_learned_weighting_trains(small, tmp_path, regime):
    """And takes Mixup's soft targets."""
    changes = [f"regime={regime}", "epochs=3", "optimizer.lr=3e-3", "loss_weights=l2w", "data.augment={mixup: 0.2}"]
    train(small(*changes), out=tmp_path / "run", device="cpu", quiet=True)
    log = [row for row in rows(tmp_path / "run") if row["phase"] != 1]
    drops = [a - b for a, b in zip(log[0]["train_loss"][:2], log[-1]["train_loss"][:2], strict=True)]
    assert min(drops) > 0.1
    assert (log[0]["train_loss"][2] is None) == (regime == "disjoint")
    entry = read_about(tmp_path / "run" / "model.safetensors").history[-1]
    assert entry["loss_weights"] == "l2w"


def test_learned_weights_make_a_difference(small, tmp_path):
    found = []
    for name, change in {"weak": "l2w.epsilon=1e-9", "strong": "l2w={epsilon: 1.0, lr: 1e-1}"}.items():
        train(small("loss_weights=l2w", "epochs=1", change), out=tmp_path / name, device="cpu", quiet=True)
        found.append(weights(tmp_path / name / "model.safetensors")["backbone.net.conv1.weight"])
    assert not torch.allclose(*found, atol=1e-4)


def test_what_excludes_itself_leaves_no_folder(small, tmp_path):
    with pytest.raises(EectlError, match="l2w and distillation exclude each other"):
        small("loss_weights=l2w", "distillation.teacher=last")
    with pytest.raises(EectlError, match="l2w weighs all exits at every step, which phase 1"):
        train(small("loss_weights=l2w", "regime=branch-wise"), out=tmp_path / "run", device="cpu", quiet=True)
    with pytest.raises(EectlError, match="batch_size: l2w learns on each half"):
        train(small("loss_weights=l2w", "batch_size=1"), out=tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()
    known = "auto, uniform, linear, increasing, decreasing, sdn-ramp, equilibrium, l2w, or one number per exit"
    with pytest.raises(EectlError, match=f"is 'liner'; no such weighting .did you mean 'linear'.*; known: {known}"):
        small("loss_weights=liner")


def test_auto_is_what_the_heads_take(small, tmp_path, monkeypatch):
    from eectl.models.heads import SdnHead

    monkeypatch.setattr(SdnHead, "default_weights", "linear", raising=False)
    train(small(*ONE_STEP), out=tmp_path / "auto", device="cpu", quiet=True)
    monkeypatch.undo()
    train(small(*ONE_STEP, "loss_weights=linear"), out=tmp_path / "linear", device="cpu", quiet=True)
    train(small(*ONE_STEP), out=tmp_path / "uniform", device="cpu", quiet=True)
    auto, linear, uniform = (weights(tmp_path / name / "model.safetensors") for name in ("auto", "linear", "uniform"))
    assert same(auto, linear) and not same(auto, uniform)


@pytest.mark.parametrize(
    "changes",
    [
        ("regime=mixed", "exits.head=ztw", "data.augment={crop: 1, erasing: 0.5}"),
        (VIT, "exits.after=[0, 1]", "loss_weights=equilibrium"),
    ],
    ids=["resnet", "vit"],
)
def test_checkpointed_activations_change_no_bit(small, tmp_path, monkeypatch, changes):
    """Of the weights, BatchNorm's statistics, the metrics, and the gradient dominance that is tracked on the way."""
    checkpoint, blocks = recompute.checkpoint, []
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **more: blocks.append(1) or checkpoint(*args, **more))
    recipe = small(*changes, "epochs=1")
    for name, wanted in (("plain", False), ("again", True)):
        recipe = recipe.model_copy(update={"checkpoint_activations": wanted})
        train(recipe, out=tmp_path / name, device="cpu", quiet=True, track="gradient-dominance", track_every=2)
        assert bool(blocks) == wanted
    plain, again = (weights(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert same(again, plain)
    logs = [[row | {"seconds": 0} for row in rows(tmp_path / name)] for name in ("plain", "again")]
    assert logs[0] == logs[1] and any(row.get("gradient_dominance", {}).get("batches") for row in logs[0])


def test_what_checkpointed_activations_do_not_go_with(small):
    with pytest.raises(EectlError, match="checkpoint_activations and compile exclude each other; set one of them to false"):
        small("checkpoint_activations=true", "compile=true")
    with pytest.raises(EectlError, match="l2w differentiates its backward pass; set checkpoint_activations=false"):
        small("checkpoint_activations=true", "loss_weights=l2w")
