"""Groups of units: counted by hand, free to move in every family of networks, and no freer than that."""

from dataclasses import replace

import pytest
import torch
from small_networks import CASES, NETWORKS, NUM_OUTPUTS, build_noisy, rows_for
from torch import nn
from toy_exits import toy_model

from eectl.analyses.connectivity.permutations import (
    TOLERANCE,
    check_specification,
    difference,
    find_permutations,
    holding,
    logits_of,
)
from eectl.core.errors import EectlError
from eectl.models.build import attach_exits


def small(name, *, heads="auto", after=None):
    case = CASES[name]
    backbone = build_noisy(case.name, case.args, case.shape)
    after = range(case.depth) if after is None else after
    model = attach_exits(backbone, after=list(after), heads=heads, num_outputs=NUM_OUTPUTS, input_shape=case.shape).eval()
    return model, rows_for(case)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_networks_compute_the_same(name):
    """All groups at once, with the library's own forward as the judge; and the weights did move."""
    model, rows = small(name)
    spec = find_permutations(model, rows[:1])
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    moved = spec.apply(weights, spec.shuffled(torch.Generator().manual_seed(3)))
    plain = logits_of(model, rows)
    with holding(model, moved):
        assert difference(plain, logits_of(model, rows)) < 5e-4
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    changed = sum(not torch.equal(moved[key], weights[key]) for key in spec.learned)
    assert changed > 0.6 * len(spec.learned)


def test_resnet20_has_three_streams_and_nine_inner_widths():
    model, rows = small("cifar")
    assert sorted(find_permutations(model, rows[:1]).sizes) == sorted([16, 32, 64] + 3 * [16, 32, 64])


def test_the_layout_in_memory_changes_nothing():
    model, rows = small("cifar")
    plain = find_permutations(model, rows[:1])
    model.to(memory_format=torch.channels_last)
    assert find_permutations(model, rows[:1].contiguous(memory_format=torch.channels_last)) == plain and not plain.unknown


def test_bert_has_a_stream_a_pooler_and_four_groups_a_layer():
    """Heads, query and key dimensions, value dimensions and MLP units in each of three layers."""
    model, rows = small("bert")
    assert sorted(find_permutations(model, rows[:1]).sizes) == sorted([32, 32] + 3 * [4, 8, 8, 48])


def test_vit_has_a_stream_and_three_groups_a_layer():
    """torchvision's fused projection: a head's queries, keys and values move alike."""
    model, rows = small("vit")
    assert sorted(find_permutations(model, rows[:1]).sizes) == sorted([16] + 3 * [2, 8, 24])


def test_hidden_units_of_a_head_are_a_group():
    model, rows = small("cifar", heads="mlp-7", after=[2])
    assert list(find_permutations(model, rows[:1]).sizes).count(7) == 1


def test_a_residual_stream_is_one_group():
    """Blocks tanh(Wx + b) + x read and write one stream, so the toy has one group, its width."""
    model = toy_model(after=(0, 1))
    assert find_permutations(model, torch.randn(1, 6)).sizes == ()  # the stream is the input itself, which stays


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(dim=1).values


def test_what_no_rule_knows_stays():
    model, rows = small("cifar", after=[])
    free = find_permutations(model, rows[:1])
    model.backbone.net.layer1[0].relu = Sorted()
    pinned = find_permutations(model, rows[:1])
    assert pinned.unknown == ("sort",) and len(pinned.sizes) == len(free.sizes) - 2  # the first stream and a block's inner width
    assert check_specification(model, pinned, rows, seed=0) < TOLERANCE


def test_a_wrong_group_is_found_and_named():
    model, rows = small("cifar", after=[0])
    spec = find_permutations(model, rows[:1])
    forgotten = {name: pieces for name, pieces in spec.pieces.items() if not name.endswith("layer2.0.conv2.weight")}
    broken = replace(spec, pieces=forgotten)
    with pytest.raises(EectlError, match=r"permuting the units of .*layer2.* changed an exit's logits"):
        check_specification(model, broken, rows, seed=0)
