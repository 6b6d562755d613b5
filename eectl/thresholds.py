"""Thresholds for budgets: for each cost budget, those that do best on the calibration split, one shared or one per exit."""

from collections.abc import Callable, Sequence

from torch import Tensor

from eectl.errors import EectlError, lookup
from eectl.exiting import DEFAULT_CRITERION, find_criterion
from eectl.per_exit import pick_per_exit
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
    search: str = "shared",
    cost: str = "macs",
    measured: str | None = None,
) -> Policies:
    """The best thresholds of `criterion` (none: the task's default) for each budget, in % of `plain_cost`.

    `exit_costs` are what a row costs that leaves at each exit, in the unit of `cost` (results.COSTS), rising. `search` names an
    entry of SEARCHES. Every distinct threshold is weighed, not a grid of them.
    Raises EectlError for a criterion that does not fit. A network without attached exits gets policies without thresholds.
    """
    num_exits = len(predictions.logits)
    rule = find_criterion(criterion, task=predictions.task, num_exits=num_exits)
    outcome = outcomes(predictions.logits, predictions.labels, task=predictions.task)
    find = lookup(SEARCHES, search, what="search")
    chosen = find(rule.scores(predictions.logits), outcome, exit_costs, budgets, plain_cost, task=predictions.task)
    return Policies(
        checkpoint=predictions.checkpoint,
        task=predictions.task,
        criterion=criterion or DEFAULT_CRITERION[predictions.task],
        split=predictions.split,
        fingerprint=predictions.fingerprint,
        num_rows=len(predictions.labels),
        exit_costs=tuple(exit_costs),
        plain_cost=plain_cost,
        budgets=tuple(chosen),
        search=search,
        cost=cost,
        measured=measured,
    )


def _pick_shared(
    scores: Tensor, outcome: Tensor, exit_costs: Sequence[int], budgets: Sequence[float], plain_cost: int, *, task: str
) -> list[BudgetPolicy]:
    """The best threshold shared by all exits, of all there are."""
    chosen = pick(sweep(scores, outcome, exit_costs, task=task), budgets, plain_cost)
    return [BudgetPolicy.shared(*each, num_exits=len(scores)) for each in zip(budgets, chosen, strict=True)]


SEARCHES: dict[str, Callable[..., list[BudgetPolicy]]] = {"shared": _pick_shared, "per-exit": pick_per_exit}
