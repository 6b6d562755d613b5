"""Gather many evaluations into one table: a row per setting and regime, mean ± std over its seeds at each budget.

Pure arithmetic: reads no file, prints nothing, draws nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eectl.core.errors import EectlError, lookup
from eectl.evaluation.measures import MEASURES
from eectl.evaluation.results import Evaluation
from eectl.models.checkpoint import Origin
from eectl.recipe.regimes import REGIMES
from eectl.reports.comparison import Comparison, Row
from eectl.reports.differences import check_comparable, labels, run_settings
from eectl.reports.lookups import LOOKUPS, check_grids, per_seed
from eectl.reports.published import PublishedCell, PublishedTable


@dataclass(frozen=True)
class Run:
    """One evaluation under the name that the user gave it; `label` replaces the one made from its settings."""

    name: str
    evaluation: Evaluation
    label: str | None = None

    @property
    def origin(self) -> Origin:
        """The recipe and the exits of the network that was evaluated."""
        origin = self.evaluation.origin
        assert origin is not None
        return origin

    @property
    def regime(self) -> str:
        """The regime the network was trained with."""
        return str(self.origin.recipe["regime"])

    @property
    def seed(self) -> int:
        """The seed the network was trained with."""
        return int(self.origin.recipe["seed"])


def compare(
    runs: Sequence[Run],
    *,
    how: str = "per-seed",
    published: PublishedTable | None = None,
    variant: str | None = None,
    measure: str | None = None,
) -> Comparison:
    """Gather runs into one table.

    Args:
        runs: one evaluation each, of one data set and backbone; seeds of the same setting and regime share a row.
        how: how several seeds become one number, an entry of LOOKUPS.
        published: a table of the paper to stand beside the rows.
        variant: the published table's variant for all rows; default: the one whose name is a row's label.
        measure: what is shown in place of the score, an entry of MEASURES.

    Raises:
        EectlError: for runs that do not belong in one table, a seed that comes twice, and a lookup without its data.
    """
    find = lookup(LOOKUPS, how, what="lookup")
    first = runs[0]
    check_comparable([(run.name, run_settings(run.origin, run.evaluation), run.evaluation) for run in runs])
    if published is not None and published.task != first.evaluation.task:
        raise EectlError(
            f"--published {published.number}: {published.setting} is {published.task}, these runs do {first.evaluation.task}"
        )
    if published is not None and first.evaluation.cost != "macs":
        raise EectlError(f"--published {published.number}: the paper's budgets are MACs, and these runs' are time; leave it out")
    if measure is not None:
        _check_measure(measure, runs, how=how, published=published)
    budgets = _budgets(runs)
    rows = []
    for (label, regime), members in _grouped(runs, published).items():
        evaluations = [run.evaluation for run in members]
        if how == "average-first":
            check_grids({run.name: run.evaluation for run in members})
        cells = [find(evaluations, budget) if measure is None else per_seed(evaluations, budget, measure) for budget in budgets]
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
        measure=measure,
    )


def _check_measure(name: str, runs: Sequence[Run], *, how: str, published: PublishedTable | None) -> None:
    """Raise EectlError for a measure that is not there, or that some run was not measured by."""
    lookup(MEASURES, name, what="measure")
    if how != "per-seed" or published is not None:
        raise EectlError(f"--measure {name}: the authors' lookup and tables are of scores; leave out --lookup and --published")
    for run in runs:
        if run.evaluation.plain.measure(name) is None:
            there = [each for each in MEASURES if run.evaluation.plain.measure(each) is not None]
            raise EectlError(
                f"--measure {name}: {run.name} ({run.evaluation.task}) has {', '.join(there) or 'none'}; name one of these, or "
                "run eectl evaluate on it again"
            )


def _budgets(runs: Sequence[Run]) -> tuple[float | None, ...]:
    """Return every budget that any run has, rising, and unlimited (None) last."""
    asked = {entry.budget for run in runs for entry in run.evaluation.budgets if entry.budget is not None}
    return (*sorted(asked), None)


def _grouped(runs: Sequence[Run], published: PublishedTable | None) -> Mapping[tuple[str, str], list[Run]]:
    """Return the runs of each (label, regime), seeds rising, in order of label and regime.

    Labels come in the published table's order where it has them, else in the order of the runs; regimes in the paper's order.
    Raises EectlError where a seed comes twice, or where two different settings have one label.
    """
    found = [run_settings(run.origin, run.evaluation) for run in runs]
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
    """Return the published number for a row and a budget, None where the paper has none."""
    if published is None:
        return None
    named = {name.lower(): name for name in published.variants}
    if variant is None and set(named) != {""}:
        variant = named.get(label.lower())
    elif variant is None:
        variant = ""
    return None if variant is None else published.cells.get((variant, regime.lower(), budget))


def _nothing_published(published: PublishedTable, rows: Sequence[Row]) -> str:
    """Say why no row has a published number beside it."""
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
