"""Print a comparison of runs, and the list of the paper's tables, on stdout."""

from collections.abc import Sequence

from eectl.core.console import make_console, make_table, print_table, show_text
from eectl.core.errors import lookup
from eectl.reports.comparison import NO_NUMBER, Comparison, notes
from eectl.reports.formats import FORMATS
from eectl.reports.lines import columns_of, first_columns, lines_of, plus_minus, table_title
from eectl.reports.published import PAPER, PublishedTable


def check_form(form: str) -> None:
    """Raise EectlError unless `form` is one that `show_comparison` takes; worth asking before any work."""
    lookup({"table": None, **FORMATS}, form, what="format")


def show_comparison(comparison: Comparison, *, form: str = "table") -> None:
    """Print the comparison; `form` is table or an entry of FORMATS."""
    if form != "table":
        show_text(FORMATS[form](comparison))
        return
    console = make_console()
    table = make_table(*columns_of(comparison))
    table.show_edge, table.padding = False, (0, 1, 0, 0)  # 80 columns hold five budgets beside the longest regime
    for column in table.columns[: len(first_columns(comparison))]:
        column.justify = "left"
    for line in lines_of(comparison):
        style = "italic" if line.is_papers else ""
        words = [console.render_str(_tight(mean, std), style="bold" if best else style) for mean, std, best in line.cells]
        table.add_row(*(console.render_str(word, style=style) for word in line.first), *words)
    print_table(console, table_title(comparison), table)
    for note in notes(comparison):
        console.print(note, markup=False)


def show_published(tables: Sequence[PublishedTable]) -> None:
    """List the published tables that a report can show beside ours."""
    table = make_table("table", "setting", "variants", "regimes", "budgets, %")
    for column in table.columns[1:]:
        column.justify = "left"
    for each in tables:
        budgets = ", ".join("unlimited" if budget is None else f"{budget:g}" for budget in each.budgets)
        table.add_row(each.number, each.setting, ", ".join(filter(None, each.variants)), ", ".join(each.regimes), budgets)
    print_table(make_console(), f"{PAPER}: what --published TABLE[:VARIANT] takes", table)


def _tight(mean: str, std: str) -> str:
    """Join mean and std without spaces, so that five budgets fit 80 columns."""
    return f"{mean}±{std}" if std.strip(NO_NUMBER) else plus_minus(mean, std)
