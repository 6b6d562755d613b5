"""Answers as rows of JSON lines or CSV, written as they come, and as a table for people. Chooses nothing."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from eectl.core.console import PlainConsole, plain_box
from eectl.core.errors import EectlError
from eectl.core.files import open_text, replacing
from eectl.core.json_files import clean_json
from eectl.deploy.answers import RowAnswer

FORMS = (".jsonl", ".csv")
BETWEEN = "|"  # labels of a cell
NARROWEST = 10  # letters of an input's name in a table


@dataclass(frozen=True)
class RowOut:
    """One input and its answer: `shown` names the input (a file; or file, row and text), in the order of its columns."""

    shown: Mapping[str, Any]
    answer: RowAnswer

    def to_json(self) -> dict[str, Any]:
        """Return the row of JSON."""
        return {**self.shown, **self.answer.to_json()}


Write = Callable[[RowOut], None]


def check_rows_file(path: Path) -> None:
    """Raise EectlError unless `path` can take rows: a .jsonl or .csv file, and no folder."""
    if path.is_dir():
        raise EectlError(f"-o {path}: a folder; name a file in it, such as {path / 'answers.jsonl'}")
    if path.suffix.lower() not in FORMS:
        raise EectlError(f"-o {path}: answers are written as {' or '.join(FORMS)}; name such a file")


@contextmanager
def writing_rows(path: Path, *, overwrite: bool = True) -> Iterator[Write]:
    """A file that takes rows in the form that its name says; it is there when the block ends well."""
    with replacing(path, overwrite=overwrite) as temporary, open_text(temporary) as file:
        yield _csv_writer(file) if path.suffix.lower() == ".csv" else json_writer(file)


def json_writer(file: TextIO) -> Write:
    """Return what writes a row as one line of JSON, in ASCII where the file cannot hold every character."""
    holds_all = (file.encoding or "utf-8").lower().startswith("utf")

    def write(row: RowOut) -> None:
        file.write(json.dumps(clean_json(row.to_json()), ensure_ascii=not holds_all) + "\n")

    return write


def _csv_writer(file: TextIO) -> Write:
    """Return what writes a row as a line of CSV, a header before the first."""
    writer = csv.writer(file)
    is_first = True

    def write(row: RowOut) -> None:
        nonlocal is_first
        cells = {**row.shown, **_flat(row.answer)}
        if is_first:
            writer.writerow(cells)
        is_first = False
        writer.writerow(cells.values())

    return write


def _flat(answer: RowAnswer) -> dict[str, Any]:
    """Return the cells of an answer: `top` becomes label_2, probability_2, …; labels stand in one cell, values in several."""
    cells = answer.to_json()
    cells.pop("top", None)
    if answer.labels is not None:
        return cells | {name: BETWEEN.join(map(str, cells[name])) for name in ("labels", "probabilities")}
    if answer.numbers:
        cells.pop("values")
        return {f"value_{name}": value for name, value in answer.numbers} | cells
    for number, (label, probability) in enumerate(answer.top[1:], 2):
        cells |= {f"label_{number}": label, f"probability_{number}": probability}
    return cells


class AnswerTable:
    """A table on a terminal that is printed as rows come: the widths of its columns are known before the first.

    `take` a row, `flush` what was taken. Further classes of a row (`--top`) stand below it.
    """

    def __init__(self, console: PlainConsole, *, classes: Sequence[str], is_text: bool) -> None:
        self._console, self._is_text = console, is_text
        self._header = True
        self._rows: list[RowOut] = []
        self._class = min(max([len(name) for name in classes] + [5]), max(console.width // 4, 5)) if classes else 10
        self._is_regression = not classes

    def take(self, row: RowOut) -> None:
        """Keep a row for the next flush."""
        self._rows.append(row)

    def flush(self) -> None:
        """Print the rows that were taken, under a header the first time."""
        if not self._rows:
            return
        fixed = {"value": self._class} if self._is_regression else {"class": self._class, "probability": 11}
        fixed |= {"exit": 4, "cost": 7}
        rest = max(self._console.width - sum(fixed.values()) - 3 * len(fixed), NARROWEST)
        table = Table(box=plain_box(), pad_edge=False, show_header=self._header, show_edge=False)
        table.add_column("text" if self._is_text else "image", width=rest, overflow="fold")
        for name, width in fixed.items():
            table.add_column(name, width=width, justify="right", overflow="fold")
        for row in self._rows:
            for cells in self._cells(row):
                table.add_row(*cells)
        self._console.print(table)
        self._header, self._rows = False, []

    def _cells(self, row: RowOut) -> Iterator[list[str]]:
        answer = row.answer
        texts = [str(value) for name, value in row.shown.items() if name.startswith("text")]
        name = " | ".join(texts) if self._is_text else str(row.shown["file"])
        rest = [str(answer.exit), f"{answer.cost:.1%}"]
        if answer.value is not None or answer.numbers:
            values = [("", answer.value or 0.0)] if answer.value is not None else answer.numbers
            for place, (target, value) in enumerate(values):
                shown = f"{target} {value:.4g}".strip()
                yield [name if not place else "", shown, *(rest if not place else ["", ""])]
            return
        if answer.labels is not None and len(answer.top) < 2:  # those that apply; with --top the likeliest, as they come
            for place, (label, probability) in enumerate(answer.labels or (("none", 0.0),)):
                share = f"{probability:.1%}" if answer.labels else ""
                yield [name if not place else "", label, share, *(rest if not place else ["", ""])]
            return
        for place, (label, probability) in enumerate(answer.top):
            yield [name if not place else "", label, f"{probability:.1%}", *(rest if not place else ["", ""])]
