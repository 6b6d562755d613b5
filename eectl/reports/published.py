"""The numbers of the paper, "How to Train Your Multi-Exit Model?", Tables 1, 6, 7 and 8 to 20, to stand beside ours.

`published.csv` has them as they are printed: test accuracy in %, MSE for Table 14, a budget in % of the plain backbone's cost,
and the standard deviation over runs where the paper gives one. Tables 2 to 5 repeat numbers of these. Compares nothing.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from eectl.core.errors import EectlError, lookup
from eectl.recipe.regimes import REGIMES

PAPER = "How to Train Your Multi-Exit Model?"
REGRESSION = ("14",)  # the tables of mean squared errors; all others are accuracies


@dataclass(frozen=True)
class PublishedCell:
    """One printed number and its standard deviation, None where there is none; accuracies as fractions of 1."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper; `cells` maps (variant, regime, budget) to a number in the paper's order, None is unlimited.

    A variant is what stands beside the regime, such as 2L-1024 or every-2, and empty where nothing does.
    """

    number: str
    setting: str
    task: str
    cells: Mapping[tuple[str, str, float | None], PublishedCell]

    @property
    def variants(self) -> list[str]:
        """The variants, in the paper's order."""
        return list(dict.fromkeys(variant for variant, _, _ in self.cells))

    @property
    def regimes(self) -> list[str]:
        """The regimes, in the paper's order, in small letters."""
        return list(dict.fromkeys(regime for _, regime, _ in self.cells))

    @property
    def budgets(self) -> list[float | None]:
        """The budgets, in the paper's order."""
        return list(dict.fromkeys(budget for _, _, budget in self.cells))


def published_tables() -> dict[str, PublishedTable]:
    """Read all published tables, by their number as text, in rising order."""
    text = (resources.files("eectl.reports") / "published.csv").read_text(encoding="utf-8")
    lines: dict[str, list[dict[str, str]]] = {}
    for line in csv.DictReader(text.splitlines()):
        lines.setdefault(line["table"], []).append(line)
    return {number: _table(number, lines[number]) for number in sorted(lines, key=int)}


def _table(number: str, lines: Sequence[Mapping[str, str]]) -> PublishedTable:
    task = "regression" if number in REGRESSION else "classification"
    scale = 1 if task == "regression" else 100
    cells = {}
    for line in lines:
        if not line["mean"]:
            continue  # printed as "-": even the first exit is over that budget
        regime, _, variant = line["regime"].partition(" ")
        assert regime.lower() in REGIMES
        budget = None if line["budget_percent"] == "unlimited" else float(line["budget_percent"])
        std = float(line["std"]) / scale if line["std"] else None
        cells[variant, regime.lower(), budget] = PublishedCell(float(line["mean"]) / scale, std)
    return PublishedTable(number, lines[0]["setting"], task, cells)


def find_published(text: str) -> tuple[PublishedTable, str | None]:
    """Find what `--published TABLE[:VARIANT]` asks for; the variant is None where none is named.

    Raises EectlError for an unknown table or variant, with those there are.
    """
    number, colon, name = text.partition(":")
    table = lookup(published_tables(), number, what="published table")
    if not colon:
        return table, None
    named = {variant.lower(): variant for variant in table.variants}
    if set(named) == {""}:
        raise EectlError(f"--published {text}: table {number} ({table.setting}) has one setting; write --published {number}")
    if name.lower() not in named:
        lookup({variant or "(none)": None for variant in table.variants}, name, what=f"variant of published table {number}")
    return table, named[name.lower()]
