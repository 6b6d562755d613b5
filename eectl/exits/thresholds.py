"""Choosing thresholds for budgets: those that do best on the calibration split, one shared by all exits or one for each."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.exits.decisions import choose_decisions, decided
from eectl.exits.per_exit import pick_per_exit
from eectl.exits.policy import BudgetPolicy, CostTable, Policies, ThresholdMetric
from eectl.exits.scores import ScoredRows
from eectl.exits.sweep import pick, sweep
from eectl.models.losses import Task, balanced_weights

_EXACT = 2.0**24
FEW_ROWS = 200  # fewer say little about an accuracy


def check_has_exits(num_exits: int) -> None:
    """Raise EectlError, before any expensive pass, where there is no threshold to choose."""
    if num_exits == 1:
        raise EectlError("this network has no attached exits, so there is no threshold to choose; run eectl attach-heads first")


def choose_thresholds(
    scored: ScoredRows, costs: CostTable, *, budgets: Sequence[float], search: str = "shared", metric: ThresholdMetric = "score"
) -> Policies:
    """Return the best thresholds for each budget on these rows, for several labels with the decisions that are best for each.

    Every distinct threshold is weighed, not a grid of them. A network without attached exits gets policies without thresholds.

    Args:
        scored: The calibration split's outputs, as a criterion sees them.
        costs: What a row costs that leaves at each exit, rising.
        budgets: % of the plain backbone's cost.
        search: An entry of SEARCHES.
        metric: What is to be best: the task's score, or for classes their balanced accuracy.
    """
    find = lookup(SEARCHES, search, what="search")
    decisions = choose_decisions(scored) if scored.made.task.name == "multilabel" else None
    scored = scored if decisions is None else decided(scored, decisions)
    outcome = _by_class(scored) if metric == "balanced" else scored.outcome
    chosen = find(scored.scores, outcome, costs, budgets, task=scored.made.task)
    return Policies(
        checkpoint=scored.made.checkpoint,
        task=scored.made.task,
        criterion=scored.criterion,
        split=scored.made.split,
        fingerprint=scored.made.fingerprint,
        num_rows=scored.num_rows,
        exit_costs=costs.exits,
        plain_cost=costs.plain,
        budgets=tuple(chosen),
        search=search,
        cost=costs.kind,
        measured=costs.measured,
        precision=scored.made.precision,
        metric=metric,
        decisions=decisions,
    )


def notes_on_rows(scored: ScoredRows) -> list[str]:
    """Return a warning where thresholds are chosen on fewer than FEW_ROWS rows, with the standard error that this means."""
    if scored.num_rows >= FEW_ROWS:
        return []
    task, last = scored.made.task, scored.outcome[-1]
    error = float(last.std(correction=0)) / math.sqrt(scored.num_rows)
    size = f"{error:.2g}" if task.predicts_number else f"{100 * error:.1f} points"
    return [
        f"the {scored.made.split} split has {scored.num_rows} rows, fewer than {FEW_ROWS}: "
        f"the {task.score_name} by which thresholds are chosen has a standard error of {size} there (last exit)"
    ]


def threshold_metric(name: str, task: Task) -> ThresholdMetric:
    """Return what thresholds are to make the best of; raises EectlError for another word, or one that is not for this task."""
    metric: ThresholdMetric = lookup({"score": "score", "balanced": "balanced"}, name, what="metric")
    if metric == "balanced" and task.name != "classification":
        raise EectlError(f"--metric balanced is for classes, and this network does {task.name}; use --metric score")
    return metric


def _pick_shared(
    scores: Tensor, outcome: Tensor, costs: CostTable, budgets: Sequence[float], *, task: Task
) -> list[BudgetPolicy]:
    """Return for each budget the best threshold shared by all exits, of all there are."""
    return pick(sweep(scores, outcome, costs.exits), budgets, costs, task=task)


def _by_class(scored: ScoredRows) -> Tensor:
    """Return outcomes [exit, row] whose mean is the balanced accuracy: hits that count by how rare their class is.

    What they count is rounded to 2^-24, so that sums in float64 are exact, and settings that are equally good compare equal.
    """
    weights = (balanced_weights(scored.labels) * _EXACT).round() / _EXACT
    return scored.outcome * weights[scored.labels]


SEARCHES: dict[str, Callable[..., list[BudgetPolicy]]] = {"shared": _pick_shared, "per-exit": pick_per_exit}
