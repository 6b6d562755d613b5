"""Regimes are data: each is written out by hand here for three exits, and checked for every number of exits."""

import pytest

from eectl.core.errors import EectlError
from eectl.recipe.regimes import REGIMES, phase_numbered, regime_phases

# (number, segments, heads, loss sets) for K = 3: exits 1 and 2 attached, exit 3 the network's own head
BY_HAND = {
    "disjoint": [(1, {1, 2, 3}, set(), [{3}]), (3, set(), {1, 2}, [{1, 2}])],
    "joint": [(2, {1, 2, 3}, {1, 2}, [{1, 2, 3}])],
    "mixed": [(1, {1, 2, 3}, set(), [{3}]), (2, {1, 2, 3}, {1, 2}, [{1, 2, 3}])],
    "branch-wise": [(1, {1}, {1}, [{1}]), (2, {2}, {2}, [{2}]), (3, {3}, set(), [{3}])],
    "separate": [(1, {1}, {1}, [{1}]), (2, {1, 2}, {1, 2}, [{1, 2}]), (3, {1, 2, 3}, {1, 2}, [{1, 2, 3}])],
    "alternating": [(2, {1, 2, 3}, {1, 2}, [{3}, {1, 2, 3}])],
    "mixed-gradual": [
        (1, {1, 2, 3}, set(), [{3}]),
        (2, {1, 2, 3}, {2}, [{2, 3}]),
        (3, {1, 2, 3}, {1, 2}, [{1, 2, 3}]),
    ],
}


def test_every_regime_is_checked_by_hand():
    assert set(BY_HAND) == set(REGIMES)


@pytest.mark.parametrize("name", REGIMES)
def test_phases_for_three_exits(name):
    found = [(p.number, set(p.segments), set(p.heads), [set(s) for s in p.losses]) for p in regime_phases(name, 3)]
    assert found == BY_HAND[name]


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("num_exits", [1, 2, 5, 19])
def test_what_trains_is_reached_by_a_loss(name, num_exits):
    phases = regime_phases(name, num_exits)
    for phase in phases:
        deepest = max(phase.scored, default=0)
        assert all(1 <= segment <= num_exits for segment in phase.segments)
        assert max(phase.segments, default=0) <= deepest or num_exits == 1
        assert phase.heads <= phase.scored
    if num_exits > 1:
        assert frozenset().union(*(phase.scored for phase in phases)) == set(range(1, num_exits + 1))
        assert frozenset().union(*(phase.heads for phase in phases)) == set(range(1, num_exits))


def test_only_the_backbone_phase_needs_no_heads():
    needs = {name: [phase.needs_heads(3) for phase in regime_phases(name, 3)] for name in REGIMES}
    assert needs["disjoint"] == needs["mixed"] == [False, True]
    assert needs["joint"] == needs["alternating"] == [True]
    assert needs["mixed-gradual"] == [False, True, True]
    assert needs["branch-wise"] == [True, True, False]  # the last stage trains the last segment alone


def test_phase_numbers():
    assert phase_numbered("disjoint", 3, 3).segments == set()
    assert phase_numbered("mixed", 3, 3).heads == {1, 2}  # the paper's phases chain by hand under any regime
    assert phase_numbered("separate", 3, 3).heads == {1, 2}
    with pytest.raises(EectlError, match=r"--phase 4: regime disjoint with 3 exits takes phases 1–3"):
        phase_numbered("disjoint", 3, 4)
    with pytest.raises(EectlError, match="did you mean 'disjoint'"):
        regime_phases("disjont", 3)
