"""Weight matching beside brute force, and permuted networks that must come back."""

from itertools import permutations, product

import pytest
import torch

from eectl.analyses.connectivity.connectivity import interpolate
from eectl.analyses.connectivity.matching import match
from eectl.analyses.connectivity.permutations import Piece, Specification, find_permutations, holding, logits_of
from tests.analyses.test_permutations import small


def two_layers(hidden=(3, 4)):
    """W1 [a, 5], W2 [b, a], W3 [2, b]: two groups."""
    a, b = hidden
    pieces = {
        "w1": (Piece((0, 0), (a, 5), ((0, a), (None, 5))),),
        "w2": (Piece((0, 0), (b, a), ((1, b), (0, a))),),
        "w3": (Piece((0, 0), (2, b), ((None, 2), (1, b))),),
    }
    return Specification(hidden, ("a", "b"), pieces, ("w1", "w2", "w3"), ())


def drawn(seed, a=3, b=4):
    torch.manual_seed(seed)
    return {"w1": torch.randn(a, 5), "w2": torch.randn(b, a), "w3": torch.randn(2, b)}


def cosine(first, second):
    one, other = (torch.cat([tensor.flatten() for tensor in weights.values()]).double() for weights in (first, second))
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_many_orders_is_the_best_there_is(seed):
    first, second = drawn(seed), drawn(seed + 10)
    best = max(
        cosine(first, {"w1": second["w1"][list(p)], "w2": second["w2"][list(q)][:, list(p)], "w3": second["w3"][:, list(q)]})
        for p, q in product(permutations(range(3)), permutations(range(4)))
    )
    spec = two_layers()
    found = match(spec, first, second, seed=0, orders=20)
    assert found.after <= best + 1e-6 and found.after == max(found.orders) and found.after >= found.before - 1e-9
    assert found.after == pytest.approx(cosine(first, spec.apply(second, found.permutations)), abs=1e-6)
    assert found.before == pytest.approx(cosine(first, second), abs=1e-6)
    lone = match(two_layers(), first, first | {"w1": first["w1"][[2, 0, 1]], "w2": first["w2"][:, [2, 0, 1]]}, seed=0)
    assert lone.after == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["cifar", "vit", "bert", "msdnet"])
def test_permuted_units_come_back(name):
    """A network and itself permuted: after matching, halfway between them is the network again."""
    model, rows = small(name, after=[0, 2])
    spec = find_permutations(model, rows[:1])
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    permuted = spec.apply(weights, spec.shuffled(torch.Generator().manual_seed(1)))
    found = match(spec, weights, permuted, seed=0)
    assert found.after == pytest.approx(1.0, abs=1e-5) and found.before < 0.9
    plain = logits_of(model, rows)
    with holding(model, interpolate(weights, spec.apply(permuted, found.permutations), 0.5)):
        assert (logits_of(model, rows) - plain).abs().max() < 1e-4
    with holding(model, interpolate(weights, permuted, 0.5)):
        assert (logits_of(model, rows) - plain).abs().max() > 1e-2
