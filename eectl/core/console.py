"""Print on stdout: tables, numbers and JSON, whatever they are about. No torch.

Tables are made to fit 80 columns and never cut a cell short; where a terminal is narrower, cells wrap. rich sees to NO_COLOR and
to pipes.
"""

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eectl.core.json_files import clean_json


def silent(text: str) -> None:
    """Print nothing."""


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, NaN as null, with no colour and no wrapping."""
    print(json.dumps(clean_json(value), indent=2))


def make_console() -> Console:
    """Return a console for stdout that does not colour numbers."""
    return Console(highlight=False)


def make_table(*columns: str) -> Table:
    """Return an empty table with these columns, whose cells wrap where they do not fit."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_table(console: Console, title: str, table: Table) -> None:
    """Print a table under its title."""
    console.print(title, style="bold", markup=False)
    console.print(table)


def score_text(value: float, error: float | None, task: str) -> str:
    """Return a score with its standard error as text: an accuracy in percent, the error of a regression as it is."""
    scale, form, error_form = (100, ".2f", ".2f") if task == "classification" else (1, ".4g", ".2g")
    return f"{scale * value:{form}}" + ("" if error is None else f" ± {scale * error:{error_form}}")
