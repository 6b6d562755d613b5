"""Steps whose rows pass in pieces, against torch's own losses of the whole batch; alone and in two processes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from eectl.core.capture import Capture
from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.training.feed import training_data
from eectl.training.network import first_network, planned_phases, resolve, with_exits
from eectl.training.phase import EpochSums, phase_settings, start_progress
from eectl.training.running import RunningNetwork, make_execution
from eectl.training.step import PlainStep
from eectl.training.train import train
from tests.training.test_train import rows, torchrun, weights

CPU = torch.device("cpu")
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"  # no BatchNorm
SGD = "optimizer={name: sgd, lr: 0.1, momentum: 0}"


def test_a_phase_may_have_pieces_of_its_own(small):
    """As it may have rows of its own; what does not fit is refused with the keys that say so."""
    recipe = small("regime=disjoint", "accumulate=2", "phases={3: {accumulate: 8, batch_size: 16}}")
    data = load_data(recipe.data, device=CPU)
    network = first_network(recipe, data.info)
    recipe = resolve(recipe, network)
    model = with_exits(network, recipe.exits, seed=0).model
    found = [phase_settings(recipe, each, model, training_data(data), num_processes=1) for each in planned_phases(recipe)]
    assert [(each.accumulate, each.batch_size) for each in found] == [(2, 32), (8, 16)]
    for phase, says in {
        "{batch_size: 1}": "accumulate is 2, and phases.3.batch_size only 1",
        "{accumulate: 33}": "phases.3.accumulate is 33, and batch_size only 32",
        "{accumulate: 3, batch_size: 2}": "phases.3.accumulate is 3, and phases.3.batch_size only 2",
    }.items():
        with pytest.raises(EectlError, match=says):
            small("accumulate=2", f"phases={{3: {phase}}}")
    with pytest.raises(EectlError, match="l2w takes each batch in two halves"):
        small("loss_weights=l2w", "phases={3: {accumulate: 2}}")


def stepped(recipe, inputs, targets, *, accumulate):
    """The weights before and after a step in float64, as the loop would take it, and the network."""
    data = load_data(recipe.data, device=CPU)
    network, known = first_network(recipe, data.info), training_data(data)
    recipe = resolve(recipe, network)
    model = with_exits(network, recipe.exits, seed=0).model.double()
    (phase,) = planned_phases(recipe)
    settings = phase_settings(recipe, phase, model, known, num_processes=1)
    settings = replace(settings, accumulate=accumulate, rows_per_step=len(inputs))
    model.set_trainable(phase.segments, phase.heads)
    model.train_parts(phase.segments, phase.heads)
    progress, sums = start_progress(model, settings, CPU), EpochSums(model.num_exits, CPU)
    net = RunningNetwork(model, make_execution(recipe, model.backbone, CPU), Capture(None))
    (wanted,) = settings.objective.loss_sets(phase, 0, device=CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = PlainStep(net, settings, progress.optimizer, sums, wanted, average=None, num_processes=1)
    if step._class_weights is not None:
        step._class_weights, step._total = torch.tensor(settings.objective.class_weights).double(), step._total.double()
    step(wanted, inputs, targets)
    return before, model, sums.take()["train_loss"], settings.objective.class_weights


@pytest.mark.parametrize("accumulate", [1, 4, 37])
@pytest.mark.parametrize("more", [[], ["class_weights=balanced", "label_smoothing=0.1"]], ids=["alike", "weighted"])
def test_a_step_in_pieces_is_torchs_step_of_the_whole_batch(small, monkeypatch, accumulate, more):
    """37 rows: pieces of 10, 9, 9 and 9. Losses are taken in float32, which here is float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    recipe = small(VIT, "exits.after=[0]", SGD, "data.augment={}", "channels_last=false", *more)
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(37, 1, 8, 8, generator=generator).double(), torch.randint(10, (37,), generator=generator)
    before, model, said, by_class = stepped(recipe, inputs, targets, accumulate=accumulate)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(before)
    by_class = None if by_class is None else torch.tensor(by_class).double()
    loss = nn.CrossEntropyLoss(weight=by_class, label_smoothing=recipe.label_smoothing)
    losses = [loss(output.logits, targets) for output in model(inputs)]
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], before[name] - 0.1 * parameter.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert said == pytest.approx([each.item() for each in losses], rel=1e-12)


def test_what_exits_learn_from_each_other_is_a_mean_over_all_pieces(small, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(11, 1, 8, 8, generator=generator).double(), torch.randint(10, (11,), generator=generator)
    for more in (["distillation.teacher=later"], ["exits.head=gpf-8", "loss_weights=equilibrium"]):
        recipe = small(VIT, "exits.after=[0, 1]", SGD, "data.augment={}", "channels_last=false", *more)
        whole, pieces = (stepped(recipe, inputs, targets, accumulate=number)[1].state_dict() for number in (1, 3))
        for name, tensor in whole.items():
            torch.testing.assert_close(pieces[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_in_pieces_train_as_one_does_with_whole_batches(small, tmp_path):
    """31 rows a batch divide neither by 2 nor by 3. With all else that a step may have: the average of the weights, rows that
    count by their class, rates by layer, and a block that does not train."""
    changes = ["data.augment={}", VIT, "exits.after=[0]", "epochs=2", "batch_size=31", "optimizer.name=sgd", "optimizer.lr=0.05",
               "ema=0.9", "class_weights=balanced",
               "optimizer.layer_decay=0.8", "optimizer.weight_decay={value: 0.1}", "freeze_until=0"]  # fmt: skip
    train(small(*changes), out=tmp_path / "one", device="cpu", quiet=True)
    line = ["train", tmp_path / "one" / "recipe.yaml", "--set", "accumulate=3", "--device", "cpu", "-q", "-o", tmp_path / "two"]
    done = torchrun(*line)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        assert other["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-4)


def test_what_pieces_do_not_go_with(small, tmp_path):
    with pytest.raises(EectlError, match="accumulate is 33, and batch_size only 32; a piece has at least a row"):
        small("accumulate=33")
    with pytest.raises(EectlError, match=r"accumulate is 4, and phases\.2\.batch_size only 3"):
        small("accumulate=4", "phases={2: {batch_size: 3}}")
    with pytest.raises(EectlError, match="l2w differentiates a step of AdamW or SGD"):
        small("optimizer.name=lion", "loss_weights=l2w")
    with pytest.raises(EectlError, match="l2w takes each batch in two halves of its own; set accumulate=1"):
        small("accumulate=2", "loss_weights=l2w")
    with pytest.raises(EectlError, match=r"batch_size 8 and accumulate 8 leave a process one image .* or lower accumulate"):
        train(small("batch_size=8", "accumulate=8", "backbone={name: timm/test_resnet}", "exits.after=[1]", "exits.head=linear"),
              out=tmp_path / "run", device="cpu", quiet=True)  # fmt: skip
