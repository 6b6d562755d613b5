"""Write a comparison of runs as text for files and pipes: Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable

from eectl.core.json_files import clean_json
from eectl.reports.comparison import NO_NUMBER, Comparison, notes
from eectl.reports.lines import cell_texts, columns_of, first_columns, lines_of, plus_minus, table_title


def markdown(comparison: Comparison) -> str:
    """Return a GitHub table under its title, with the notes as a list."""
    columns = columns_of(comparison)
    num_first = len(first_columns(comparison))
    rule = ["---"] * num_first + ["---:"] * (len(columns) - num_first)
    rows = [columns, rule]
    for line in lines_of(comparison):
        first = [word.replace("|", "\\|") for word in line.first]
        cells = [f"**{mean}**{std and f' ± {std}'}" if best else plus_minus(mean, std) for mean, std, best in line.cells]
        rows.append([f"*{word}*" if word and line.is_papers else word for word in [*first, *cells]])
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([table_title(comparison), "", *body, "", *(f"- {note}" for note in _listed(comparison))]).rstrip("\n") + "\n"


def _listed(comparison: Comparison) -> list[str]:
    """Return the notes; one that begins with a sign of Markdown's own has it quoted."""
    return [f"`{note[0]}`{note[1:]}" if note[0] in "-!±" else note for note in notes(comparison)]


def latex(comparison: Comparison) -> str:
    r"""Return a tabular in booktabs' style, with title and notes as comments; it needs \usepackage{booktabs}."""
    num_first = len(first_columns(comparison))
    layout = "l" * num_first + "r" * len(comparison.budgets)
    lines = [f"% {table_title(comparison)}", r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{layout}}}", r"\toprule"]
    lines += [f"{' & '.join(map(_escaped, columns_of(comparison)))} \\\\", r"\midrule"]
    for line in lines_of(comparison):
        cells = []
        for mean, std, best in line.cells:
            number = rf"\textbf{{{mean}}}" if best else mean.replace(NO_NUMBER, "--") if mean == NO_NUMBER else mean
            cells.append(number + (rf" $\pm$ {std.replace(NO_NUMBER, '--') if std == NO_NUMBER else std}" if std else ""))
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
    """Return one line per row and budget, for other programs; a missing number is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    first = ["setting", "regime", "budget_percent", "seeds", "mean", "std", "mean_cost_percent"]
    writer.writerow([*first, "published_mean", "published_std"])
    for row in comparison.rows:
        for budget, cell, papers in zip(comparison.budgets, row.cells, row.published, strict=True):
            name = "unlimited" if budget is None else f"{budget:g}"
            numbers = [_plain(text) for each in (cell, papers) for text in cell_texts(each, comparison.shown)]
            share = "" if cell is None else f"{100 * cell.share:.2f}"
            writer.writerow([row.label, row.regime, name, len(row.seeds), *numbers[:2], share, *numbers[2:]])
    return out.getvalue()


def _plain(text: str) -> str:
    return "" if text == NO_NUMBER else text


def as_json(comparison: Comparison) -> str:
    """Return the comparison's JSON as text, NaN as null."""
    return json.dumps(clean_json(comparison.to_json()), indent=2) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "latex": latex, "csv": as_csv, "json": as_json}
