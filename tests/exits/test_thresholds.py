"""Thresholds for budgets: what is promised about them holds when they are applied to the rows they were chosen on."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from toy_exits import score, toy_outputs, toy_scored

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA
from eectl.exits.decisions import decided
from eectl.exits.policy import ALWAYS, NEVER, CostTable, choose
from eectl.exits.thresholds import check_has_exits, choose_thresholds, notes_on_rows, threshold_metric
from eectl.models.losses import TASKS

COSTS = (20, 45, 103)
BUDGETS = (10.0, 30.0, 50.0, 80.0, 100.0, 200.0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seed", range(3))
def test_promises_hold(criterion, seed):
    task = CRITERIA[criterion].task.name
    scored = toy_scored(criterion=criterion, seed=seed, split="calibration", task=task)
    policies = choose_thresholds(scored, CostTable(COSTS, 100), budgets=BUDGETS)
    assert (policies.decisions is None) == (task != "multilabel")
    scored = scored if policies.decisions is None else decided(scored, policies.decisions)
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


def uneven(num_rows=300):
    """Outputs of three classes, one of which has most rows."""
    logits, labels = toy_outputs(num_rows=num_rows, num_classes=3, seed=5)
    kept = torch.cat([(labels == each).nonzero()[:count, 0] for each, count in enumerate((90, 20, 7))])
    return score(logits[:, kept], labels[kept], split="calibration")


def test_balanced_thresholds_are_the_best_of_all_by_scikit_learn():
    scored, labels = uneven(), uneven().labels.numpy()
    costs = CostTable(COSTS, 100)
    shared = choose_thresholds(scored, costs, budgets=BUDGETS, metric="balanced")
    each_own = choose_thresholds(scored, costs, budgets=BUDGETS, metric="balanced", search="per-exit")
    plain = choose_thresholds(scored, costs, budgets=BUDGETS)
    assert (shared.metric, plain.metric) == ("balanced", "score")

    def tried(thresholds):
        exits = choose(scored.scores, thresholds).long()
        predicted = scored.values.gather(0, exits[None])[0].long().numpy()
        return balanced_accuracy_score(labels, predicted), sum(COSTS[e] for e in exits.tolist()) / len(exits)

    candidates = [ALWAYS, *scored.scores[:2].flatten().unique().tolist(), NEVER]
    found = [tried((each, each)) for each in candidates]
    better = 0
    for entry, own, score_entry in zip(shared.budgets, each_own.budgets, plain.budgets, strict=True):
        within = [value for value, cost in found if cost <= entry.budget]
        if not within:
            assert entry.thresholds is None
            continue
        assert entry.value == pytest.approx(max(within), abs=1e-6)
        assert tried(entry.thresholds) == pytest.approx((entry.value, entry.mean_cost), abs=1e-6)
        assert tried(own.thresholds)[0] >= entry.value - 1e-6 and own.mean_cost <= entry.budget
        better += tried(score_entry.thresholds)[0] < entry.value - 1e-3
    assert better  # the two differ somewhere, or nothing was tested


def test_a_metric_is_for_its_task():
    assert threshold_metric("balanced", TASKS["classification"]) == "balanced"
    for task in ("regression", "multilabel", "ordinal"):
        with pytest.raises(EectlError, match=f"balanced is for classes, and this network does {task}"):
            threshold_metric("balanced", TASKS[task])
    with pytest.raises(EectlError, match="f1"):
        threshold_metric("f1", TASKS["classification"])


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
