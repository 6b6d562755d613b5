"""How anything is printed on stdout: consoles, tables, numbers and JSON, whatever they are about. No torch.

Tables are made to fit 80 columns and never cut a cell short; where a terminal is narrower, cells wrap. NO_COLOR and pipes are
rich's business.
"""

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eectl.core.files import clean_json


def silent(text: str) -> None:
    """Print nothing."""


def show_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, NaN as null, with no colour and no wrapping."""
    print(json.dumps(clean_json(value), indent=2))


def make_console() -> Console:
    """Stdout, without colouring of numbers."""
    return Console(highlight=False)


def make_table(*columns: str) -> Table:
    """An empty table whose cells fold where they do not fit."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_table(console: Console, title: str, table: Table) -> None:
    """A table under its title."""
    console.print(title, style="bold", markup=False)
    console.print(table)


def score_text(value: float, error: float | None, task: str) -> str:
    """Accuracies as percentages with two decimals, errors of a regression as they are."""
    scale, form, error_form = (100, ".2f", ".2f") if task == "classification" else (1, ".4g", ".2g")
    return f"{scale * value:{form}}" + ("" if error is None else f" ± {scale * error:{error_form}}")
