"""Thresholds for budgets: what is promised about them holds when they are applied to the rows they were chosen on."""

import pytest
import torch
from toy_exits import toy_scored

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import CostTable, choose
from eectl.exits.thresholds import check_has_exits, choose_thresholds, notes_on_rows

COSTS = (20, 45, 103)
BUDGETS = (10.0, 30.0, 50.0, 80.0, 100.0, 200.0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seed", range(3))
def test_promises_hold(criterion, seed):
    task = CRITERIA[criterion].task.name
    scored = toy_scored(criterion=criterion, seed=seed, split="calibration", task=task)
    policies = choose_thresholds(scored, CostTable(COSTS, 100), budgets=BUDGETS)
    values = []
    for entry in policies.budgets:
        if entry.thresholds is None:
            assert entry.budget < 50
            continue
        exits = choose(scored.scores, entry.thresholds)
        assert len(set(entry.thresholds)) == 1 and len(entry.thresholds) == 2
        assert entry.mean_cost == pytest.approx(sum(COSTS[e] for e in exits.tolist()) / 200)
        assert entry.mean_cost <= entry.budget
        assert entry.value == pytest.approx(scored.outcome[exits, torch.arange(200)].mean().item())
        values.append(entry.value)
    assert policies.budgets[0].thresholds is None
    assert len(values) >= 4 and values == sorted(values, reverse=task == "regression")
    assert (policies.criterion, policies.num_rows, policies.split) == (CRITERIA[criterion], 200, "calibration")


def test_default_criterion_and_network_without_exits():
    policies = choose_thresholds(toy_scored(num_exits=1), CostTable((100,), 100), budgets=(50.0, 100.0))
    assert policies.criterion is CRITERIA["max-softmax"]
    assert [entry.thresholds for entry in policies.budgets] == [None, ()]


def test_a_network_without_exits_has_no_thresholds():
    check_has_exits(2)
    with pytest.raises(EectlError, match=r"no attached exits.* eectl attach-heads"):
        check_has_exits(1)


def test_few_rows_are_said_with_their_standard_error():
    assert notes_on_rows(toy_scored(num_rows=200, split="calibration")) == []
    few = toy_scored(num_rows=50, split="calibration")
    share = few.outcome[-1].mean().item()
    (note,) = notes_on_rows(few)
    assert "the calibration split has 50 rows, fewer than 200" in note
    assert f"a standard error of {100 * (share * (1 - share) / 50) ** 0.5:.1f} points" in note
    (note,) = notes_on_rows(toy_scored(num_rows=50, task="regression"))
    assert "MSE" in note and "points" not in note
