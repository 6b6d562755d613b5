"""Learned weighting: the weights and the allotment by naive versions, the pseudo-step by the real step, the meta-gradient by
finite differences."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.models.losses import TASKS
from eectl.recipe.optimizer_section import OptimizerSection
from eectl.recipe.recipe import L2wSection
from eectl.recipe.regimes import REGIMES, regime_phases
from eectl.training.l2w import LearnedWeights, allot, check_phases, check_run, exit_quotas, pseudo_step
from eectl.training.network import first_network, with_exits
from eectl.training.optim import ParameterGroup, make_optimizer
from tests.toy_exits import WIDTH, toy_model

CPU = torch.device("cpu")
DOUBLE = replace(
    TASKS["classification"],
    loss=lambda logits, targets, smoothing: F.cross_entropy(logits, targets, label_smoothing=smoothing),
    losses=lambda logits, targets, smoothing: F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none"),
)
SETTINGS = {
    "sgd": OptimizerSection(name="sgd", lr=0.3, momentum=0.9, weight_decay=0.01),
    "adamw": OptimizerSection(name="adamw", lr=0.05, weight_decay=0.1),
}


def learner(num_exits=3, **settings):
    torch.manual_seed(3)
    return LearnedWeights(num_exits, L2wSection(hidden=7, **settings), device=CPU)


def half(seed, rows=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, dtype=dtype, generator=generator), torch.randint(4, (rows,), generator=generator)


def optimizer_of(model, settings):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make_optimizer([ParameterGroup(trained, settings.decay.value)], settings)


def warmed_up(name, model):
    """The model after three real steps, so that the optimizer has moments."""
    optimizer = optimizer_of(model, SETTINGS[name])
    for seed in range(3):
        inputs, targets = half(seed)
        sum(F.cross_entropy(output.logits, targets) for output in model(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.mark.parametrize("centre", ["matrix", "row"])
def test_the_weights_in_numpy(centre):
    learned, losses = learner(centre=centre, epsilon=0.8), torch.rand(5, 3)
    first, second = learned.network.first, learned.network.last
    arrays = [tensor.detach().numpy() for tensor in (first.weight, first.bias, second.weight, second.bias, losses)]
    w1, b1, w2, b2, x = arrays
    raw = np.tanh(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2)
    expected = 1 + 0.8 * (raw - (raw.mean() if centre == "matrix" else raw.mean(axis=1, keepdims=True)))
    np.testing.assert_allclose(learned.weights(losses).detach().numpy(), expected, rtol=1e-5)
    assert learned.weights(losses).mean().item() == pytest.approx(1, abs=1e-6)


def test_the_shares_of_the_exits():
    assert exit_quotas(5, 15) == pytest.approx([0.3278, 0.2458, 0.1844, 0.1383, 0.1037], abs=1e-4)
    assert exit_quotas(3, 20) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(("rows", "exits", "p"), [(64, 5, 15), (7, 3, 5), (2, 4, 15), (1, 2, 30), (50, 1, 15)])
def test_the_allotment_by_a_naive_loop(rows, exits, p):
    confidences = torch.rand(exits, rows, generator=torch.Generator().manual_seed(rows))
    taken, expected = set(), []
    for k in range(exits):
        ranked = sorted((row for row in range(rows) if row not in taken), key=lambda row: -confidences[k, row].item())
        share = (p / 20) ** (k + 1) / sum((p / 20) ** j for j in range(1, exits + 1))
        own = ranked if k == exits - 1 else ranked[: int(np.floor(rows * share))]
        taken |= set(own)
        expected.append(own)
    found = [own.tolist() for own in allot(confidences, p)]
    assert found == expected
    assert sorted(row for own in found for row in own) == list(range(rows)), "each row at one exit"


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fresh", [True, False], ids=["first-step", "later"])
def test_the_pseudo_step_is_the_optimizers_next_step(name, fresh):
    model = toy_model().double()
    optimizer = optimizer_of(model, SETTINGS[name]) if fresh else warmed_up(name, model)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    gradients[0][0] = 0  # as behind a ReLU that never fires
    moved = pseudo_step(optimizer, zip(model.named_parameters(), gradients, strict=True))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key])
        torch.testing.assert_close(moved[key], parameter.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("exits", [[1, 2, 3], [1, 2]])
def test_the_meta_gradient_by_finite_differences(name, exits):
    model = toy_model().double()
    if exits == [1, 2]:
        model.set_trainable((), {1, 2})
    optimizer, learned = warmed_up(name, model), learner(len(exits))
    learned.network.double()

    def loss():
        return learned.meta_loss(
            model, optimizer, exits, train=half(10), meta=half(11), task=DOUBLE, label_smoothing=0.1, autocast=nullcontext
        )

    parameters = list(learned.network.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), 5):
            kept, ends = flat[index].item(), []
            for shift in (1e-5, -1e-5):
                flat[index] = kept + shift
                ends.append(loss().item())
            flat[index] = kept
            assert gradient.view(-1)[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_a_meta_step_by_a_naive_version():
    """Plain SGD on a copy of the network, with the rows allotted by the loop above: the same meta loss."""
    model, learned = toy_model().double(), learner()
    learned.network.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    (x, y), (x2, y2) = half(10), half(11)
    found = learned.meta_loss(
        model, optimizer, [1, 2, 3], train=(x, y), meta=(x2, y2), task=DOUBLE, label_smoothing=0.0, autocast=nullcontext
    )
    other = copy.deepcopy(model)
    losses = torch.stack([F.cross_entropy(output.logits, y, reduction="none") for output in other(x)], dim=1)
    (learned.weights(losses).detach() * losses).mean().backward()
    torch.optim.SGD(other.parameters(), lr=0.3).step()
    logits = [output.logits for output in other(x2)]
    taken, expected = set(), 0.0
    for k, quota in enumerate([0.43243, 0.32432, 1.0]):  # (.75, .5625, .421875) / 1.734375
        ranked = logits[k].softmax(dim=1).amax(dim=1).argsort(descending=True).tolist()
        own = [row for row in ranked if row not in taken][: int(12 * quota)]
        taken |= set(own)
        expected += F.cross_entropy(logits[k][own], y2[own]).item()
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("backbone", ["resnet20", "vit"])
def test_only_the_weight_network_learns(small, backbone):
    """BatchNorm statistics and moments included; and attention, whose fused kernels have no second derivative."""
    args = {"patch_size": 4, "dim": 16, "mlp_dim": 16, "depth": 2, "heads": 2} if backbone == "vit" else {}
    recipe = small("exits.after=[0]", backbone={"name": backbone, "args": args})
    data = load_data(recipe.data, device=CPU)
    head = "sdn" if backbone == "resnet20" else "linear"
    model = with_exits(first_network(recipe, data.info), recipe.exits.model_copy(update={"head": head}), seed=0).model
    model.train_parts({1, 2}, {1})
    optimizer, learned = optimizer_of(model, OptimizerSection(lr=1e-2)), learner(2, lr=1e-2)
    images, targets = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    sum(F.cross_entropy(output.logits, targets) for output in model(images)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), learned.network.state_dict()])
    train, meta = (images[:8], targets[:8]), (images[8:], targets[8:])
    learned.learn(model, optimizer, [1, 2], train=train, meta=meta, task=TASKS["classification"], autocast=nullcontext)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before[0].items())
    moments = optimizer.state_dict()["state"]
    for index, entry in before[1]["state"].items():
        assert all(torch.equal(tensor, moments[index][key]) for key, tensor in entry.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not torch.equal(tensor, learned.network.state_dict()[name]) for name, tensor in before[2].items())


@pytest.mark.parametrize("regime", REGIMES)
def test_where_not_every_exit_takes_part_it_is_refused(regime):
    phases = regime_phases(regime, 4)
    if regime in ("joint", "mixed", "disjoint"):
        check_phases(phases, 4)
    else:
        with pytest.raises(EectlError, match=r"l2w weighs all exits at every step, which phase \d .* use regime joint, mixed or"):
            check_phases(phases, 4)


def test_what_it_cannot_do():
    check_run("classification", processes=1, batch_sizes=[2])
    with pytest.raises(EectlError, match="confidence of a classifier, and this is regression"):
        check_run("regression", processes=1, batch_sizes=[2])
    with pytest.raises(EectlError, match="l2w runs in one process, and there are 3"):
        check_run("classification", processes=3, batch_sizes=[2])
    with pytest.raises(EectlError, match="batch_size: l2w learns on each half"):
        check_run("classification", processes=1, batch_sizes=[8, 1])
