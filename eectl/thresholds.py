"""Thresholds for budgets: for each cost budget, the shared threshold that does best on the calibration split."""

from collections.abc import Sequence

from eectl.errors import EectlError
from eectl.exiting import DEFAULT_CRITERION, find_criterion
from eectl.predict import Predictions
from eectl.results import BudgetPolicy, Policies
from eectl.sweep import outcomes, pick, sweep


def check_request(criterion: str | None, *, task: str, num_exits: int) -> None:
    """Raise EectlError, before any expensive pass, where there is no threshold to choose or the criterion does not fit."""
    if num_exits == 1:
        raise EectlError("this network has no attached exits, so there is no threshold to choose; run eectl attach-heads first")
    find_criterion(criterion, task=task, num_exits=num_exits)


def calibrate(
    predictions: Predictions,
    *,
    exit_costs: Sequence[int],
    plain_cost: int,
    budgets: Sequence[float],
    criterion: str | None = None,
) -> Policies:
    """The best threshold of `criterion` (none: the task's default) for each budget, in % of `plain_cost`.

    `exit_costs` are the MACs of a row that leaves at each exit. Every distinct threshold is weighed, not a grid of them.
    Raises EectlError for a criterion that does not fit. A network without attached exits gets policies without thresholds.
    """
    num_exits = len(predictions.logits)
    rule = find_criterion(criterion, task=predictions.task, num_exits=num_exits)
    outcome = outcomes(predictions.logits, predictions.labels, task=predictions.task)
    points = sweep(rule.scores(predictions.logits), outcome, exit_costs, task=predictions.task)
    chosen = pick(points, budgets, plain_cost)
    return Policies(
        checkpoint=predictions.checkpoint,
        task=predictions.task,
        criterion=criterion or DEFAULT_CRITERION[predictions.task],
        split=predictions.split,
        fingerprint=predictions.fingerprint,
        num_rows=len(predictions.labels),
        exit_costs=tuple(exit_costs),
        plain_cost=plain_cost,
        budgets=tuple(BudgetPolicy.shared(*each, num_exits=num_exits) for each in zip(budgets, chosen, strict=True)),
    )
