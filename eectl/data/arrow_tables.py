"""Tables of Parquet and Arrow, read a few columns at a time.

A table is taken for hostile: its offsets and its sizes are looked at before a cell is. Cells are not interpreted here.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eectl.core.errors import EectlError, closest, visible
from eectl.core.files import reading
from eectl.data.text_tables import Table

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev"),
    "calibration": ("calibration",),
    "test": ("test",),
}
MOST_LISTED = 2**26  # cells in the lists of a column
_BATCH = 256  # rows that are read at a time
_MOST_TIMES = 16  # as many bytes in columns of pictures as the file has: more is a bomb, since pictures do not shrink so
_LEEWAY = 2**26  # bytes for which that does not matter
_MANY_ROWS = 10**6  # from which a file must have a byte for each row
_FILE_START = b"ARROW1"  # of Arrow's file format; its other one is a stream
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_MOST_NAMED = 12  # columns that a message lists


class Sheet(Protocol):
    """A table on disk, whose columns are read as they are asked for."""

    @property
    def place(self) -> Path:
        """Return the file or folder that messages name."""

    @property
    def schema(self) -> Any:
        """Return the schema, one of pyarrow's."""

    def read(self, names: Sequence[str]) -> Any:
        """Return these columns as a table of pyarrow's."""


@dataclass(frozen=True)
class ArrowSheet:
    """A table of pyarrow's, in memory or mapped from files."""

    place: Path
    table: Any

    @property
    def schema(self) -> Any:
        """Return the table's schema."""
        return self.table.schema

    def read(self, names: Sequence[str]) -> Any:
        """Return columns, once their offsets have been looked at: damaged ones point anywhere into memory."""
        arrow = pyarrow(self.place)
        chosen = self.table.select(list(names))
        try:
            chosen.validate(full=True)
        except (arrow.ArrowException, OverflowError, ValueError) as error:
            raise _damaged(self.place, error) from error
        return chosen


@dataclass(frozen=True)
class ParquetSheet:
    """A table in Parquet files that follow each other and have the `schema` of the first."""

    paths: tuple[Path, ...]
    schema: Any

    @property
    def place(self) -> Path:
        """Return the first file."""
        return self.paths[0]

    def read(self, names: Sequence[str]) -> Any:
        """Return columns in memory; raises EectlError for a file that is damaged, or that unpacks to far more than its size."""
        arrow = pyarrow(self.place)
        batches = [batch for path in self.paths for batch in self._batches(path, list(names), arrow)]
        try:
            return arrow.Table.from_batches(batches, arrow.schema([self.schema.field(name) for name in names]))
        except arrow.ArrowException as error:
            raise EectlError(f"{self.place}: its parts have columns of several types; write them again") from error

    def _batches(self, path: Path, names: list[str], arrow: Any) -> Iterable[Any]:
        from pyarrow import parquet

        pictures = [name for name in names if is_picture(self.schema.field(name).type)]
        most, size = _MOST_TIMES * path.stat().st_size + _LEEWAY, 0
        try:
            with parquet.ParquetFile(path) as file:
                require(path, names, file.schema_arrow.names)
                for batch in file.iter_batches(_BATCH, columns=names):
                    size += sum(batch.column(batch.schema.get_field_index(name)).nbytes for name in pictures)
                    if size > most:
                        fault = f"its pictures have over {_MOST_TIMES} times the bytes of the file, and none shrink so"
                        raise EectlError(f"{path}: {fault}; write it again")
                    yield batch.select(names)
        except (arrow.ArrowException, OSError, OverflowError, ValueError) as error:
            raise _damaged(path, error) from error


def parquet_sheet(paths: Sequence[Path]) -> ParquetSheet:
    """Return the table in Parquet files; raises EectlError where one is damaged, or says more rows than it can have."""
    arrow = pyarrow(paths[0])
    from pyarrow import parquet

    for path in paths:
        try:
            with reading(path):
                about, size = parquet.read_metadata(path), path.stat().st_size
        except (arrow.ArrowException, OverflowError, ValueError) as error:
            raise _damaged(path, error) from error
        if about.num_rows > max(_MANY_ROWS, size):
            raise EectlError(f"{path}: says that it has {about.num_rows:,} rows, and has {size:,} bytes; write it again")
    try:
        return ParquetSheet(tuple(paths), parquet.read_schema(paths[0]))
    except (arrow.ArrowException, OSError, OverflowError, ValueError) as error:
        raise _damaged(paths[0], error) from error


def mapped_sheet(paths: Sequence[Path]) -> ArrowSheet:
    """Return the table in Arrow files that follow each other, mapped and not read; raises EectlError for a damaged one."""
    arrow = pyarrow(paths[0])
    tables = []
    for path in paths:
        check_end(path)
        try:
            with reading(path):
                source = arrow.memory_map(str(path))
            is_file = source.read(len(_FILE_START)) == _FILE_START
            source.seek(0)
            tables.append((arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(source).read_all())
        except (arrow.ArrowException, OSError, OverflowError, ValueError) as error:
            raise _damaged(path, error) from error
    try:
        return ArrowSheet(paths[0], arrow.concat_tables(tables))
    except (arrow.ArrowException, ValueError) as error:
        raise EectlError(f"{paths[0]}: its parts have other columns; write them again") from error


def table_of(sheet: Sheet, names: Sequence[str], *, row: str) -> Table:
    """Return columns of a table of pyarrow's with their cells as Python has them; `row` says in words what a row is.

    Raises EectlError for columns that are not there, no rows, and cells that cannot be read.
    """
    require(sheet.place, names, sheet.schema.names)
    read = sheet.read(list(dict.fromkeys(names)))
    if not read.num_rows:
        raise EectlError(f"{sheet.place}: no rows; each row is {row}")
    for name in names:
        _check_lists(sheet.place, name, read.column(name))
    try:
        return Table(sheet.place, {name: read.column(name).to_pylist() for name in names})
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8 among them
        raise EectlError(f"{sheet.place}: cells that cannot be read ({str(error)[:80]}); write it again") from error


def _check_lists(place: Path, name: str, cells: Any) -> None:
    """Raise EectlError for a column of lists that are long beyond use: Parquet packs zeros a thousand to a byte."""
    import pyarrow.compute as compute

    if not is_list(cells.type):
        return
    listed = compute.sum(compute.list_value_length(cells)).as_py() or 0
    if listed > MOST_LISTED:
        raise EectlError(f"{place}: column '{visible(name)}' lists {listed:,} values; at most {MOST_LISTED:,} are read")


def check_end(path: Path) -> None:
    """Raise EectlError where a stream of Arrow's lacks its end: one that is cut between two batches reads as a shorter table."""
    with reading(path), path.open("rb") as file:
        is_file = file.read(len(_FILE_START)) == _FILE_START
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_STREAM_END)))
        if not is_file and file.read() != _STREAM_END:
            raise EectlError(f"{path}: not Arrow, or cut short (the mark of its end is missing); write it again")


def pyarrow(place: object) -> Any:
    """Return the library pyarrow; raises EectlError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise EectlError(f"{place}: Parquet and Arrow need pyarrow; run pip install 'eectl[text]'") from error
    return pyarrow


def _damaged(path: Path, error: Exception) -> EectlError:
    kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
    return EectlError(f"{path}: not {kind}, or cut short ({visible(' '.join(str(error).split()))[:200]}); write it again")


def require(place: Path, names: Iterable[str], there: Sequence[str]) -> None:
    """Raise EectlError where a table lacks one of the columns `names`."""
    for name in names:
        if name not in there:
            raise EectlError(f"{place}: no column '{visible(name)}'{closest(name, there)}; it has {listed_columns(there)}")


def listed_columns(there: Sequence[str]) -> str:
    """Return the names of a table's columns for a message."""
    shown = ", ".join(f"'{visible(name)[:40]}'" for name in there[:_MOST_NAMED])
    return (shown or "none") + (f" and {len(there) - _MOST_NAMED:,} more" if len(there) > _MOST_NAMED else "")


def is_bytes(kind: Any) -> bool:
    """Return whether a type of pyarrow's is bytes."""
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def is_picture(kind: Any) -> bool:
    """Return whether a type of pyarrow's is what pictures come as: bytes, or the library's bytes and path."""
    from pyarrow import types

    if not types.is_struct(kind):
        return is_bytes(kind)
    place = kind.get_field_index("bytes")
    return place >= 0 and is_bytes(kind.field(place).type)


def is_string(kind: Any) -> bool:
    """Return whether a type of pyarrow's is text."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def is_list(kind: Any) -> bool:
    """Return whether a type of pyarrow's is lists, of one length or of several."""
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
