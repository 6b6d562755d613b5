"""The two ways to turn the evaluations of several seeds into one number for a budget. Pure arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from eectl.core.errors import EectlError
from eectl.evaluation.results import Evaluation
from eectl.reports.comparison import Cell

OVER = 1e-9  # shares of cost that differ by less are equal


def per_seed(evaluations: Sequence[Evaluation], budget: float | None, measure: str | None = None) -> Cell | None:
    """Average what each seed's own thresholds gave, the score or an entry of MEASURES.

    It is None unless every seed reaches the budget.
    """
    entries = [(each, entry) for each in evaluations for entry in each.budgets if entry.budget == budget]
    values = [(entry.value if measure is None else entry.measure(measure), entry, each) for each, entry in entries]
    found = [(value, entry.mean_cost / each.plain_cost) for value, entry, each in values
             if value is not None and entry.mean_cost is not None]  # fmt: skip
    return _cell(found) if len(found) == len(evaluations) else None


def average_first(evaluations: Sequence[Evaluation], budget: float | None) -> Cell | None:
    """Average costs over seeds first, then choose one threshold for all seeds, as the authors' scripts do.

    At each threshold of the authors' grid costs are averaged over seeds; a walk from cheap to dear along that mean ends before
    the first threshold over budget, and the value there is averaged over seeds. Unlimited is the last threshold. Chooses and
    scores on the same split. Source: kamadforge/early-exit-benchmark, visualize/cost_vs_table.py.

    Returns:
        The chosen cell, or None where even the cheapest threshold is over budget.
    """
    assert all(each.grid is not None for each in evaluations)
    columns = zip(*(_points(each) for each in evaluations), strict=True)
    chosen = None
    for found in columns:
        cell = _cell(found)
        if budget is not None and cell.share > budget / 100 + OVER:
            break
        chosen = cell
    return chosen


def _points(evaluation: Evaluation) -> list[tuple[float, float]]:
    """Return (value, share of the plain cost) at each threshold of the grid."""
    grid = evaluation.grid
    assert grid is not None
    return [(value, cost / evaluation.plain_cost) for value, cost in zip(grid.values, grid.mean_costs, strict=True)]


def _cell(found: Sequence[tuple[float, float]]) -> Cell:
    values = [value for value, _ in found]
    return Cell(fmean(values), stdev(values) if len(values) > 1 else None, fmean(share for _, share in found))


def check_grids(found: Mapping[str, Evaluation]) -> None:
    """Raise EectlError unless all evaluations, by their runs' names, have values at the same thresholds of the authors' grid."""
    first = next(iter(found))
    for name, evaluation in found.items():
        if evaluation.task != "classification":
            raise EectlError(
                f"--lookup average-first: the paper names no thresholds for {evaluation.task}; use --lookup per-seed"
            )
        if evaluation.grid is None:
            raise EectlError(
                f"--lookup average-first: {name} has no values at the authors' thresholds; write it again with "
                "eectl evaluate CKPT -o evaluation.json, or use --lookup per-seed"
            )
        if evaluation.grid.thresholds != (found[first].grid or evaluation.grid).thresholds:
            raise EectlError(f"--lookup average-first: {first} and {name} have different thresholds; report them apart")


LOOKUPS: dict[str, Callable[[Sequence[Evaluation], float | None], Cell | None]] = {
    "per-seed": per_seed,
    "average-first": average_first,
}
