"""Thresholds for budgets: what is promised about them holds when they are applied to the rows they were chosen on."""

import pytest
import torch
from toy_exits import toy_scored

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import choose
from eectl.exits.thresholds import calibrate, check_request

COSTS, PLAIN = (20, 45, 103), 100
BUDGETS = (10.0, 30.0, 50.0, 80.0, 100.0, 200.0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seed", range(3))
def test_promises_hold(criterion, seed):
    task = CRITERIA[criterion].task
    scored = toy_scored(criterion=criterion, seed=seed, split="calibration", task=task)
    policies = calibrate(scored, exit_costs=COSTS, plain_cost=PLAIN, budgets=BUDGETS)
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
    assert (policies.criterion, policies.num_rows, policies.split) == (criterion, 200, "calibration")


def test_default_criterion_and_network_without_exits():
    policies = calibrate(toy_scored(num_exits=1), exit_costs=(100,), plain_cost=100, budgets=(50.0, 100.0))
    assert policies.criterion == "max-softmax"
    assert [entry.thresholds for entry in policies.budgets] == [None, ()]


def test_check_request():
    check_request(None, task="classification", num_exits=2)
    with pytest.raises(EectlError, match=r"no attached exits.* eectl attach-heads"):
        check_request(None, task="classification", num_exits=1)
    with pytest.raises(EectlError, match="needs two attached ones"):
        check_request("patience", task="classification", num_exits=2)
