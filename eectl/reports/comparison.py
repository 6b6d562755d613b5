"""A finished comparison of runs: the table's rows and cells, its JSON, and the notes a reader needs. Computes no statistics."""

from dataclasses import dataclass
from typing import Any

from eectl.core.json_files import sealed
from eectl.evaluation.results import Evaluation
from eectl.evaluation.tables import budget_name
from eectl.reports.published import PAPER, PublishedCell, PublishedTable

KIND, SCHEMA = "report", 1
NO_NUMBER = "-"
_FACTS = (
    "task",
    "data",
    "backbone",
    "split",
    "num_rows",
    "criteria",
    "protocol",
    "lookup",
    "cost",
    "measured",
    "budgets",
    "measure",
)


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
    """The seeds of one setting and regime. `cells` and `published` have an entry per budget, None where there is no number."""

    label: str
    regime: str
    seeds: tuple[int, ...]
    cells: tuple[Cell | None, ...]
    published: tuple[PublishedCell | None, ...]
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Comparison:
    """The table of many runs: a row per setting and regime, a column per budget.

    `budgets` are in % of the plain backbone's cost, rising; None is unlimited and comes last. `data` and `backbone` name what
    all runs share, `cost` and `measured` say what costs are counted in, as an evaluation does. `measure` is an entry of MEASURES
    that is shown in place of the score.
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
    measure: str | None = None

    @property
    def shown(self) -> str:
        """Return the name of the numbers: an entry of MEASURES, else the task whose score they are."""
        return self.measure or self.task

    def to_json(self) -> dict[str, Any]:
        """Return everything unrounded, with kind, schema number and digest: accuracies and costs as fractions of 1."""
        papers = self.published and {"paper": PAPER, "table": self.published.number, "setting": self.published.setting}
        about = {"kind": KIND, "schema": SCHEMA, **{name: getattr(self, name) for name in _FACTS}}
        rows = [self._row_json(row) for row in self.rows]
        return sealed({**about, "rows": rows, "published": papers, "notes": notes(self)})

    def _row_json(self, row: Row) -> dict[str, Any]:
        cells = [
            {
                "budget": budget,
                "mean": cell and cell.mean,
                "std": cell and cell.std,
                "mean_cost": cell and cell.share,
                "published_mean": papers and papers.mean,
                "published_std": papers and papers.std,
            }
            for budget, cell, papers in zip(self.budgets, row.cells, row.published, strict=True)
        ]
        return {"label": row.label, "regime": row.regime, "seeds": row.seeds, "cells": cells}


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the table must know: whose thresholds, budgets that were overshot, what is missing."""
    said = []
    if comparison.measured is not None:
        said.append(f"Budgets and costs are time, measured on {comparison.measured}.")
    if comparison.lookup == "average-first" or comparison.protocol == "paper":
        said.append(f"The authors' protocol: thresholds were chosen on the {comparison.split} split that they are scored on.")
    over = [
        f"{cell.share:.1%} for {budget_name(budget)} ({' '.join(filter(None, (row.label, row.regime)))})"
        for row in comparison.rows
        for budget, cell in zip(comparison.budgets, row.cells, strict=True)
        if cell is not None and budget is not None and f"{100 * cell.share:.1f}" != f"{budget:.1f}" and 100 * cell.share > budget
    ]
    if over:
        said.append(f"! mean cost over budget on the {comparison.split} split: {', '.join(over)}.")
    if any(cell is None for row in comparison.rows for cell in row.cells):
        said.append(f"{NO_NUMBER} no number: some seed cannot stay within that budget, or was not evaluated at it.")
    if any(len(row.seeds) == 1 for row in comparison.rows):
        said.append(f"± {NO_NUMBER}: one seed.")
    if comparison.published is not None:
        number, setting = comparison.published.number, comparison.published.setting
        said.append(f"paper: Table {number} ({setting}) of {PAPER}; its data and recipe may differ from these runs'.")
    return said
