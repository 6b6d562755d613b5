"""Measure a split's answers beside the score of their task, as scikit-learn and scipy define it, at any exits.

Chooses nothing and reads no file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.exits.decisions import Decisions, decide
from eectl.exits.scores import ScoredRows
from eectl.recipe.choices import MEASURE_CHOICES, TASK_CHOICES, in_order

Measures = dict[str, float]
_Numbers = NDArray[np.float64]


def measures_at(
    scored: ScoredRows, exits: Tensor, *, targets: Sequence[str] = (), decisions: Decisions | None = None
) -> dict[str, Any]:
    """Return what is measured where each row takes its exit: fields of ExitResult and BudgetResult by name.

    Args:
        scored: the split's outputs.
        exits: the exit of each row [row], from 0.
        targets: the names of a regression's targets, for messages and files; default: numbers from 1.
        decisions: for several labels the probability that each exit's labels must exceed; default: 1/2.
    """
    return _BY_TASK[scored.made.task.name](scored, exits, targets, decisions)


def _of_classes(scored: ScoredRows, exits: Tensor, targets: Sequence[str], decisions: Decisions | None) -> dict[str, Any]:  # noqa: ARG001
    predicted, labels = scored.values.gather(0, exits[None])[0].long(), scored.labels
    measures = {"mcc": matthews(predicted, labels)}
    if scored.outputs is not None:
        probabilities = _taken(scored.outputs, exits)
        if probabilities.shape[1] == 2:
            hits, either = int(((predicted == 1) & (labels == 1)).sum()), int((predicted == 1).sum() + (labels == 1).sum())
            measures["f1"] = 2 * hits / either if either else math.nan
            measures["auroc"] = auroc(probabilities[:, 1].numpy(), (labels == 1).numpy())
        else:
            each = (auroc(column.numpy(), (labels == label).numpy()) for label, column in enumerate(probabilities.T))
            measures["auroc"] = _mean_of_known(each)
    return {**by_class(predicted, labels), "measures": measures}


def _of_numbers(scored: ScoredRows, exits: Tensor, targets: Sequence[str], decisions: Decisions | None) -> dict[str, Any]:  # noqa: ARG001
    taken = scored.values.gather(0, exits[None])[0] if scored.outputs is None else _taken(scored.outputs, exits)
    found = taken.double().view(len(exits), -1).numpy()
    true = scored.labels.double().numpy().reshape(found.shape)
    each = [_of_target(*pair) for pair in zip(found.T, true.T, strict=True)]
    names = targets if len(targets) == len(each) else [str(number) for number in range(1, len(each) + 1)]
    means = {name: _mean(one[name] for one in each) for name in each[0]}
    measures = {name: means[name] for name in ("mae", "r2")}
    fields: dict[str, Any] = {"pearson": means["pearson"], "spearman": means["spearman"], "measures": measures}
    return fields | ({"by_target": dict(zip(names, each, strict=True))} if len(each) > 1 else {})


def _of_target(found: _Numbers, true: _Numbers) -> Measures:
    errors, spread = found - true, float(np.square(true - true.mean()).sum())
    return {
        "mse": float(np.square(errors).mean()),
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - float(np.square(errors).sum()) / spread if spread else math.nan,
        **correlations(found, true),
    }


def _of_labels(scored: ScoredRows, exits: Tensor, targets: Sequence[str], decisions: Decisions | None) -> dict[str, Any]:  # noqa: ARG001
    assert scored.outputs is not None
    probabilities, true = _taken(scored.outputs, exits), scored.labels > 0
    predicted = decide(scored.outputs, decisions).gather(0, exits[None, :, None].expand(1, -1, true.shape[1]))[0]
    hits, either = (predicted & true).sum(dim=0).double(), (predicted.sum(dim=0) + true.sum(dim=0)).double()
    precisions = (average_precision(*pair) for pair in zip(probabilities.T.numpy(), true.T.numpy(), strict=True))
    there = either > 0
    return {
        "macro_f1": float((2 * hits[there] / either[there]).mean()),
        "measures": {"map": _mean_of_known(precisions), "micro_f1": float(2 * hits.sum() / either.sum())},
    }


def _of_levels(scored: ScoredRows, exits: Tensor, targets: Sequence[str], decisions: Decisions | None) -> dict[str, Any]:  # noqa: ARG001
    predicted, labels = scored.values.gather(0, exits[None])[0].long(), scored.labels
    distance = (predicted - labels).abs().double()
    measures = {"mae": float(distance.mean()), "kappa": quadratic_kappa(predicted, labels)}
    return {**by_class(predicted, labels), "measures": measures}


def _taken(outputs: Tensor, exits: Tensor) -> Tensor:
    """Return each row's outputs [row, output] at its exit, of those of all exits [exit, row, output]."""
    return outputs[exits, torch.arange(len(exits))]


def by_class(predicted: Tensor, labels: Tensor) -> Measures:
    """Return the mean over classes of their accuracy, and of their F1 score, for predicted classes [row] and labels [row].

    As in scikit-learn, classes without rows have no accuracy, and those that are neither there nor predicted no F1.
    """
    hits, rows, guesses = _counts(predicted, labels)
    there, named = rows > 0, rows + guesses > 0
    return {
        "balanced": float((hits[there] / rows[there]).mean()),
        "macro_f1": float((2 * hits[named] / (rows + guesses)[named]).mean()),
    }


def _counts(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many rows of each class [class] are right, there, and predicted, in float64."""
    size = int(max(predicted.max(), labels.max())) + 1
    hits, rows, guesses = (
        torch.bincount(each, minlength=size).double() for each in (labels[predicted == labels], labels, predicted)
    )
    return hits, rows, guesses


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Return the Matthews correlation of predicted classes [row] with labels [row]; 0 where either are all of one class."""
    hits, rows, guesses = _counts(predicted, labels)
    count = float(rows.sum())
    spread = (count**2 - float(rows.square().sum())) * (count**2 - float(guesses.square().sum()))
    return (float(hits.sum()) * count - float((rows * guesses).sum())) / math.sqrt(spread) if spread else 0.0


def quadratic_kappa(predicted: Tensor, labels: Tensor) -> float:
    """Return Cohen's kappa with quadratic weights of predicted levels [row] and labels [row]; NaN where all are of one level."""
    _, rows, guesses = _counts(predicted, labels)
    levels = torch.arange(len(rows)).double()
    by_chance = float(((levels[:, None] - levels).square() * rows[:, None] * guesses).sum() / len(labels))
    return 1 - float((predicted - labels).double().square().sum()) / by_chance if by_chance else math.nan


def auroc(scores: NDArray[Any], is_true: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of scores [row]; NaN where all rows are true, or none is.

    It is the share of pairs of a true and another row in which the true one scores higher; equal scores count half.
    """
    own, others = scores[is_true], np.sort(scores[~is_true])
    if not len(own) or not len(others):
        return math.nan
    below = np.searchsorted(others, own, side="left").sum() + np.searchsorted(others, own, side="right").sum()
    return float(below) / (2 * len(own) * len(others))


def average_precision(scores: NDArray[Any], is_true: NDArray[np.bool_]) -> float:
    """Return the mean over true rows of the precision at their score; NaN where no row is true."""
    own, everything = np.sort(scores[is_true]), np.sort(scores)
    if not len(own):
        return math.nan
    hits = len(own) - np.searchsorted(own, own, side="left")
    return float((hits / (len(everything) - np.searchsorted(everything, own, side="left"))).mean())


def correlations(values: _Numbers, labels: _Numbers) -> Measures:
    """Return Pearson's and Spearman's correlation of values [row] with labels [row], NaN where either do not differ."""
    from scipy import stats

    if min(np.ptp(values), np.ptp(labels)) == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    return {"pearson": float(stats.pearsonr(values, labels)[0]), "spearman": float(stats.spearmanr(values, labels)[0])}


def _mean(values: Any) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _mean_of_known(values: Any) -> float:
    """Return the mean of those that are numbers, NaN where none is."""
    known = [value for value in values if value == value]
    return _mean(known) if known else math.nan


MEASURES = in_order(
    MEASURE_CHOICES,
    {
        "balanced": "balanced",
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
        "f1": "F1",
        "auroc": "AUROC",
        "mcc": "MCC",
        "map": "mAP",
        "pearson": "Pearson",
        "spearman": "Spearman",
        "mae": "MAE",
        "r2": "R²",
        "kappa": "kappa",
    },
)  # what tables call each of them
IN_PERCENT = ("balanced", "macro_f1", "micro_f1", "f1", "auroc", "map")
ERRORS = ("mae", "mse")  # of which less is better
_BY_TASK: dict[str, Callable[[ScoredRows, Tensor, Sequence[str], Decisions | None], dict[str, Any]]] = in_order(
    TASK_CHOICES,
    {"classification": _of_classes, "regression": _of_numbers, "multilabel": _of_labels, "ordinal": _of_levels},
)
