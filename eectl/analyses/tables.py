"""Show an answer on stdout: tables of numbers, notes and the reading. Computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from eectl.core.console import make_console, make_table, print_table

Scalar = str | int | float | None


@dataclass(frozen=True)
class Listing:
    """A table for people: numbers are shown with four digits, None as `·`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Scalar, ...], ...]


def show_answer(tables: Sequence[Listing], reading: Sequence[str], notes: Sequence[str]) -> None:
    """Print the tables of an analysis, what should not be overlooked, and its reading."""
    console = make_console()
    for listing in tables:
        table = make_table(*listing.columns)
        for row in listing.rows:
            table.add_row(*map(_cell, row))
        print_table(console, listing.title, table)
    for sentence in (*notes, *reading):
        console.print(sentence, markup=False)


def _cell(value: Scalar) -> str:
    if value is None:
        return "·"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
