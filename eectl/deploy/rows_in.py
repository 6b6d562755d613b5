"""The inputs of `predict`, one row at a time: image files, folders of them, columns of text files, lines of stdin.

Nothing is held but names of files. A row that cannot be read is an EectlError in its place, so that the others still come.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError, closest
from eectl.data.folder import LISTED, list_images
from eectl.data.pictures import EXTENSIONS, shown_path
from eectl.recipe.data_paths import expand

STDIN = "-"
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
CELL = 2**30  # characters of a cell of CSV; the default refuses those of 131,072


@dataclass(frozen=True)
class RowIn:
    """One input: `shown` is how the output names it, `where` how messages do; `value` is a path, texts, or what is wrong."""

    shown: Mapping[str, Any]
    where: str
    value: Path | tuple[str, ...] | EectlError


def image_rows(sources: Sequence[str]) -> list[str]:
    """List the image files that `sources` name: files as they are, folders at any depth, sorted; stdin stays.

    Raises EectlError for a folder without images and a file of texts.
    """
    found: list[str] = []
    for source in sources:
        path = expand(source)
        is_folder = False
        with suppress(OSError):  # who reads it says that it cannot be read
            is_folder = source != STDIN and path.is_dir()
        if is_folder:
            found += _images(path)
        elif path.suffix.lower() in TABLES:
            raise EectlError(f"{source}: a file of texts, and the network takes images; name images, or a folder of them")
        else:
            found.append(source)
    return found


def _images(folder: Path) -> list[str]:
    """List the images at any depth below a folder, sorted; raises EectlError where there are none."""
    found, _ = list_images(folder)
    if not found:
        raise EectlError(f"{shown_path(folder)}: no images in this folder ({LISTED}); name another, or the files")
    return sorted(map(str, found))


def read_images(files: Sequence[str]) -> Iterator[RowIn]:
    """Give a row per image file, and one per line of stdin, which names a file."""
    for name in files:
        if name == STDIN:
            yield from (_image(line) for line in _lines() if line.strip())
        else:
            yield _image(name)


def _image(name: str) -> RowIn:
    return RowIn({"file": name}, name, expand(name))


def check_texts(sources: Sequence[str], columns: Sequence[str]) -> None:
    """Raise EectlError for a source that holds no texts, or not the columns, before anything is loaded."""
    advice = f"name a file with a column of texts ({', '.join(TABLES)}), or - for lines of stdin"
    for source in sources:
        if source == STDIN:
            continue
        path = expand(source)
        if path.is_dir():
            raise EectlError(f"{source}: a folder, and the network takes texts; {advice}")
        if not path.exists():
            raise EectlError(f"{source}: no such file; {advice}")
        if path.suffix.lower() not in TABLES:
            kind = "an image" if path.name.lower().endswith(EXTENSIONS) else "not a file of texts"
            raise EectlError(f"{source}: {kind}, and the network takes texts; {advice}")
        next(_TABLE_ROWS[path.suffix.lower()](path, columns), None)


def read_texts(sources: Sequence[str], columns: Sequence[str]) -> Iterator[RowIn]:
    """Give a row per line of the text files, and of stdin, where a tab separates the two texts of a pair."""
    for source in sources:
        if source == STDIN:
            rows: Iterator[Any] = (tuple(line.split("\t")) if len(columns) == 2 else (line,) for line in _lines())
            place = "stdin: line"
        else:
            path = expand(source)
            rows, place = _TABLE_ROWS[path.suffix.lower()](path, columns), f"{source}: row"
        for number, texts in enumerate(rows, 1):
            where = f"{place} {number}"
            if isinstance(texts, EectlError):
                yield RowIn({}, where, EectlError(f"{where}: {texts}"))
                continue
            bad = next((text for text in texts if not isinstance(text, str)), None)
            if bad is not None or None in texts:
                yield RowIn({}, where, EectlError(f"{where}: {bad!r} is not a text; fill it in or take the row out"))
                continue
            if not all(_is_whole(text) for text in texts):
                yield RowIn({}, where, EectlError(f"{where}: not UTF-8, or half a character; mend the text or take the row out"))
                continue
            names = ("text",) if len(columns) == 1 else ("text_1", "text_2")
            shown = {"file": source, "row": number, **dict(zip(names, texts, strict=False))}
            yield RowIn(shown, where, tuple(texts))


def _is_whole(text: str) -> bool:
    """Return whether a text has only whole characters, as those have that can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _delimited(path: Path, columns: Sequence[str], *, delimiter: str, quoted: bool) -> Iterator[tuple[Any, ...] | EectlError]:
    """Give the cells of each row of a CSV or TSV file; a row with too few or too many cells is an error of its own."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL))
    with _opened(path) as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
        try:
            header = next(reader, [])
            _require(path, columns, header)
            places = [header.index(name) for name in columns]
            for row in reader:
                if row and len(row) != len(header):
                    yield EectlError(f"{len(row)} cells for {len(header)} columns; quote cells that hold a separator")
                elif row:
                    yield tuple(row[place] for place in places)
        except csv.Error as error:
            raise EectlError(f"{path}: line {reader.line_num}: {error}; mend the quotes of this cell") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | EectlError]:
    return _delimited(path, columns, delimiter=",", quoted=True)


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | EectlError]:
    return _delimited(path, columns, delimiter="\t", quoted=False)


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | EectlError]:
    """Give the values of each line's object; a line that is no object with the columns is an error of its own, but the first."""
    is_first = True
    with _opened(path) as file:
        try:
            for line in file:
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    value = EectlError(f"not JSON ({error}); each line is one object")
                if isinstance(value, dict):
                    if is_first:
                        _require(path, columns, list(value))
                    yield tuple(value.get(name) for name in columns)
                else:
                    yield value if isinstance(value, EectlError) else EectlError("not an object; each line is one")
                is_first = False
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | EectlError]:
    """Give the cells of each row of a Parquet file, some thousand read at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise EectlError(f"{path}: Parquet needs pyarrow; run pip install 'eectl[text]', or convert the file to CSV") from error
    try:
        file = parquet.ParquetFile(path)
        _require(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except pyarrow.ArrowInvalid as error:
        raise EectlError(f"{path}: not Parquet, or cut short ({' '.join(str(error).split())})") from error


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise EectlError(f"{path}: cannot be read ({error.strerror})") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> EectlError:
    return EectlError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it")


def _require(path: Path, columns: Sequence[str], there: Sequence[str]) -> None:
    for name in columns:
        if name not in there:
            has = ", ".join(map(repr, there)) or "none"
            raise EectlError(f"{path}: no column '{name}'{closest(name, there)}; it has {has}; name the text's with --text")


_TABLE_ROWS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
