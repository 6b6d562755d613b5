"""Gradient equilibrium: its exact factors on a chain, and on MSDNet against a backward pass done piece by piece by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from eectl.models.backbone import Hidden
from eectl.models.build import attach_exits, build_backbone
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection
from tests.toy_exits import WIDTH, CascadeHead, toy_model

Gradients = dict[str, Tensor]


def backward(model: MultiExitModel, inputs: Tensor, exits: list[int] | None = None, run=None, **options: bool) -> Gradients:
    """Every parameter's gradient of the plain sum of the exits' losses, all for class 1."""
    model.zero_grad(set_to_none=True)
    outputs = (model if run is None else run)(inputs, exits, **options)
    targets = torch.ones(len(inputs), dtype=torch.long)
    sum(functional.cross_entropy(output.logits, targets) for output in outputs if output is not None).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("exits", "segments"), [(None, [1 / 3, 1 / 2, 1]), ([1, 3], [1 / 2, 1, 1]), ([2, 3], [1 / 2, 1 / 2, 1]), ([3], [1, 1, 1])]
)
def test_the_factors_on_a_chain(exits: list[int] | None, segments: list[float]) -> None:
    model, inputs = toy_model().double(), torch.randn(5, WIDTH, dtype=torch.float64)
    plain, rescaled = (backward(model, inputs, exits, equilibrium=on) for on in (False, True))
    assert plain.keys() == rescaled.keys() and len(plain) >= 8
    for name, gradient in rescaled.items():
        kind, number = model.part(name)
        own_head = name.startswith("backbone.net.fc")
        factor = 1 if kind == "head" or own_head else segments[number - 1]
        torch.testing.assert_close(gradient, factor * plain[name], rtol=1e-6, atol=0, msg=name)


def by_pieces(model: MultiExitModel, inputs: Tensor) -> Gradients:
    """The source's rule with no rescaling op: each segment and head is differentiated alone, and what flows between them is
    scaled by hand: through the coarsest scale (what the head sends back + (rest - 1) · what comes from behind) / rest."""
    hidden, ends, starts = Hidden(inputs), [], []
    for number in range(1, model.num_exits + 1):
        start = inputs if number == 1 else Hidden(tuple(x.detach().requires_grad_() for x in hidden.x))
        hidden = model.advance(start, number)
        starts.append(start)
        ends.append(hidden)
    found: Gradients = {}
    behind: tuple[Tensor | None, ...] = ()
    targets = torch.ones(len(inputs), dtype=torch.long)
    parameters = dict(model.named_parameters())
    for number in range(model.num_exits, 0, -1):
        rest = model.num_exits - number + 1
        seen = Hidden(tuple(x.detach().requires_grad_() for x in ends[number - 1].x))
        loss = functional.cross_entropy(model.leave(seen, number).logits, targets)
        own = [name for name in parameters if model.part(name) == ("head", number)] or [
            name for name in parameters if "classifier" in name
        ]
        *for_head, from_head = torch.autograd.grad(loss, [*(parameters[name] for name in own), seen.x[-1]])
        found |= dict(zip(own, for_head, strict=True))
        coarsest = from_head if not behind else (from_head + (rest - 1) * behind[-1]) / rest
        back = [*behind[:-1], coarsest]
        pairs = [(x, g) for x, g in zip(ends[number - 1].x, back, strict=True) if g is not None]
        segment = [name for name in parameters if model.part(name) == ("segment", number) and "classifier" not in name]
        before = [] if number == 1 else list(starts[number - 1].x)
        given = torch.autograd.grad(
            [x for x, _ in pairs], [*(parameters[n] for n in segment), *before], [g for _, g in pairs], allow_unused=True
        )
        found |= {name: g for name, g in zip(segment, given, strict=False) if g is not None}
        behind = tuple(given[len(segment) :])
    return found


def test_msdnet_against_a_backward_pass_by_hand() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSection(name="msdnet", args={"blocks": 3, "base": 2}), input_shape=(3, 8, 8), num_outputs=5)
    model = attach_exits(backbone, after=[1, 3, 5], heads="auto", num_outputs=5, input_shape=(3, 8, 8)).double().train()
    inputs = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    expected, found, plain = (
        by_pieces(model, inputs),
        backward(model, inputs, equilibrium=True),
        backward(model, inputs, equilibrium=False),
    )
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-12, msg=name)
    ratios = [(found[name].norm() / plain[name].norm()).item() for name in found if model.part(name) == ("segment", 1)]
    assert max(ratios) - min(ratios) > 0.05, "on several scales equilibrium is no constant factor"


def test_it_changes_no_value_and_is_no_part_of_the_state() -> None:
    model, inputs = toy_model(CascadeHead), torch.randn(5, WIDTH)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, rescaled = (model(inputs, equilibrium=on) for on in (False, True))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(plain, rescaled, strict=True))
    assert before.keys() == model.state_dict().keys()


def test_under_autocast() -> None:
    model, inputs = toy_model(), torch.randn(5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        plain, rescaled = (backward(model, inputs, equilibrium=on) for on in (False, True))
    for name, factor in {"backbone.net.b0.weight": 1 / 3, "backbone.net.b1.weight": 1 / 2, "exits.0.fc.weight": 1}.items():
        torch.testing.assert_close(rescaled[name], factor * plain[name], rtol=0.05, atol=0.01, msg=name)


@pytest.mark.slow
def test_compiled() -> None:
    model, inputs = toy_model(), torch.randn(5, WIDTH)
    expected = backward(model, inputs, equilibrium=True)
    found = backward(model, inputs, run=torch.compile(model, backend="aot_eager"), equilibrium=True)
    assert all(torch.allclose(found[name], expected[name]) for name in expected)


def test_in_data_parallel() -> None:
    model, inputs = toy_model(), torch.randn(5, WIDTH)
    expected = backward(model, inputs, equilibrium=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = backward(model, inputs, run=nn.parallel.DistributedDataParallel(model), equilibrium=True)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
