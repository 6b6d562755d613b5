"""Columns of CSV, TSV, JSONL and Parquet files, and what their cells mean: texts, classes, numbers. Knows no tokens.

Every complaint about a cell names the file and the row, counted from 1 without the header.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError, closest, visible
from eectl.recipe.choices import FILE_CHOICES, in_order

MOST_CHARACTERS = 16 * 2**20  # of a cell, or of a line of JSON
MOST_TARGET = 1e15  # in size: the squares of larger ones leave float32 once there are thousands of rows
HIDDEN = -1  # the label of rows whose class a published data set does not tell
_PART = re.compile(r"-(\d{1,9})-of-(\d{1,9})\.")
_MANY_ROWS = 10**6  # from which a Parquet file must have a byte for each row
_MOST_NAMED = 12  # columns that a message lists
_LONGEST = 40  # characters of each


@dataclass(frozen=True)
class Table:
    """Some columns of a file, or of the parts of one: `columns[name][row]`; `where(row)` names a row for messages.

    `noun` is what messages call a column.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    noun: str = "column"

    def where(self, row: int) -> str:
        """Return what messages call row `row` (from 0)."""
        return f"{self.path}: row {row + 1}"


def find_table(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the one file of a split in `folder`, NAME.csv (or another of READERS), or its parts NAME-00000-of-00002.parquet.

    Empty where there is none. Raises EectlError where several files mean the same split, and where a part is missing.
    """
    found = [path for name in names for kind in READERS if (path := folder / f"{name}{kind}").is_file()]
    parts = [path for name in names for path in sorted(folder.glob(f"{name}-[0-9]*-of-[0-9]*.parquet"))]
    if len(found) + bool(parts) > 1:
        raise EectlError(f"{folder}: {' and '.join(path.name for path in (found + parts)[:2])} mean the same split; keep one")
    check_parts(parts)
    return found or parts


def check_parts(paths: Sequence[Path]) -> None:
    """Raise EectlError where files say in their names of how many parts they are, as 00000-of-00002, and one is missing."""
    numbers = [(int(match[1]), int(match[2])) for path in paths if (match := _PART.search(path.name)) is not None]
    if not numbers:
        return
    count = numbers[0][1]
    missing = next((number for number in range(count) if (number, count) not in numbers), None)
    if missing is not None or len(numbers) > count:
        what = f"part {missing} is missing" if missing is not None else "there are others beside them"
        raise EectlError(f"{paths[0]}: one of {count:,} parts, and {what}; fetch the data set again")


def read_table(paths: Sequence[Path], names: Sequence[str]) -> Table:
    """Return the columns `names` of a file, or of parts that follow each other.

    Raises EectlError for a file that cannot be read or is broken, a column that is not there, and no rows.
    """
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for path in paths:
        try:
            part = READERS[path.suffix](path, names)
        except UnicodeDecodeError as error:
            raise EectlError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
        except OSError as error:
            raise EectlError(f"{path}: cannot be read ({error.strerror or ' '.join(str(error).split())})") from error
        for name, values in columns.items():
            values += part[name]
    if not columns[names[0]]:
        raise EectlError(f"{paths[0]}: no rows; each row is a text and its {names[-1]}")
    return Table(paths[0], columns)


def _require(path: Path, names: Iterable[str], there: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            short = [each[:_LONGEST] for each in there[:_MOST_NAMED]]
            listed = ", ".join(map(repr, short)) + (f" and {len(there) - _MOST_NAMED:,} more" if there[_MOST_NAMED:] else "")
            raise EectlError(
                f"{path}: no column '{name}'{closest(name, short)}; it has {listed or 'none'}; set data.text and data.target "
                "(--text and --target)"
            )


def _read_delimited(path: Path, names: Sequence[str], *, delimiter: str, quoting: Literal[0, 3]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    before = csv.field_size_limit(MOST_CHARACTERS)  # the default refuses cells of 131,072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            header = next(reader, [])
            _require(path, names, header)
            places = {name: header.index(name) for name in names}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise EectlError(
                        f"{path}: line {reader.line_num}: {len(row)} cells for {len(header)} columns; quote cells that hold a "
                        f"{'tab' if delimiter == chr(9) else 'comma'} or a line break"
                    )
                for name, place in places.items():
                    columns[name].append(row[place])
    except csv.Error as error:
        raise EectlError(f"{path}: line {reader.line_num}: {error}; mend the quotes of this cell") from error
    finally:
        csv.field_size_limit(before)
    return columns


def _read_csv(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    return _read_delimited(path, names, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Read tab-separated cells without quoting, as GLUE's own files are."""
    return _read_delimited(path, names, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_jsonl(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Read one object a line; other tools' NaN, and what lies in columns that are not asked for, is let pass."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_CHARACTERS + 1), ""), 1):
            if not line.strip():
                continue
            if len(line) > MOST_CHARACTERS:
                raise EectlError(f"{path}: line {number}: more than {MOST_CHARACTERS:,} characters; each line is one object")
            try:
                value = json.loads(line)
                if "\\u" in line:
                    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            except (ValueError, RecursionError) as error:
                raise EectlError(f"{path}: line {number}: not JSON ({error!s:.100}); each line is one object") from error
            if not isinstance(value, dict):
                raise EectlError(f'{path}: line {number}: a {type(value).__name__}; each line is one object, {{"text": …}}')
            _require(path.with_name(f"{path.name}: line {number}"), names, list(value))
            for name in names:
                columns[name].append(value[name])
    return columns


def _read_parquet(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise EectlError(f"{path}: Parquet needs pyarrow; run pip install 'eectl[text]', or convert the file to CSV") from error
    try:
        about = parquet.read_metadata(path)
        rows = max(about.num_rows, sum(about.row_group(group).num_rows for group in range(about.num_row_groups)))
        if rows > max(_MANY_ROWS, path.stat().st_size):
            raise EectlError(f"{path}: says that it has {rows:,} rows, and has {path.stat().st_size:,} bytes; write it again")
        _require(path, names, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(names))
        return {name: table.column(name).to_pylist() for name in names}
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        reason = visible(" ".join(str(error).split()))[:200]
        raise EectlError(f"{path}: not Parquet, or cut short ({reason}); write it again") from error


def texts(table: Table, name: str, *, empty: bool = False) -> list[str]:
    """Return a column of texts; raises EectlError for a cell that is no text, or, unless `empty` is taken, only spaces."""
    for row, value in enumerate(table.columns[name]):
        if value is None or (isinstance(value, str) and not value.strip()):
            if not empty or value is None:
                raise EectlError(f"{table.where(row)}: {table.noun} '{name}' is empty; fill it in or take the row out")
        elif not isinstance(value, str):
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' is {value!r:.80}, not a text")
    return list(table.columns[name])


def numbers(table: Table, name: str) -> NDArray[np.float64]:
    """Return a column of finite numbers; raises EectlError that names the first cell that is none."""
    result = np.empty(len(table.columns[name]), dtype=np.float64)
    for row, value in enumerate(table.columns[name]):
        result[row] = _number(value)
        if not math.isfinite(result[row]):
            what = "is empty" if value in (None, "") else f"is {value!r:.80}, not a number"
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' {what}; regression needs a number in every row")
        if abs(result[row]) > MOST_TARGET:
            raise EectlError(
                f"{table.where(row)}: {table.noun} '{name}' is {value!r:.80}, and its square is too large to compute with; "
                f"targets may be up to {MOST_TARGET:g} in size: mend that row, or divide the column by a number"
            )
    return result


def _number(value: Any) -> float:
    """Return a cell as a number; NaN where it is none, such as 1_0 or digits of other scripts, which Python reads."""
    if isinstance(value, bool) or value is None or (isinstance(value, str) and (not value.isascii() or "_" in value)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def names_of(table: Table, name: str) -> list[str]:
    """Return a column of class names, whole numbers as texts; raises EectlError for an empty cell or a fraction."""
    result = []
    for row, value in enumerate(table.columns[name]):
        if value is None or value == "":
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' is empty; every row needs a class")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | int):
            raise EectlError(
                f"{table.where(row)}: {table.noun} '{name}' is {value!r:.80}, not a class; set data.task to regression (--task "
                "regression)"
            )
        result.append(str(value))
    return result


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names, sorted as numbers where all of them are whole numbers, else as texts."""
    distinct = set(names)
    whole = all(name.removeprefix("-").isascii() and name.removeprefix("-").isdecimal() for name in distinct)
    return tuple(sorted(distinct, key=(lambda name: (int(name), name)) if whole else lambda name: (0, name)))


def class_cells(table: Table, name: str, known: Sequence[str] | None) -> list[str | None]:
    """Return a column of class names; where the classes are `known`, the column counts them from 0, and HIDDEN becomes None.

    Raises EectlError for a cell that is no class.
    """
    if known is None:
        return list(names_of(table, name))
    for row, value in enumerate(table.columns[name]):
        if not isinstance(value, int) or not HIDDEN <= value < len(known):
            raise EectlError(
                f"{table.where(row)}: {table.noun} '{name}' is {value!r:.80}, and its {len(known)} classes count from 0"
            )
    return [None if value == HIDDEN else known[value] for value in table.columns[name]]


def classes_among(names: Sequence[str | None], known: Sequence[str] | None, place: Path, target: str) -> tuple[str, ...]:
    """Return the classes that `names` [row] hold, in the order in which they are `known`, else sorted.

    Raises EectlError where there are fewer than two.
    """
    present = {name for name in names if name is not None}
    classes = sorted_classes(present) if known is None else tuple(dict.fromkeys(each for each in known if each in present))
    if len(classes) < 2:
        only = f"the one class '{visible(classes[0])[:80]}'" if classes else "no class"
        raise EectlError(f"{place}: column '{target}' has {only}; two or more are needed")
    return classes


READERS: dict[str, Callable[[Path, Sequence[str]], dict[str, list[Any]]]] = in_order(
    FILE_CHOICES,
    {
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    },
)
