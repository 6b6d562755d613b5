"""What a comparison of runs looks like: a table on stdout, or Markdown, LaTeX, CSV and JSON as text. Computes nothing.

Accuracies are shown in %, errors of a regression as they are. Below a row of ours stands the paper's, where there is one.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from eectl.core.console import make_console, make_table, print_table
from eectl.core.errors import lookup
from eectl.core.files import clean_json
from eectl.evaluation.tables import budget_name
from eectl.models.losses import TASKS
from eectl.reports.compare import Cell, Comparison
from eectl.reports.published import PAPER, PublishedCell, PublishedTable

KIND, SCHEMA = "report", 1
_NO_NUMBER = "-"


@dataclass(frozen=True)
class _Line:
    """One line of a table for people: its first cells, then (mean, std, is best) for each budget."""

    first: tuple[str, ...]
    cells: tuple[tuple[str, str, bool], ...]
    is_papers: bool


def check_form(form: str) -> None:
    """Raise EectlError unless `form` is one that `show_comparison` takes; worth asking before any work."""
    lookup({"table": None, **FORMATS}, form, what="format")


def show_comparison(comparison: Comparison, *, form: str = "table") -> None:
    """The comparison on stdout; `form` is table or an entry of FORMATS."""
    if form != "table":
        print(FORMATS[form](comparison), end="")
        return
    console = make_console()
    table = make_table(*_columns(comparison))
    table.show_edge, table.padding = False, (0, 1, 0, 0)  # 80 columns hold five budgets beside the longest regime
    for column in table.columns[: len(_first_columns(comparison))]:
        column.justify = "left"
    for line in _lines(comparison):
        style = "italic" if line.is_papers else ""
        words = [Text(_tight(mean, std), style="bold" if best else style) for mean, std, best in line.cells]
        table.add_row(*(Text(word, style=style) for word in line.first), *words)
    print_table(console, title(comparison), table)
    for note in notes(comparison):
        console.print(note, markup=False)


def show_published(tables: Sequence[PublishedTable]) -> None:
    """The published tables that a report can stand beside."""
    table = make_table("table", "setting", "variants", "regimes", "budgets, %")
    for column in table.columns[1:]:
        column.justify = "left"
    for each in tables:
        budgets = ", ".join("unlimited" if budget is None else f"{budget:g}" for budget in each.budgets)
        table.add_row(each.number, each.setting, ", ".join(filter(None, each.variants)), ", ".join(each.regimes), budgets)
    print_table(make_console(), f"{PAPER}: what --published TABLE[:VARIANT] takes", table)


def title(comparison: Comparison) -> str:
    """What the numbers are, in one sentence."""
    name = _score_name(comparison.task)
    rows = f"{comparison.split} split, {comparison.num_rows:,} rows"
    chosen = "the authors' grid" if comparison.lookup == "average-first" else f"{comparison.protocol} thresholds"
    criterion = "" if len(comparison.criteria) > 1 else f"{comparison.criteria[0]}, "
    how = f"{rows}; {criterion}{chosen}, {comparison.lookup}"
    return f"{comparison.data}, {comparison.backbone}: {name}, mean ± std over seeds ({how})"


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table must know: where the thresholds come from, budgets that were overshot, whose the rest is."""
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
        said.append(f"{_NO_NUMBER} no number: some seed cannot stay within that budget, or was not evaluated at it.")
    if any(len(row.seeds) == 1 for row in comparison.rows):
        said.append(f"± {_NO_NUMBER}: one seed.")
    if comparison.published is not None:
        number, setting = comparison.published.number, comparison.published.setting
        said.append(f"paper: Table {number} ({setting}) of {PAPER}; its data and recipe may differ from these runs'.")
    return said


def _score_name(task: str) -> str:
    known = TASKS[task]
    return f"{known.score_name} in %" if known.higher_is_better else f"{known.score_name} (lower is better)"


def _first_columns(comparison: Comparison) -> list[str]:
    return [*(["setting"] if any(row.label for row in comparison.rows) else []), "regime", "seeds"]


def _columns(comparison: Comparison) -> list[str]:
    return [*_first_columns(comparison), *map(budget_name, comparison.budgets)]


def _lines(comparison: Comparison) -> list[_Line]:
    """Every line for people; bold is the best of ours in each column, as far as the digits shown tell, among two or more."""
    has_labels = any(row.label for row in comparison.rows)
    best = [_best([row.cells[index] for row in comparison.rows], comparison.task) for index in range(len(comparison.budgets))]
    lines = []
    for row in comparison.rows:
        first = (row.label or _NO_NUMBER, row.regime) if has_labels else (row.regime,)
        cells = []
        for cell, top in zip(row.cells, best, strict=True):
            mean, std = _texts(cell, comparison.task)
            cells.append((mean, std, len(comparison.rows) > 1 and mean == top))
        lines.append(_Line((*first, str(len(row.seeds))), tuple(cells), is_papers=False))
        if any(row.published):
            papers = tuple((*_texts(cell, comparison.task), False) for cell in row.published)
            lines.append(_Line((*first[:-1], "paper", ""), papers, is_papers=True))
    return lines


def _best(cells: Sequence[Cell | None], task: str) -> str | None:
    """The best mean, as it is shown."""
    means = [cell.mean for cell in cells if cell is not None]
    if not means:
        return None
    return _value(max(means) if TASKS[task].higher_is_better else min(means), task)


def _texts(cell: Cell | PublishedCell | None, task: str) -> tuple[str, str]:
    """Mean and std as they are shown; the std is empty where the paper gives none, and both where there is no number."""
    if cell is None:
        return _NO_NUMBER, ""
    none = _NO_NUMBER if isinstance(cell, Cell) else ""
    return _value(cell.mean, task), none if cell.std is None else _value(cell.std, task, digits=2)


def _value(value: float, task: str, *, digits: int = 4) -> str:
    return f"{100 * value:.2f}" if task == "classification" else f"{value:.{digits}g}"


def _tight(mean: str, std: str) -> str:
    return f"{mean}±{std}" if std.strip(_NO_NUMBER) else _plus_minus(mean, std)


def _plus_minus(mean: str, std: str) -> str:
    return f"{mean} ± {std}" if std else mean


# --- text formats ------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """A GitHub table under a sentence, with the notes as a list."""
    columns = _columns(comparison)
    num_first = len(_first_columns(comparison))
    rule = ["---"] * num_first + ["---:"] * (len(columns) - num_first)
    rows = [columns, rule]
    for line in _lines(comparison):
        first = [word.replace("|", "\\|") for word in line.first]
        cells = [f"**{mean}**{std and f' ± {std}'}" if best else _plus_minus(mean, std) for mean, std, best in line.cells]
        rows.append([f"*{word}*" if word and line.is_papers else word for word in [*first, *cells]])
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([title(comparison), "", *body, "", *(f"- {note}" for note in _listed(comparison))]).rstrip("\n") + "\n"


def _listed(comparison: Comparison) -> list[str]:
    """The notes, none of which begins with a sign that Markdown reads as one of its own."""
    return [f"`{note[0]}`{note[1:]}" if note[0] in "-!±" else note for note in notes(comparison)]


def latex(comparison: Comparison) -> str:
    r"""A tabular in booktabs' style, with title and notes as comments; it needs \usepackage{booktabs}."""
    num_first = len(_first_columns(comparison))
    layout = "l" * num_first + "r" * len(comparison.budgets)
    lines = [f"% {title(comparison)}", r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{layout}}}", r"\toprule"]
    lines += [f"{' & '.join(map(_escaped, _columns(comparison)))} \\\\", r"\midrule"]
    for line in _lines(comparison):
        cells = []
        for mean, std, best in line.cells:
            number = rf"\textbf{{{mean}}}" if best else mean.replace(_NO_NUMBER, "--") if mean == _NO_NUMBER else mean
            cells.append(number + (rf" $\pm$ {std.replace(_NO_NUMBER, '--') if std == _NO_NUMBER else std}" if std else ""))
        first = [rf"\emph{{{_escaped(word)}}}" if word and line.is_papers else _escaped(word) for word in line.first]
        lines.append(f"{' & '.join([*first, *cells])} \\\\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in notes(comparison))]
    return "\n".join(lines) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def as_csv(comparison: Comparison) -> str:
    """One line per row and budget, for other programs; empty where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    first = ["setting", "regime", "budget_percent", "seeds", "mean", "std", "mean_cost_percent"]
    writer.writerow([*first, "published_mean", "published_std"])
    for row in comparison.rows:
        for budget, cell, papers in zip(comparison.budgets, row.cells, row.published, strict=True):
            name = "unlimited" if budget is None else f"{budget:g}"
            numbers = [_plain(text) for each in (cell, papers) for text in _texts(each, comparison.task)]
            share = "" if cell is None else f"{100 * cell.share:.2f}"
            writer.writerow([row.label, row.regime, name, len(row.seeds), *numbers[:2], share, *numbers[2:]])
    return out.getvalue()


def _plain(text: str) -> str:
    return "" if text == _NO_NUMBER else text


def as_json(comparison: Comparison) -> str:
    """Everything unrounded: accuracies and costs as fractions, with kind and schema number."""
    rows: list[dict[str, Any]] = [
        {
            "label": row.label,
            "regime": row.regime,
            "seeds": row.seeds,
            "cells": [
                {
                    "budget": budget,
                    "mean": cell and cell.mean,
                    "std": cell and cell.std,
                    "mean_cost": cell and cell.share,
                    "published_mean": papers and papers.mean,
                    "published_std": papers and papers.std,
                }
                for budget, cell, papers in zip(comparison.budgets, row.cells, row.published, strict=True)
            ],
        }
        for row in comparison.rows
    ]
    facts = ("task", "data", "backbone", "split", "num_rows", "criteria", "protocol", "lookup", "cost", "measured", "budgets")
    value = {"kind": KIND, "schema": SCHEMA, **{name: getattr(comparison, name) for name in facts}, "rows": rows}
    papers = comparison.published
    value["published"] = papers and {"paper": PAPER, "table": papers.number, "setting": papers.setting}
    return json.dumps(clean_json(value | {"notes": notes(comparison)}), indent=2) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "latex": latex, "csv": as_csv, "json": as_json}
