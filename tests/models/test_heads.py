"""Exit heads by hand-counted numbers."""

import pytest
import torch

from eectl.core.errors import EectlError
from eectl.models.backbone import MapFeature, TokenFeature
from eectl.models.heads import make_head


def test_linear_reads_the_class_token_or_the_mean() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]]])
    for feature, expected in [
        (TokenFeature(tokens, (1, 2)), [1.0, 2.0]),
        (TokenFeature(tokens, (1, 2), has_cls=False), [4.0, 2.0]),
        (TokenFeature(tokens, (1, 1), prefix=2), [1.0, 2.0]),
        (MapFeature(tokens.transpose(1, 2)[..., None]), [3.0, 2.0]),
    ]:
        head = make_head("linear", feature, 2)
        with torch.no_grad():
            head.fc.weight.copy_(torch.eye(2))
            head.fc.bias.zero_()
        assert head(feature, []).logits.tolist() == [expected]


def test_token_maps_are_in_reading_order() -> None:
    tokens = torch.arange(7.0).reshape(1, 7, 1)  # one special token, then a grid of 2 × 3
    assert TokenFeature(tokens, (2, 3)).map().tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


def test_sdn_mixes_max_and_mean_over_a_4_by_4_grid() -> None:
    feature = MapFeature(torch.arange(64.0).reshape(1, 1, 8, 8))
    head = make_head("sdn", feature, 16)
    with torch.no_grad():
        head.fc.weight.copy_(torch.eye(16))
        head.fc.bias.zero_()
        head.mix.fill_(-0.5)  # not clamped
        logits = head(feature, []).logits
    assert logits[0, 0] == -0.5 * 9 + 1.5 * 4.5  # cells 0, 1, 8, 9
    assert logits[0, 15] == -0.5 * 63 + 1.5 * 58.5


def test_sdn_repeats_the_cells_of_a_small_map_and_learns_its_mix() -> None:
    feature = MapFeature(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    head = make_head("sdn", feature, 3)
    assert head.fc.in_features == 16
    head(MapFeature(torch.randn(2, 1, 9, 9)), []).logits.sum().backward()
    assert head.mix.grad is not None and head.mix.grad != 0
    starts = torch.tensor([make_head("sdn", feature, 1).mix.item() for _ in range(400)])
    assert 0 <= starts.min() < 0.1 and 0.9 < starts.max() < 1 and abs(starts.mean() - 0.5) < 0.06


def test_mlp_has_the_width_of_its_name() -> None:
    feature = MapFeature(torch.randn(2, 3, 4, 4))
    head = make_head("mlp-11", feature, 5)
    assert [tuple(p.shape) for p in head.parameters()] == [(11, 3), (11,), (5, 11), (5,)]
    hidden = torch.nn.functional.gelu(head.fc1(feature.pooled()))
    assert torch.equal(head(feature, []).logits, head.fc2(hidden))
    assert head.kind == "mlp-11"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mlp-0", "mlp-0'.*mlp-1024"),
        ("mlp-x", "mlp-x"),
        ("mlp--3", "mlp--3"),
        ("mlp-WIDTH", "mlp-WIDTH'.*mlp-1024"),
        ("mlp", "known: linear, mlp-WIDTH, sdn"),
        ("liner", "'liner'.*'linear'"),
    ],
)
def test_unknown_kinds_are_the_users_mistake(kind: str, says: str) -> None:
    with pytest.raises(EectlError, match=says):
        make_head(kind, MapFeature(torch.zeros(1, 2, 4, 4)), 3)
