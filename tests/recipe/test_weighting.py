"""How exits are weighted, against numbers worked out by hand and a ramp written out beside it."""

import numpy as np
import pytest

from eectl.core.errors import EectlError
from eectl.recipe.weighting import WEIGHTINGS, exit_weights, ramp

KAYA = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)  # the source's C_k


@pytest.mark.parametrize(
    ("weights", "num_exits", "taking_part", "expected"),
    [
        ("uniform", 4, [2, 4], [0.5, 0.5]),
        ("linear", 4, [1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]),
        ("linear", 4, [1, 2, 3], [1 / 6, 2 / 6, 3 / 6]),
        ("linear", 4, [3, 4], [3 / 7, 4 / 7]),  # by their places in the whole network
        ("increasing", 5, [1, 2, 3, 4, 5], [0.12, 0.16, 0.20, 0.24, 0.28]),
        ("decreasing", 5, [1, 2, 3, 4, 5], [0.28, 0.24, 0.20, 0.16, 0.12]),
        ("increasing", 5, [1, 5], [0.3, 0.7]),
        ("increasing", 1, [1], [1.0]),
        ("l2w", 4, [1, 2, 3, 4], [0.25] * 4),
        ("auto", 2, [1, 2], [0.5, 0.5]),
        ("equilibrium", 3, [1, 2, 3], [1.0, 1.0, 1.0]),
        ([1, 1, 2], 3, [1, 2, 3], [0.25, 0.25, 0.5]),
        ([1, 1, 3], 3, [2, 3], [0.25, 0.75]),
    ],
)
def test_by_hand(weights, num_exits, taking_part, expected):
    assert exit_weights(weights, num_exits=num_exits, taking_part=taking_part) == pytest.approx(expected)


def test_the_slope():
    assert exit_weights("increasing", num_exits=3, taking_part=[1, 2, 3], slope=0.9) == pytest.approx([1 / 30, 1 / 3, 19 / 30])


def test_lists_that_do_not_fit():
    with pytest.raises(EectlError, match="2 numbers for 3 exits"):
        exit_weights([1, 1], num_exits=3, taking_part=[1])
    with pytest.raises(EectlError, match="all have weight 0"):
        exit_weights([1, 0], num_exits=2, taking_part=[2])


@pytest.mark.parametrize("epoch", [1, 2, 50, 93, 94, 99, 100, 137])
def test_the_ramp_of_shallow_deep_networks(epoch):
    maxima = np.array(KAYA)
    expected = np.minimum(maxima, 0.01 + epoch * (maxima / 100))
    assert ramp(KAYA, epoch / 100, num_exits=7, taking_part=range(1, 8)) == pytest.approx([*expected, 1.0])


def test_the_ramp_in_numbers():
    at = {epoch: ramp(KAYA, epoch / 100, num_exits=7, taking_part=range(1, 8)) for epoch in (1, 50, 100)}
    assert at[1] == pytest.approx([0.0115, 0.013, 0.0145, 0.016, 0.0175, 0.019, 1])
    assert at[50] == pytest.approx([0.085, 0.16, 0.235, 0.31, 0.385, 0.46, 1])
    assert at[100] == pytest.approx([*KAYA, 1])


def test_the_ramp_where_not_every_exit_takes_part():
    assert ramp(KAYA, 0.5, num_exits=7, taking_part=[2, 7]) == pytest.approx([0.16, 1])
    assert ramp(KAYA, 0.5, num_exits=7, taking_part=[7]) == [1]
    assert ramp(KAYA, 0.5, num_exits=7, taking_part=[1, 2, 6]) == [1, 1, 1]  # the source's internal classifiers alone


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_scheme_gives_each_exit_a_weight(name):
    for taking_part in ([1, 2, 3, 4], [1], [4], [2, 4]):
        weights = exit_weights(name, num_exits=4, taking_part=taking_part)
        assert len(weights) == len(taking_part) and min(weights) > 0
        if name not in ("sdn-ramp", "equilibrium"):
            assert sum(weights) == pytest.approx(1)
