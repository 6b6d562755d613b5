"""Many evaluations as one table: seeds gathered, rows named by what differs between their recipes, mean ± std at each budget.

Also the band that a row's seeds span on the cost axis. Pure arithmetic: reads no file, prints nothing, draws nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from eectl.core.errors import EectlError, lookup
from eectl.evaluation.results import Evaluation
from eectl.models.checkpoint import Origin
from eectl.recipe.regimes import REGIMES
from eectl.reports.differences import check_comparable, labels, settings
from eectl.reports.published import PublishedCell, PublishedTable

_OVER = 1e-9  # shares of cost that differ by less are equal


@dataclass(frozen=True)
class Run:
    """One evaluation and where it came from. `name` is the user's word for it, `label` overrides the automatic one."""

    name: str
    evaluation: Evaluation
    origin: Origin
    label: str | None = None

    @property
    def regime(self) -> str:
        """The regime it was trained with."""
        return str(self.origin.recipe["regime"])

    @property
    def seed(self) -> int:
        """The seed it was trained with."""
        return int(self.origin.recipe["seed"])


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation of a value over seeds, and the mean cost as a share of the plain backbone's.

    `std` is None with one seed.
    """

    mean: float
    std: float | None
    share: float


@dataclass(frozen=True)
class Row:
    """The seeds of one setting. `cells` and `published` have an entry per budget, None where there is no number."""

    label: str
    regime: str
    seeds: tuple[int, ...]
    cells: tuple[Cell | None, ...]
    published: tuple[PublishedCell | None, ...]
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Comparison:
    """The table: rows by budgets (% of the plain backbone's cost, None is unlimited, last).

    `data` and `backbone` name the setting, `cost` and `measured` the unit of costs as an evaluation does.
    """

    task: str
    data: str
    backbone: str
    split: str
    num_rows: int
    criteria: tuple[str, ...]
    protocol: str
    lookup: str
    budgets: tuple[float | None, ...]
    rows: tuple[Row, ...]
    published: PublishedTable | None
    cost: str = "macs"
    measured: str | None = None


def compare(
    runs: Sequence[Run],
    *,
    how: str = "per-seed",
    published: PublishedTable | None = None,
    variant: str | None = None,
) -> Comparison:
    """Gather runs into a table; `how` names an entry of LOOKUPS, `variant` one of the published table's (none: by label).

    Raises EectlError for runs that do not belong in one table, for the same seed twice, and for a lookup without its data.
    """
    find = lookup(LOOKUPS, how, what="lookup")
    first = runs[0]
    check_comparable([(run.name, settings(run.origin, run.evaluation), run.evaluation) for run in runs])
    if published is not None and published.task != first.evaluation.task:
        raise EectlError(
            f"--published {published.number}: {published.setting} is {published.task}, these runs do {first.evaluation.task}"
        )
    if published is not None and first.evaluation.cost != "macs":
        raise EectlError(f"--published {published.number}: the paper's budgets are MACs, and these runs' are time; leave it out")
    budgets = _budgets(runs)
    rows = []
    for (label, regime), members in _grouped(runs, published).items():
        evaluations = [run.evaluation for run in members]
        if how == "average-first":
            _check_grids(members)
        cells = [find(evaluations, budget) for budget in budgets]
        printed = [_printed(published, variant, label, regime, budget) for budget in budgets]
        seeds = tuple(run.seed for run in members)
        rows.append(Row(label, regime, seeds, tuple(cells), tuple(printed), tuple(evaluations)))
    if published is not None and not any(any(row.published) for row in rows):
        raise EectlError(_nothing_published(published, rows))
    return Comparison(
        task=first.evaluation.task,
        data=first.origin.recipe["data"]["name"],
        backbone=first.origin.recipe["backbone"]["name"],
        split=first.evaluation.split,
        num_rows=first.evaluation.num_rows,
        criteria=tuple(dict.fromkeys(run.evaluation.criterion for run in runs)),
        protocol=first.evaluation.protocol,
        lookup=how,
        budgets=budgets,
        rows=tuple(rows),
        published=published,
        cost=first.evaluation.cost,
        measured=first.evaluation.measured,
    )


def _budgets(runs: Sequence[Run]) -> tuple[float | None, ...]:
    """Every budget of any run, rising, and unlimited last."""
    asked = {entry.budget for run in runs for entry in run.evaluation.budgets if entry.budget is not None}
    return (*sorted(asked), None)


def _grouped(runs: Sequence[Run], published: PublishedTable | None) -> Mapping[tuple[str, str], list[Run]]:
    """The seeds of each (label, regime), in order of label and regime; raises EectlError where a seed stands twice.

    Labels come in the published table's order where it has them, else in that of the runs; regimes in that of the paper.
    """
    found = [settings(run.origin, run.evaluation) for run in runs]
    automatic = labels(found)
    groups: dict[tuple[str, str], list[Run]] = {}
    keys: dict[tuple[str, str], tuple[str, Run]] = {}
    for run, auto in zip(runs, automatic, strict=True):
        place = (auto if run.label is None else run.label, run.regime)
        members = groups.setdefault(place, [])
        known, other = keys.setdefault(place, (auto, run))
        if known != auto:
            raise EectlError(
                f"{other.name} and {run.name} are both '{place[0]}' of {run.regime}, but differ ({known or 'the default'}; "
                f"{auto or 'the default'}); give them different --label"
            )
        same = next((member for member in members if member.seed == run.seed), None)
        if same is not None:
            raise EectlError(
                f"{same.name} and {run.name} are both seed {run.seed} of {' '.join(filter(None, place))}; give each seed once, "
                "or tell them apart with --label 'PATTERN=TEXT'"
            )
        members.append(run)
    order = {name.lower(): index for index, name in enumerate(published.variants if published else [])}
    seen = list(dict.fromkeys(label for label, _ in groups))
    regimes = list(REGIMES)

    def rank(place: tuple[str, str]) -> tuple[int, int, int, str]:
        label, regime = place
        number = regimes.index(regime) if regime in regimes else len(regimes)
        return order.get(label.lower(), len(order)), seen.index(label), number, regime

    return {place: sorted(groups[place], key=lambda run: run.seed) for place in sorted(groups, key=rank)}


def _printed(
    published: PublishedTable | None, variant: str | None, label: str, regime: str, budget: float | None
) -> PublishedCell | None:
    """The published number for a row and a budget, if there is one."""
    if published is None:
        return None
    named = {name.lower(): name for name in published.variants}
    if variant is None and set(named) != {""}:
        variant = named.get(label.lower())
    elif variant is None:
        variant = ""
    return None if variant is None else published.cells.get((variant, regime.lower(), budget))


def _nothing_published(published: PublishedTable, rows: Sequence[Row]) -> str:
    """Why no row has a published number beside it."""
    there = f"--published {published.number}: {published.setting} has"
    if not {row.regime for row in rows} & set(published.regimes):
        return f"{there} no regime of these runs ({', '.join(sorted({row.regime for row in rows}))})"
    names = [variant for variant in published.variants if variant]
    if names:
        return (
            f"{there} {', '.join(names)}, and no row is labelled so; name one, as in --published {published.number}:{names[0]}, "
            f"or label the rows, as in --label 'PATTERN={names[0]}'"
        )
    budgets = ", ".join("unlimited" if each is None else f"{each:g}%" for each in published.budgets)
    return f"{there} the budgets {budgets}, and these runs have none of them"


# --- the two lookups ---------------------------------------------------------------------------------------------------


def per_seed(evaluations: Sequence[Evaluation], budget: float | None) -> Cell | None:
    """Each seed's own thresholds, then mean and std over seeds; None unless every seed reaches the budget."""
    entries = [(each, entry) for each in evaluations for entry in each.budgets if entry.budget == budget]
    found = [(entry.value, entry.mean_cost / each.plain_cost) for each, entry in entries
             if entry.value is not None and entry.mean_cost is not None]  # fmt: skip
    return _cell(found) if len(found) == len(evaluations) else None


def average_first(evaluations: Sequence[Evaluation], budget: float | None) -> Cell | None:
    """The authors' lookup (kamadforge/early-exit-benchmark, visualize/cost_vs_table.py): costs are averaged over seeds first.

    At each threshold of the authors' grid, costs are averaged over seeds; then one walk from cheap to dear, on that mean, ends
    before the first threshold over budget. The value is the mean over seeds at that one threshold, std likewise. It chooses and
    scores on the same split. Unlimited is the last threshold. None where even the cheapest is over budget.
    """
    assert all(each.grid is not None for each in evaluations)
    columns = zip(*(_points(each) for each in evaluations), strict=True)
    chosen = None
    for found in columns:
        cell = _cell(found)
        if budget is not None and cell.share > budget / 100 + _OVER:
            break
        chosen = cell
    return chosen


def _points(evaluation: Evaluation) -> list[tuple[float, float]]:
    """(value, share of the plain cost) at each threshold of the grid."""
    grid = evaluation.grid
    assert grid is not None
    return [(value, cost / evaluation.plain_cost) for value, cost in zip(grid.values, grid.mean_costs, strict=True)]


def _cell(found: Sequence[tuple[float, float]]) -> Cell:
    values = [value for value, _ in found]
    return Cell(fmean(values), stdev(values) if len(values) > 1 else None, fmean(share for _, share in found))


def _check_grids(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.evaluation.task == "regression":
            raise EectlError("--lookup average-first: the paper names no thresholds for regression; use --lookup per-seed")
        if run.evaluation.grid is None:
            raise EectlError(
                f"--lookup average-first: {run.name} has no values at the authors' thresholds (an older evaluation); write it "
                "again with eectl evaluate CKPT -o evaluation.json"
            )
        if run.evaluation.grid.thresholds != (runs[0].evaluation.grid or run.evaluation.grid).thresholds:
            raise EectlError(f"--lookup average-first: {runs[0].name} and {run.name} have different thresholds")


# --- the band ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """A row's curve: at each share of the plain cost, mean and std of the value over seeds (0 with one seed)."""

    shares: Any
    means: Any
    stds: Any


def band(evaluations: Sequence[Evaluation], *, num_points: int = 400) -> Band:
    """The mean curve of a row's seeds and its standard deviation, on one grid of costs.

    A network reaches only some costs, so a seed's curve is a step function: what it gives for a cost is the value of its dearest
    operating point within that cost. The grid begins where every seed has one, and ends at the dearest point of any.
    """
    curves = [(np.asarray(each.curve.mean_costs) / each.plain_cost, np.asarray(each.curve.values))
              for each in evaluations if each.curve is not None]  # fmt: skip
    assert len(curves) == len(evaluations)
    shares = np.linspace(max(costs[0] for costs, _ in curves), max(costs[-1] for costs, _ in curves), num_points)
    values = np.stack([curve[np.searchsorted(costs, shares + _OVER, side="right") - 1] for costs, curve in curves])
    stds = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(shares)
    return Band(shares, values.mean(axis=0), stds)


LOOKUPS: dict[str, Callable[[Sequence[Evaluation], float | None], Cell | None]] = {
    "per-seed": per_seed,
    "average-first": average_first,
}
