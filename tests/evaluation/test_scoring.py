"""Policies on the test split: counts and costs by hand, honesty about overshoot, refusal to test on calibration rows."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from toy_exits import TOY_COSTS, TOY_ORIGIN, score, toy_outputs, toy_scored

from eectl.core.errors import EectlError
from eectl.core.json_files import clean_json
from eectl.evaluation import scoring
from eectl.evaluation.scoring import score_as_paper
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import ALWAYS, NEVER, BudgetPolicy, CostTable, Policies, choose
from eectl.exits.sweep import sweep
from eectl.exits.thresholds import choose_thresholds
from eectl.models.losses import TASKS


def score_policies(scored, policies, costs=TOY_COSTS):
    """The policies' scores, of a network that came from nowhere."""
    return scoring.score_policies(scored, policies, costs, origin=TOY_ORIGIN)


def policies_of(*entries, criterion="max-softmax", task="classification"):
    budgets = tuple(BudgetPolicy(budget, thresholds, 0.0, 0.0) for budget, thresholds in entries)
    return Policies(
        "digest", TASKS[task], CRITERIA[criterion], "calibration", "another split", 10, (20, 45, 110), 100, budgets, "shared",
        "macs", None,
    )  # fmt: skip


def by_hand():
    """Four rows of class 0 whose confidences at exits 1 and 2 are known; exit 1 is wrong on rows 2 and 3."""
    first = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    second = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.6, 0.4]])
    third = torch.tensor([[0.9, 0.1]] * 4)
    return score(torch.stack([first, second, third]).log(), torch.zeros(4).long())


def test_by_hand():
    result = score_policies(by_hand(), policies_of((40.0, (0.65, 0.7)), (90.0, (NEVER, ALWAYS)), (10.0, None)))
    one, two, three, unlimited = result.budgets
    assert one.left == (2, 1, 1) and one.value == 0.75  # row 2 leaves at exit 1 and is wrong
    assert one.mean_cost == (20 + 20 + 45 + 110) / 4 and one.is_over
    assert one.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert two.left == (0, 4, 0) and two.value == 1 and two.mean_cost == 45 and not two.is_over
    assert (three.budget, three.value, three.left, three.is_over) == (10, None, None, False)
    assert unlimited.budget is None and unlimited.left == (0, 0, 4) and unlimited.mean_cost == 110 and not unlimited.is_over
    assert [entry.value for entry in result.exits] == [0.5, 1, 1] and [entry.cost for entry in result.exits] == [20, 45, 110]
    assert result.dead == () and result.num_rows == 4


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_what_counts_classes_alike_is_scikit_learns():
    logits, labels = toy_outputs(num_rows=120, num_classes=5, seed=3)
    kept = ((labels != 4) & ((labels != 2) | (torch.arange(120) % 9 == 0))).nonzero()[:, 0]  # no row of 4, few of 2
    scored = score(logits[:, kept], labels[kept])
    result = score_policies(scored, policies_of((50.0, (0.6, 0.6)), (10.0, None)))
    truth = scored.labels.numpy()
    taken = choose(scored.scores, (0.6, 0.6)).long()
    rows = [*(scored.values[k] for k in range(3)), scored.values.gather(0, taken[None])[0], scored.values[2]]
    entries = [*result.exits, result.budgets[0], result.budgets[2]]
    for entry, predicted in zip(entries, rows, strict=True):
        assert entry.balanced == pytest.approx(balanced_accuracy_score(truth, predicted.long().numpy()))
        assert entry.macro_f1 == pytest.approx(f1_score(truth, predicted.long().numpy(), average="macro"))
    assert result.budgets[1].balanced is None and result.to_json()["exits"][0]["macro_f1"] == result.exits[0].macro_f1


def test_dead_exits():
    assert score_policies(by_hand(), policies_of((90.0, (NEVER, ALWAYS)))).dead == (1,)
    assert score_policies(by_hand(), policies_of((90.0, (NEVER, NEVER)))).dead == (1, 2)
    assert score_policies(by_hand(), policies_of((90.0, (NEVER, ALWAYS)), (30.0, (ALWAYS, NEVER)))).dead == ()
    assert score_policies(by_hand(), policies_of((10.0, None))).dead == ()


def test_regression():
    labels = torch.tensor([1.0, 2.0])
    logits = torch.tensor([[3.0, 2.0], [3.0, 4.0], [1.0, 2.5]])[:, :, None]
    scored = score(logits, labels, task="regression")
    result = score_policies(scored, policies_of((50.0, (-1.0, -1.0)), criterion="difference", task="regression"))
    assert [entry.value for entry in result.exits] == [2, 4, 0.125]
    assert result.budgets[0].left == (0, 1, 1) and result.budgets[0].value == (4 + 0.25) / 2


def test_correlations_by_hand():
    labels = torch.tensor([1.0, 2.0, 3.0, 10.0])
    logits = torch.tensor([[5.0, 5.0, 5.0, 5.0], [4.0, 3.0, 2.0, -5.0], [1.0, 3.0, 2.0, 4.0]])[:, :, None]
    scored = score(logits, labels, task="regression")
    policies = policies_of((50.0, (-1.5, -1.5)), criterion="difference", task="regression")  # only row 0 leaves at exit 2
    result = score_policies(scored, policies)
    first, second, third = result.exits
    assert math.isnan(first.pearson) and math.isnan(first.spearman)
    assert (second.pearson, second.spearman) == (pytest.approx(-1), pytest.approx(-1))  # 5 − label
    # labels − 4: −3 −2 −1 6; outputs − 2.5: −1.5 0.5 −0.5 1.5; Spearman: 1 − 6·(0 + 1 + 1 + 0) / (4·15)
    assert third.pearson == pytest.approx((4.5 - 1 + 0.5 + 9) / math.sqrt(50 * 5)) and third.spearman == pytest.approx(0.8)
    assert result.budgets[0].left == (0, 1, 3)
    mixed = np.corrcoef([4, 3, 2, 4], labels)[0, 1]
    assert result.budgets[0].pearson == pytest.approx(mixed) and result.budgets[1].pearson == third.pearson
    assert score_policies(by_hand(), policies_of((40.0, (0.5, 0.5)))).exits[0].pearson is None


def test_refusals():
    test = by_hand()
    with pytest.raises(EectlError, match="chosen on the rows they would be tested on"):
        score_policies(replace(test, made=replace(test.made, fingerprint="another split")), policies_of((40.0, (0.5, 0.5))))
    with pytest.raises(EectlError, match="for classification with 3 exits, the network does classification with 2"):
        score_policies(replace(test, scores=test.scores[:2]), policies_of((40.0, (0.5, 0.5))), CostTable((20, 110), 100))
    with pytest.raises(EectlError, match="are for regression"):
        score_policies(test, policies_of((40.0, (0.5, 0.5)), task="regression"))


@pytest.mark.parametrize("criterion", ["max-softmax", "entropy", "margin", "patience"])
def test_both_protocols_on_toys(criterion):
    calibration = toy_scored(criterion=criterion, seed=1, split="calibration")
    test = toy_scored(criterion=criterion, seed=2)
    budgets = (10.0, 55.0, 70.0, 100.0)
    policies = choose_thresholds(calibration, TOY_COSTS, budgets=budgets)
    paper = score_as_paper(test, TOY_COSTS, budgets=budgets, origin=TOY_ORIGIN)
    for result in (score_policies(test, policies), paper):
        assert [entry.budget for entry in result.budgets] == [*budgets, None]
        assert [entry.value is None for entry in result.budgets] == [True, False, False, False, False]
        assert all(sum(entry.left) == 200 for entry in result.budgets[1:])
        assert all(entry.mean_cost == sum(map(int.__mul__, entry.left, (20, 45, 110))) / 200 for entry in result.budgets[1:])
        assert result.budgets[-1].value == result.exits[-1].value
        text = json.dumps(clean_json(result.to_json()), allow_nan=False)
        assert json.loads(text)["kind"] == "evaluation" and json.loads(text)["schema"] == 1
    assert result.protocol == "paper" and not any(entry.is_over for entry in result.budgets)


def test_points_hold_every_policy():
    test = toy_scored(criterion="margin", seed=2)
    points = sweep(test.scores, test.outcome, TOY_COSTS.exits)
    result = score_policies(test, policies_of((60.0, (0.7, 0.7)), criterion="margin"))
    point = points.policy(points.at(0.7), 60.0)
    assert (point.value, point.mean_cost) == (result.budgets[0].value, result.budgets[0].mean_cost)


def test_network_without_exits():
    test = toy_scored(num_exits=1)
    calibration = toy_scored(num_exits=1, seed=3, split="calibration")
    costs = CostTable((100,), 100)
    result = score_policies(test, choose_thresholds(calibration, costs, budgets=(50.0, 100.0)), costs)
    assert [entry.left for entry in result.budgets] == [None, (200,), (200,)] and result.dead == ()
