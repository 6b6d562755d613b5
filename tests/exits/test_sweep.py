"""The exact sweep against a plain loop over all thresholds, and the two ways to pick from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import ALWAYS, NEVER, BudgetPolicy, CostTable, choose
from eectl.exits.sweep import pick, pick_as_paper, sweep
from eectl.models.losses import TASKS

CLASSIFICATION, REGRESSION = TASKS["classification"], TASKS["regression"]


def naive(scores, outcome, costs):
    """(sum of outcomes, sum of costs) at every distinct threshold, by choosing anew for each."""
    edges = [ALWAYS, *sorted(set(scores[:-1][~scores[:-1].isnan() & (scores[:-1] > ALWAYS)].tolist())), NEVER]
    seen = {}
    for edge in edges:
        exits = choose(scores, [edge] * (len(scores) - 1))
        rows = torch.arange(scores.shape[1])
        seen[edge] = (outcome[exits, rows].sum().item(), sum(costs[e] for e in exits.tolist()))
    return seen


@st.composite
def problems(draw):
    num_exits, num_rows = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    value = st.one_of(
        st.integers(0, 4).map(float), st.floats(0, 1, width=32), st.sampled_from([float("nan"), float("-inf"), ALWAYS])
    )
    scores = draw(st.lists(value, min_size=num_exits * num_rows, max_size=num_exits * num_rows))
    hits = draw(st.lists(st.booleans(), min_size=num_exits * num_rows, max_size=num_exits * num_rows))
    steps = draw(st.lists(st.integers(0, 10**11), min_size=num_exits, max_size=num_exits))
    costs = [10 + sum(steps[: index + 1]) for index in range(num_exits)]
    shape = (num_exits, num_rows)
    return torch.tensor(scores).reshape(shape), torch.tensor(hits).reshape(shape).double(), costs


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_sweep_equals_the_loop(problem):
    scores, outcome, costs = problem
    points = sweep(scores, outcome, costs)
    expected = naive(scores, outcome, costs)
    for edge, (total, cost) in expected.items():
        index = points.at(edge)
        assert (points.totals[index].item(), points.costs[index].item()) == (total, cost)
    for index in range(len(points)):  # the threshold that is reported does what the point says
        exits = choose(scores, [points.threshold(index)] * (len(scores) - 1))
        assert sum(costs[e] for e in exits.tolist()) == points.costs[index].item()
        assert outcome[exits, torch.arange(scores.shape[1])].sum() == points.totals[index]
    assert points.costs.tolist() == sorted(points.costs.tolist())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 200))
def test_pick_is_best_and_a_larger_budget_is_no_worse(problem, budget):
    scores, outcome, costs = problem
    points = sweep(scores, outcome, costs)
    chosen = pick(points, [budget, budget + 30], CostTable(tuple(costs), costs[-1]), task=CLASSIFICATION)
    within = [
        (-total, cost)
        for total, cost in naive(scores, outcome, costs).values()
        if cost <= budget * costs[-1] * scores.shape[1] / 100
    ]
    assert (chosen[0].thresholds is None) == (not within)
    if within:
        total, cost = min(within)  # best first, then cheapest
        assert (chosen[0].value, chosen[0].mean_cost) == (-total / scores.shape[1], cost / scores.shape[1])
        assert chosen[1].value >= chosen[0].value


def test_by_hand():
    scores = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.6, 0.5], [0.0, 0.0, 0.0]])
    hits = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
    points = sweep(scores, hits, [10, 20, 40])
    # from the cheapest: everyone at exit 1; row 1 waits until exit 2; row 2 until the end; row 1; row 0
    assert points.costs.tolist() == [30, 40, 70, 90, 120]
    assert points.totals.tolist() == [1, 2, 3, 3, 3]
    assert [points.threshold(i) for i in range(5)] == [ALWAYS, *torch.tensor([0.2, 0.5, 0.6]).tolist(), NEVER]
    picked = pick(points, [20, 34, 60, 100, 500], CostTable((10, 20, 40), 40), task=CLASSIFICATION)
    assert [entry.budget for entry in picked] == [20, 34, 60, 100, 500]
    assert picked[1].thresholds == (torch.tensor(0.2).item(),) * 2
    assert [entry.mean_cost for entry in picked] == [None, 40 / 3, 70 / 3, 70 / 3, 70 / 3]


def test_exact_budget_is_within_it():
    points = sweep(torch.zeros(1, 7), torch.ones(1, 7).double(), [3_333_333_333])
    costs = CostTable((3_333_333_333,), 3_333_333_333)
    assert pick(points, [100], costs, task=CLASSIFICATION)[0].value == 1
    assert pick(points, [99.9999], costs, task=CLASSIFICATION) == [BudgetPolicy(99.9999, None, None, None)]
    assert CostTable((), 100).limit(29) == 29 != 0.29 * 100


def test_regression_minimises():
    outcome = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    points = sweep(torch.tensor([[0.1, 0.2], [0.0, 0.0]]), outcome, [1, 2])
    costs = CostTable((1, 2), 2)
    assert pick(points, [50, 75, 100], costs, task=REGRESSION)[0].value == 2.5
    assert pick(points, [75], costs, task=REGRESSION)[0].value == 1.0


def paper_by_loop(scores, hits, costs, budget, plain, grid):
    """The authors' rule, as their code walks it: costs for the whole grid, then the last entry before the first over budget."""
    rows, chosen = torch.arange(scores.shape[1]), None
    for threshold in grid.tolist():
        exits = choose(scores, [threshold] * (len(scores) - 1))
        cost = sum(costs[e] for e in exits.tolist()) / scores.shape[1]
        if cost > budget / 100 * plain:
            return chosen
        chosen = (threshold, hits[exits, rows].mean().item(), cost)
    return chosen


@pytest.mark.parametrize("criterion", ["max-softmax", "patience"])
@pytest.mark.parametrize("seed", range(5))
def test_paper_rule(criterion, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 40, generator=generator)
    if criterion == "patience":
        scores = torch.randint(1, 5, (5, 40), generator=generator).float()
    hits = (torch.rand(5, 40, generator=generator) < torch.linspace(0.3, 0.9, 5)[:, None]).double()
    costs, plain = [10, 25, 50, 80, 103], 100
    grid = torch.arange(5.0) if criterion == "patience" else torch.linspace(0, 1, 100)
    points = sweep(scores, hits, costs)
    budgets = [5, 10, 30, 60, 100, 103, 200]
    chosen = pick_as_paper(points, budgets, CostTable(tuple(costs), plain), criterion=CRITERIA[criterion])
    assert chosen[0].thresholds is None and chosen[-1].thresholds is not None
    for budget, entry in zip(budgets, chosen, strict=True):
        expected = paper_by_loop(scores, hits, costs, budget, plain, grid)
        assert (entry.thresholds and (entry.thresholds[0], entry.value, entry.mean_cost)) == expected
        assert entry.budget == budget and len(set(entry.thresholds or (0,))) == 1


def test_paper_has_no_rule_for_regression():
    points = sweep(torch.zeros(2, 3), torch.zeros(2, 3).double(), [1, 2])
    with pytest.raises(EectlError, match="--protocol calibrated"):
        pick_as_paper(points, [50], CostTable((1, 2), 2), criterion=CRITERIA["difference"])
