"""Print on stdout: tables, numbers and JSON, whatever they are about. No torch.

Tables are made to fit 80 columns and never cut a cell short; where a terminal is narrower, cells wrap. rich sees to NO_COLOR and
to pipes. Strings may come from files of anyone's: nothing in them is obeyed, neither a terminal's escapes nor rich's markup.
"""

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eectl.core.errors import visible
from eectl.core.json_files import clean_json
from eectl.core.streams import spelled


def silent(text: str) -> None:
    """Print nothing."""


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, NaN as null, with no colour and no wrapping."""
    print(json.dumps(clean_json(value), indent=2))


def show_text(text: str) -> None:
    """Print text that brings its ends of lines."""
    print(visible(text), end="")


class PlainConsole(Console):
    """A console that shows every string as it is, with control characters as escapes and signs that its encoding has."""

    def __init__(self, **how: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """Return a string as rich lays it out: what is printed, and a cell of a table."""
        return super().render_str(spelled(visible(text), self.encoding), **how)


def make_console(*, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> PlainConsole:
    """Return a console for stdout, or for stderr, that colours no numbers; `quiet` shows nothing, `soft_wrap` wraps nothing."""
    return PlainConsole(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap)


def plain_box() -> Box:
    """Return the lines of a table: a rule below its head, which the stream spells where it must.

    Rich takes another box, with lines all over, for an encoding without the rule, unless a box says that it is ASCII.
    """
    return Box(str(SIMPLE_HEAD), ascii=True)


def make_table(*columns: str) -> Table:
    """Return an empty table with these columns, whose cells wrap where they do not fit."""
    table = Table(box=plain_box(), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_table(console: Console, title: str, table: Table) -> None:
    """Print a table under its title."""
    console.print(title, style="bold", markup=False)
    console.print(table)


def is_share(score_name: str) -> bool:
    """Return whether a score is a share, which is shown in percent: an accuracy or an F1, and no error of numbers."""
    return score_name in ("accuracy", "F1")


def score_text(value: float, error: float | None, task: str) -> str:
    """Return a score with its standard error as text: an accuracy or F1 in percent, the error of a regression as it is."""
    scale, form, error_form = (1, ".4g", ".2g") if task == "regression" else (100, ".2f", ".2f")
    return f"{scale * value:{form}}" + ("" if error is None else f" ± {scale * error:{error_form}}")
