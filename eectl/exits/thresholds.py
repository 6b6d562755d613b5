"""Thresholds for budgets: for each cost budget, those that do best on the calibration split, one shared or one per exit."""

from collections.abc import Callable, Sequence

from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.exits.criteria import find_criterion
from eectl.exits.per_exit import pick_per_exit
from eectl.exits.policy import BudgetPolicy, Policies
from eectl.exits.scores import Scored
from eectl.exits.sweep import pick, sweep


def check_request(criterion: str | None, *, task: str, num_exits: int) -> None:
    """Raise EectlError, before any expensive pass, where there is no threshold to choose or the criterion does not fit."""
    if num_exits == 1:
        raise EectlError("this network has no attached exits, so there is no threshold to choose; run eectl attach-heads first")
    find_criterion(criterion, task=task, num_exits=num_exits)


def calibrate(
    scored: Scored,
    *,
    exit_costs: Sequence[int],
    plain_cost: int,
    budgets: Sequence[float],
    search: str = "shared",
    cost: str = "macs",
    measured: str | None = None,
) -> Policies:
    """The best thresholds for each budget, in % of `plain_cost`.

    `exit_costs` are what a row costs that leaves at each exit, in the unit of `cost` (results.COSTS), rising. `search` names an
    entry of SEARCHES. Every distinct threshold is weighed, not a grid of them. A network without attached exits gets policies
    without thresholds.
    """
    find = lookup(SEARCHES, search, what="search")
    chosen = find(scored.scores, scored.outcome, exit_costs, budgets, plain_cost, task=scored.task)
    return Policies(
        checkpoint=scored.checkpoint,
        task=scored.task,
        criterion=scored.criterion,
        split=scored.split,
        fingerprint=scored.fingerprint,
        num_rows=scored.num_rows,
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
