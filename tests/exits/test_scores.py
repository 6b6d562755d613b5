"""What is kept of outputs: against plain loops over whole tensors, whatever the rows come in."""

import math
from itertools import pairwise

import pytest
import torch
from toy_exits import score, toy_outputs

from eectl.core.errors import EectlError
from eectl.exits.criteria import find_criterion
from eectl.exits.scores import reduce_rows
from eectl.exits.sweep import sweep
from eectl.models.losses import TASKS

CRITERIA = ["max-softmax", "entropy", "margin", "patience", "difference", "difference-2"]


def task_of(criterion):
    return "regression" if criterion.startswith("difference") else "classification"


def naive_scores(logits, criterion):
    """Scores [exit, row] from all logits at once, the rules that compare exits row by row."""
    probabilities = logits.softmax(dim=2)
    if criterion == "max-softmax":
        return probabilities.amax(dim=2)
    if criterion == "entropy":
        return 1 + (probabilities * probabilities.log()).sum(dim=2) / math.log(logits.shape[2])
    if criterion == "margin":
        best = probabilities.sort(dim=2).values
        return best[:, :, -1] - best[:, :, -2]
    scores = torch.empty(logits.shape[:2])
    for row in range(logits.shape[1]):
        seen = (logits[:, row].argmax(dim=1) if criterion == "patience" else logits[:, row, 0]).tolist()
        changes = [abs(b - a) for a, b in pairwise(seen)]
        for k in range(len(logits)):
            if criterion == "patience":
                scores[k, row] = next((n for n in range(1, k + 1) if seen[k - n] != seen[k]), k + 1)
            else:
                num_changes = int(criterion.partition("-")[2] or 1)
                scores[k, row] = -max(changes[k - num_changes : k]) if k >= num_changes else -math.inf
    return scores


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("num_rows", "num_exits", "num_classes"), [(1, 4, 3), (61, 4, 7), (23, 5, 1000)])
def test_against_whole_tensors(criterion, num_rows, num_exits, num_classes):
    task = task_of(criterion)
    logits, labels = toy_outputs(num_exits=num_exits, num_rows=num_rows, num_classes=num_classes, task=task)
    found = score(logits, labels, criterion=criterion, task=task)
    torch.testing.assert_close(found.scores, naive_scores(logits, criterion), rtol=1e-6, atol=1e-6)
    if task == "classification":
        assert found.outcome.tolist() == [[float(x.argmax() == y) for x, y in zip(k, labels, strict=True)] for k in logits]
        assert found.values.tolist() == [[float(x.argmax()) for x in k] for k in logits]
        assert found.criterion is find_criterion(criterion, task=TASKS[task], num_exits=num_exits)
    else:
        assert torch.equal(found.outcome, (logits[:, :, 0] - labels).square().double())
        assert torch.equal(found.values, logits[:, :, 0])
    assert (found.num_exits, found.num_rows, found.outcome.dtype) == (num_exits, num_rows, torch.float64)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("size", [1, 7, 60, 61, 100])
def test_rows_stand_for_themselves(criterion, size):
    """Tables of a few rows, side by side, are bit for bit that of all rows; so is the sweep of all thresholds."""
    task = task_of(criterion)
    logits, labels = toy_outputs(num_exits=4, num_rows=61, num_classes=1000, seed=3, task=task)
    logits = logits * torch.linspace(0.5, 2, 61)[:, None]
    rule = find_criterion(criterion, task=TASKS[task], num_exits=4)
    whole = reduce_rows(logits, labels, criterion=rule)
    parts = [
        reduce_rows(logits[:, start : start + size], labels[start : start + size], criterion=rule) for start in range(0, 61, size)
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    costs = [1, 2, 3, 4]
    points = sweep(whole[0], whole[1].double(), costs)
    if criterion == "max-softmax":
        exact = sweep(logits.softmax(dim=2).amax(dim=2), whole[1].double(), costs)
        assert torch.equal(points.edges, exact.edges) and torch.equal(points.totals, exact.totals)


def test_outcomes_by_hand():
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[2.0, 1.0], [0.0, 1.0]]])
    assert score(logits, torch.tensor([1, 1])).outcome.tolist() == [[1, 0], [0, 1]]
    outputs = torch.tensor([[[1.5], [2.0]]])
    assert score(outputs, torch.tensor([1.0, 4.0]), task="regression").outcome.tolist() == [[0.25, 4.0]]


def test_outputs_that_are_not_finite_name_the_exit():
    logits = torch.zeros(4, 4, 2)
    logits[0, 0] = torch.tensor([3e38, -3e38])  # large, but finite
    logits[1, 2, 0] = torch.nan
    logits[2, :, 1] = torch.inf
    logits[3, 1, 0] = -torch.inf
    words = (
        r"test split: outputs are not finite at exit 2 \(1 of 4 rows\), 3 \(4 of 4 rows\), 4 \(1 of 4 rows\); training diverged"
    )
    with pytest.raises(EectlError, match=words):
        score(logits, torch.zeros(4).long())
