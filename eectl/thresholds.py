"""Thresholds for budgets: for each cost budget, the shared threshold that does best on the calibration split."""

from collections.abc import Sequence

from eectl.errors import EectlError
from eectl.exiting import find_criterion
from eectl.results import BudgetPolicy, Policies
from eectl.scored import Scored
from eectl.sweep import pick, sweep


def check_request(criterion: str | None, *, task: str, num_exits: int) -> None:
    """Raise EectlError, before any expensive pass, where there is no threshold to choose or the criterion does not fit."""
    if num_exits == 1:
        raise EectlError("this network has no attached exits, so there is no threshold to choose; run eectl attach-heads first")
    find_criterion(criterion, task=task, num_exits=num_exits)


def calibrate(scored: Scored, *, exit_costs: Sequence[int], plain_cost: int, budgets: Sequence[float]) -> Policies:
    """The best threshold for each budget, in % of `plain_cost`.

    `exit_costs` are the MACs of a row that leaves at each exit. Every distinct threshold is weighed, not a grid of them. A
    network without attached exits gets policies without thresholds.
    """
    points = sweep(scored.scores, scored.outcome, exit_costs, task=scored.task)
    chosen = pick(points, budgets, plain_cost)
    return Policies(
        checkpoint=scored.checkpoint,
        task=scored.task,
        criterion=scored.criterion,
        split=scored.split,
        fingerprint=scored.fingerprint,
        num_rows=scored.num_rows,
        exit_costs=tuple(exit_costs),
        plain_cost=plain_cost,
        budgets=tuple(BudgetPolicy.shared(*each, num_exits=scored.num_exits) for each in zip(budgets, chosen, strict=True)),
    )
