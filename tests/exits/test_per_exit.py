"""A threshold for each exit against all combinations there are on tiny problems, and its promises on larger ones."""

import itertools

import numpy as np
import pytest
import torch

from eectl.exits import per_exit
from eectl.exits.policy import ALWAYS, NEVER, CostTable, choose
from eectl.exits.sweep import pick, sweep
from eectl.models.losses import TASKS

BUDGETS = (25.0, 50.0, 75.0, 100.0)
KINDS = ("classification", "regression", "patience", "broken")


def pick_per_exit(scores, outcome, costs, budgets, plain, *, task):
    """The search, with costs and task as these tests have them."""
    return per_exit.pick_per_exit(scores, outcome, CostTable(tuple(costs), plain), budgets, task=TASKS[task])


def pick_shared(scores, outcome, costs, budgets, plain, *, task):
    """The best shared threshold for each budget."""
    return pick(sweep(scores, outcome, costs), budgets, CostTable(tuple(costs), plain), task=TASKS[task])


def problem(kind, seed, num_exits, num_rows):
    """Scores, outcomes, costs and task; `broken` has NaN, −inf, ALWAYS itself and an exit at which no row can leave."""
    draw = np.random.default_rng(seed)
    shape, depth = (num_exits, num_rows), np.linspace(0.4, 0.9, num_exits)[:, None]
    scores = draw.random(shape)
    outcome = (draw.random(shape) < depth).astype(float)
    if kind == "regression":
        outcome = draw.standard_normal(shape) ** 2 * (1.2 - depth)
    if kind == "patience":
        scores = np.minimum(draw.integers(1, 4, shape), np.arange(1, num_exits + 1)[:, None])
    if kind == "broken":
        scores = np.where(draw.random(shape) < 0.3, draw.choice([np.nan, -np.inf, ALWAYS], shape), scores.round(1))
        scores[draw.integers(num_exits)] = draw.choice([np.nan, -np.inf])
    costs = np.sort(draw.integers(5, 100, num_exits)).tolist()
    task = "regression" if kind == "regression" else "classification"
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(outcome), costs, task


def given(thresholds, scores, outcome, costs):
    """(mean outcome, mean cost) by choosing."""
    exits = choose(scores, thresholds)
    return outcome[exits, torch.arange(scores.shape[1])].mean().item(), np.mean([costs[each] for each in exits.tolist()])


def every_combination(scores, outcome, costs):
    """(mean outcome, mean cost) of all combinations of distinct thresholds, by a loop that knows only the rule."""
    own = [[ALWAYS, *sorted({s for s in exit_scores.tolist() if s > ALWAYS}), NEVER] for exit_scores in scores[:-1]]
    leaves = [[exit_scores.numpy() > np.float32(t) for t in edges] for exit_scores, edges in zip(scores, own, strict=False)]
    rows, found = np.arange(scores.shape[1]), []
    for fires in itertools.product(*leaves):
        exits = np.stack([*fires, np.ones_like(rows, dtype=bool)]).argmax(axis=0)
        found.append((outcome.numpy()[exits, rows].mean(), np.array(costs)[exits].mean()))
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_all_combinations(kind):
    """Nothing beats the best of all, and on problems of this size it is found, but for one."""
    reached = total = 0
    for seed in range(25):
        num_exits = 2 + seed % 3
        scores, outcome, costs, task = problem(kind, seed, num_exits, 5 if num_exits == 4 else 8)
        sign = -1 if task == "regression" else 1
        every = every_combination(scores, outcome, costs)
        for entry in pick_per_exit(scores, outcome, costs, BUDGETS, costs[-1], task=task):
            within = sign * every[every[:, 1] <= entry.budget * costs[-1] / 100, 0]
            assert (entry.thresholds is None) == (len(within) == 0)
            if len(within):
                assert sign * entry.value <= within.max() + 1e-12
                total += 1
                reached += sign * entry.value >= within.max() - 1e-12
    assert total >= 50 and reached >= total - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_promises(kind, seed):
    scores, outcome, costs, task = problem(kind, seed, 3 + seed, 120)
    sign = -1 if task == "regression" else 1
    budgets = (20.0, 40.0, 60.0, 80.0, 100.0)
    shared = pick_shared(scores, outcome, costs, budgets, costs[-1], task=task)
    values = []
    for entry, point in zip(pick_per_exit(scores, outcome, costs, budgets, costs[-1], task=task), shared, strict=True):
        assert (entry.thresholds is None) == (point.thresholds is None)
        if entry.thresholds is None:
            continue
        assert all(ALWAYS <= each <= NEVER and each == np.float32(each) for each in entry.thresholds)
        assert given(entry.thresholds, scores, outcome, costs) == pytest.approx((entry.value, entry.mean_cost))
        assert entry.mean_cost <= entry.budget * costs[-1] / 100
        assert sign * entry.value >= sign * point.value - 1e-12
        values.append(sign * entry.value)
        for index, exit_scores in enumerate(scores[:-1]):  # and no other threshold at one exit alone would do better
            for other in (ALWAYS, *{each for each in exit_scores.tolist() if each > ALWAYS}, NEVER):
                moved = (*entry.thresholds[:index], other, *entry.thresholds[index + 1 :])
                value, cost = given(moved, scores, outcome, costs)
                assert sign * value <= sign * entry.value + 1e-12 or cost > entry.budget * costs[-1] / 100
    assert values and values == sorted(values)


def test_by_hand():
    """Exit 1 is sure and wrong, exit 2 unsure and right: one threshold for both cannot say so, two can."""
    scores = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.3, 0.2, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]])
    outcome = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).double()
    budgets = (100.0, 75.0, 50.0, 25.0, 10.0)  # in any order
    everything, more, half, cheap, none = pick_per_exit(scores, outcome, [10, 20, 40], budgets, 40, task="classification")
    assert (everything.value, everything.mean_cost, everything.thresholds) == (1, 40, (NEVER, NEVER))
    assert (half.value, half.mean_cost, half.thresholds) == (0.5, 20, (NEVER, ALWAYS))
    assert more.thresholds == half.thresholds  # 30 would let rows 2 and 3 alone leave at exit 2, and buy nothing
    assert (cheap.value, cheap.mean_cost, cheap.thresholds[0]) == (0.25, 10, ALWAYS)
    assert none.thresholds is none.value is none.mean_cost is None
    shared = pick_shared(scores, outcome, [10, 20, 40], [50.0], 40, task="classification")[0]
    assert shared.value == 0.25


def test_a_budget_may_be_spent_to_the_last():
    scores = torch.tensor([[0.95, 0.95, 0.95], [0.9, 0.5, 0.1], [0, 0, 0]])
    outcome = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
    (found,) = pick_per_exit(scores, outcome, [5, 10, 40], (50.0,), 40, task="classification")
    assert (found.value, found.mean_cost) == (1, 20) and found.thresholds == (NEVER, np.float32(0.1))
    (found,) = pick_per_exit(scores, outcome, [5, 10, 40], (49.9,), 40, task="classification")
    assert (found.value, found.mean_cost) == (2 / 3, 10)


@pytest.mark.parametrize(("kind", "seed", "hits"), [("classification", 2, (162, 194, 228)), ("patience", 4, (105, 187, 205))])
def test_seven_exits_as_good_as_it_was(kind, seed, hits):
    """Too many combinations to try; one of these hits falls if any part of the search is left out."""
    scores, outcome, costs, task = problem(kind, seed, 8, 300)
    found = pick_per_exit(scores, outcome, costs, (30.0, 50.0, 70.0), costs[-1], task=task)
    now = [round(300 * entry.value) for entry in found]
    assert all(each >= before for each, before in zip(now, hits, strict=True)), now


def test_one_exit_alone():
    scores, outcome = torch.zeros(1, 3), torch.tensor([[1.0, 0, 1]]).double()
    found = pick_per_exit(scores, outcome, [100], (50.0, 100.0), 100, task="classification")
    assert [entry.thresholds for entry in found] == [None, ()] and found[1].value == pytest.approx(2 / 3)


def test_exits_that_do_not_differ():
    """Nothing to gain, and costs that do not rise: no price tells settings apart."""
    scores, outcome = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)), torch.ones(3, 10).double()
    found = pick_per_exit(scores, outcome, [10, 10, 10], (99.0, 100.0), 10, task="classification")
    assert found[0].thresholds is None and (found[1].value, found[1].mean_cost) == (1, 10)
