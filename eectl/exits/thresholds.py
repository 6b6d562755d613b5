"""Choosing thresholds for budgets: those that do best on the calibration split, one shared by all exits or one for each."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.exits.per_exit import pick_per_exit
from eectl.exits.policy import BudgetPolicy, CostTable, Policies
from eectl.exits.scores import ScoredRows
from eectl.exits.sweep import pick, sweep
from eectl.models.losses import Task

FEW_ROWS = 200  # fewer say little about an accuracy


def check_has_exits(num_exits: int) -> None:
    """Raise EectlError, before any expensive pass, where there is no threshold to choose."""
    if num_exits == 1:
        raise EectlError("this network has no attached exits, so there is no threshold to choose; run eectl attach-heads first")


def choose_thresholds(scored: ScoredRows, costs: CostTable, *, budgets: Sequence[float], search: str = "shared") -> Policies:
    """Return the best thresholds for each budget on these rows.

    Every distinct threshold is weighed, not a grid of them. A network without attached exits gets policies without thresholds.

    Args:
        scored: The calibration split's outputs, as a criterion sees them.
        costs: What a row costs that leaves at each exit, rising.
        budgets: % of the plain backbone's cost.
        search: An entry of SEARCHES.
    """
    find = lookup(SEARCHES, search, what="search")
    chosen = find(scored.scores, scored.outcome, costs, budgets, task=scored.made.task)
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


def _pick_shared(
    scores: Tensor, outcome: Tensor, costs: CostTable, budgets: Sequence[float], *, task: Task
) -> list[BudgetPolicy]:
    """Return for each budget the best threshold shared by all exits, of all there are."""
    return pick(sweep(scores, outcome, costs.exits), budgets, costs, task=task)


SEARCHES: dict[str, Callable[..., list[BudgetPolicy]]] = {"shared": _pick_shared, "per-exit": pick_per_exit}
