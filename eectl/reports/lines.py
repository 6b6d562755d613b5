"""The words of a comparison that its table, Markdown and LaTeX share: title, columns, numbers, what is bold.

Accuracies are shown in %, errors of a regression as they are. Below a row of ours stands the paper's, where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eectl.evaluation.measures import ERRORS, IN_PERCENT, MEASURES
from eectl.evaluation.tables import budget_name
from eectl.models.losses import TASKS
from eectl.reports.comparison import NO_NUMBER, Cell, Comparison
from eectl.reports.published import PublishedCell


@dataclass(frozen=True)
class Line:
    """One line of a table: its first cells, then (mean, std, is best) for each budget."""

    first: tuple[str, ...]
    cells: tuple[tuple[str, str, bool], ...]
    is_papers: bool


def table_title(comparison: Comparison) -> str:
    """Say in one sentence what the numbers are."""
    name = _score_name(comparison.shown)
    rows = f"{comparison.split} split, {comparison.num_rows:,} rows"
    chosen = "the authors' grid" if comparison.lookup == "average-first" else f"{comparison.protocol} thresholds"
    criterion = "" if len(comparison.criteria) > 1 else f"{comparison.criteria[0]}, "
    how = f"{rows}; {criterion}{chosen}, {comparison.lookup}"
    return f"{comparison.data}, {comparison.backbone}: {name}, mean ± std over seeds ({how})"


def _score_name(shown: str) -> str:
    """Return the name of a task's score, or of an entry of MEASURES, with its unit or direction."""
    if shown in MEASURES:
        return f"{MEASURES[shown]}{' in %' if shown in IN_PERCENT else ' (lower is better)' if shown in ERRORS else ''}"
    known = TASKS[shown]
    return f"{known.score_name} in %" if known.higher_is_better else f"{known.score_name} (lower is better)"


def first_columns(comparison: Comparison) -> list[str]:
    """Return the headings before those of the budgets."""
    return [*(["setting"] if any(row.label for row in comparison.rows) else []), "regime", "seeds"]


def columns_of(comparison: Comparison) -> list[str]:
    """Return all headings."""
    return [*first_columns(comparison), *map(budget_name, comparison.budgets)]


def lines_of(comparison: Comparison) -> list[Line]:
    """Return every line; the best of ours in each column is marked, among two or more, as far as the digits shown tell."""
    has_labels = any(row.label for row in comparison.rows)
    best = [_best([row.cells[index] for row in comparison.rows], comparison.shown) for index in range(len(comparison.budgets))]
    lines = []
    for row in comparison.rows:
        first = (row.label or NO_NUMBER, row.regime) if has_labels else (row.regime,)
        cells = []
        for cell, top in zip(row.cells, best, strict=True):
            mean, std = cell_texts(cell, comparison.shown)
            cells.append((mean, std, len(comparison.rows) > 1 and mean == top))
        lines.append(Line((*first, str(len(row.seeds))), tuple(cells), is_papers=False))
        if any(row.published):
            papers = tuple((*cell_texts(cell, comparison.shown), False) for cell in row.published)
            lines.append(Line((*first[:-1], "paper", ""), papers, is_papers=True))
    return lines


def _best(cells: Sequence[Cell | None], shown: str) -> str | None:
    """Return the best mean as it is shown, None where there is none."""
    means = [cell.mean for cell in cells if cell is not None]
    if not means:
        return None
    higher_is_better = shown not in ERRORS if shown in MEASURES else TASKS[shown].higher_is_better
    return _value(max(means) if higher_is_better else min(means), shown)


def cell_texts(cell: Cell | PublishedCell | None, shown: str) -> tuple[str, str]:
    """Return mean and std as they are shown, of a task's score or an entry of MEASURES.

    The std is `-` for one seed, empty where the paper gives none, and empty beside the `-` of a missing number.
    """
    if cell is None:
        return NO_NUMBER, ""
    none = NO_NUMBER if isinstance(cell, Cell) else ""
    return _value(cell.mean, shown), none if cell.std is None else _value(cell.std, shown, digits=2)


def _value(value: float, shown: str, *, digits: int = 4) -> str:
    in_percent = shown in IN_PERCENT if shown in MEASURES else not TASKS[shown].predicts_number
    return f"{100 * value:.2f}" if in_percent else f"{value:.{digits}g}"


def plus_minus(mean: str, std: str) -> str:
    """Join a mean and its std, which may be empty."""
    return f"{mean} ± {std}" if std else mean
