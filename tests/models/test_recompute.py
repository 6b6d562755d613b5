"""Activation checkpointing: the same gradients and statistics to the bit on every kind of network."""

import pytest
import torch
from small_networks import CASES, NETWORKS, NUM_OUTPUTS, build_noisy, rows_for
from torch.nn import functional

from eectl.models.build import attach_exits
from eectl.training.gradient_dominance import gram_matrices, shared_parameters


def network(name, *, trains=(1, 2, 3), heads="auto"):
    case = CASES[name]
    backbone = build_noisy(case.name, case.args, case.shape)
    model = attach_exits(backbone, after=[0, case.depth // 2], heads=heads, num_outputs=NUM_OUTPUTS, input_shape=case.shape)
    model.set_trainable(trains, {1, 2})
    model.train_parts(trains, {1, 2})
    ran, block = [], backbone.block
    backbone.block = lambda index, hidden: ran.append(index) or block(index, hidden)
    return model, rows_for(case), ran


def losses(model, inputs, **options):
    torch.manual_seed(3)
    outputs = model(inputs, **options)
    return [functional.cross_entropy(output.logits, torch.arange(4)) for output in outputs]


def gradients(model, inputs, **options):
    sum(losses(model, inputs, **options)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_gradients_and_statistics(name):
    """Dropout, stochastic depth and BatchNorm among them; every block runs twice, the generator ends where it did."""
    plain, inputs, ran = network(name)
    expected, after = gradients(plain, inputs), torch.get_rng_state()
    model, _, again = network(name)
    model.checkpoint_activations(True)
    assert_same(gradients(model, inputs), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert sorted(again) == sorted(2 * ran) and len(ran) == model.backbone.depth


@pytest.mark.parametrize(("name", "bf16"), [("cifar", True), ("vit", True), ("bert", True), ("msdnet", False)])
@pytest.mark.parametrize("options", [{"equilibrium": True}, {"exits": [1, 2]}], ids=["equilibrium", "some"])
def test_under_equilibrium_and_autocast_and_for_some_exits(name, bf16, options):
    found = []
    for recomputes in (False, True):
        model, inputs, _ = network(name)
        model.checkpoint_activations(recomputes)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            torch.manual_seed(3)
            logits = [output.logits.float() for output in model(inputs, **options) if output is not None]
        sum(functional.cross_entropy(each, torch.arange(4)) for each in logits).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


def test_statistics_move_once_per_step_and_are_the_networks_own():
    model, inputs, _ = network("cifar")
    model.checkpoint_activations(True)
    norm = model.backbone.net.layer1[0].bn1
    own = norm.running_mean
    for step in range(1, 4):
        gradients(model, inputs)
        assert norm.num_batches_tracked == step and norm.running_mean is own


@pytest.mark.parametrize(("trains", "again"), [((2,), range(1, 9)), ((1,), range(9)), ((3,), range(5, 9)), ((), ())])
def test_frozen_blocks_run_once_unless_a_gradient_passes_them(trains, again):
    """Segments end at blocks 0, 4 and 8."""
    model, inputs, ran = network("cifar", trains=trains)
    model.checkpoint_activations(True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if model.part(name)[1] not in trains}
    gradients(model, inputs)
    assert ran[:9] == list(range(9)) and sorted(ran[9:]) == list(again)
    after = dict(model.named_buffers())
    assert_same({name: after[name] for name in before}, before)


def test_several_backward_passes_through_one_forward_pass():
    """As gradient dominance takes them: each runs the blocks that it goes through, and the last one may train."""
    plain, inputs, _ = network("cifar", heads="ztw")
    model, _, ran = network("cifar", heads="ztw")
    model.checkpoint_activations(True)
    grams, found = [], []
    for each in (plain, model):
        kept = losses(each, inputs)
        grams.append(gram_matrices(kept, shared_parameters(each)))
        sum(kept).backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert torch.equal(*grams) and grams[0].any()
    assert_same(found[1], found[0])
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert len(ran) == 9 + 1 + 5 + 9 + 9


def test_without_gradients_nothing_runs_again():
    model, inputs, ran = network("vit")
    model.checkpoint_activations(True)
    with torch.no_grad():
        losses(model, inputs)
    assert len(ran) == 3
    model.checkpoint_activations(False)
    gradients(model, inputs)
    assert len(ran) == 6
