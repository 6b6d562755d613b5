"""Images in shards, tar archives as WebDataset has them: members that share a name up to its first dot are one row.

Each shard is looked through once, from header to header. After that a row is a place in a shard, so that splits, copies, orders
and resuming are as for files. Nothing is unpacked, and no member but pictures, .cls and .json is read.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eectl.core.errors import EectlError, visible
from eectl.core.files import read_text, reading
from eectl.data.encoded import MOST_ENCODED, Members
from eectl.data.folder import IMAGENET_MEAN, IMAGENET_STD, encoded_part, first_shape
from eectl.data.images import StoredImages
from eectl.data.pictures import EXTENSIONS, shown_path
from eectl.data.shard_files import find_shards
from eectl.data.shard_targets import LAYOUT, RowFiles, row_targets
from eectl.data.targets import classes_in, read_targets
from eectl.data.text_tables import Table
from eectl.recipe.data_section import DataSection, ShardsSection

CLASSES_FILE = "classes.txt"
MOST_END_BYTES = 2**20  # of zeros at the end, which writers fill up to 10,240
MOST_HEADER_BYTES = 2**20  # of what tells a member's name and size
_BUFFER = 2048  # bytes that are read for a header
THREADS = 8  # that look through shards
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def load_shards(spec: DataSection, download: bool) -> StoredImages:
    """Return the images in shards, told to their splits by `data.shards` or by their names.

    Targets are what `.cls` or the key `data.target` of `.json` says, or several of its keys, in the forms that tables have; a
    file classes.txt in `data.root` names classes, levels or labels that are numbers.

    Raises:
        EectlError: for shards that are missing, in two splits or cut short, and for rows without a picture or a target.
    """
    wanted = spec.shards or ShardsSection()
    files = find_shards(spec, download)
    rows = {name: _look_through(paths, spec, wanted.damaged) for name, paths in files.items()}
    root = spec.folder if spec.folder.is_dir() else files["train"][0].parent
    tables = {name: shards.table(spec.targets) for name, shards in rows.items()}
    names = classes_in(tables["train"], spec)
    classes = _named_classes(root, names) if len(spec.targets) == 1 else names
    shape: tuple[int, int, int] | None = None
    parts = {}
    for name, shards in rows.items():
        encoded, targets = shards.members(root), read_targets(tables[name], spec, names)
        shape = shape or first_shape(encoded, spec)
        parts[name] = encoded_part(encoded, targets, shape, spec, resize=spec.image_size is not None)
    notes = tuple(note for each in rows.values() for note in each.notes)
    return StoredImages(classes, IMAGENET_MEAN, IMAGENET_STD, parts, notes)


@dataclass
class _Shard:
    """The rows of one shard: the names and places (start, size) of its pictures, and their targets [target][row].

    `note` says why it is used in part.
    """

    path: Path
    targets: tuple[list[Any], ...]
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    note: str | None = None


@dataclass(frozen=True)
class _Shards:
    """The rows of a split's shards, one shard after the other."""

    found: tuple[_Shard, ...]

    @property
    def notes(self) -> list[str]:
        return [each.note for each in self.found if each.note is not None]

    def members(self, root: Path) -> Members:
        """Return the pictures."""
        places = [(number, *place) for number, each in enumerate(self.found) for place in each.places]
        names = tuple(name for each in self.found for name in each.names)
        return Members(tuple(each.path for each in self.found), root, np.array(places, dtype=np.int64).reshape(-1, 3), names)

    def table(self, targets: Sequence[str]) -> Table:
        """Return the targets as a table that has a column for each."""
        columns = {name: [cell for shard in self.found for cell in shard.targets[place]] for place, name in enumerate(targets)}
        return _ShardTable(self.found[0].path, columns, "target", self.found)


@dataclass(frozen=True)
class _ShardTable(Table):
    """The targets of shards; messages name a row by its shard and picture."""

    shards: Sequence[_Shard] = ()

    def where(self, row: int) -> str:
        """Return what messages call row `row` (from 0)."""
        starts = np.cumsum([0, *(len(shard.names) for shard in self.shards)])
        number = int(np.searchsorted(starts, row, side="right")) - 1
        shard = self.shards[number]
        return f"{shown_path(shard.path)}: {shown_path(shard.names[row - int(starts[number])])}"


def _look_through(paths: Sequence[Path], spec: DataSection, damaged: str) -> _Shards:
    """Return the rows of shards, which threads look through."""
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            found = tuple(threads.map(partial(_rows_of, spec=spec, skip=damaged == "skip"), paths))
        except BaseException:  # Ctrl-C too: what has not begun is not begun
            threads.shutdown(cancel_futures=True)
            raise
    if not any(each.names for each in found):
        raise EectlError(
            f"{shown_path(paths[0])}: no rows in {'it' if len(paths) == 1 else f'these {len(paths):,} shards'}; {LAYOUT}"
        )
    return _Shards(found)


def _rows_of(path: Path, *, spec: DataSection, skip: bool) -> _Shard:
    """Return the rows of one shard, or with `skip` of one that is cut short those before the cut."""
    shard = _Shard(path, tuple([] for _ in spec.targets))
    with reading(path), _ShardFile(io.FileIO(path), _BUFFER) as file:
        start = file.peek(2)[:2]
        if start in _COMPRESSED:
            fault = f"compressed with {_COMPRESSED[start]}, so that no row can be read on its own"
            raise EectlError(f"{shown_path(path)}: {fault}; unpack it to a plain .tar")
        try:
            for files in _rows(_members(file, path), path):
                _add_row(shard, file, files, spec)
        except _CutShortError as error:
            if not skip:
                advice = "fetch it again, or set data.shards.damaged=skip to use the rows before it"
                raise EectlError(f"{shown_path(path)}: cut short at {error}; {advice}") from error
            shard.note = f"{shown_path(path)}: cut short at {error}; the {len(shard.names):,} rows before it are used"
    return shard


def _rows(members: Iterable[tuple[str, int, int]], path: Path) -> Iterator[RowFiles]:
    """Yield the files of each row: members side by side with one name up to the first dot."""
    key, files = "", RowFiles()
    for name, start, size in members:
        folder, slash, file = name.rpartition("/")
        own, _, ending = file.partition(".")
        ending = ending.lower()
        if folder + slash + own != key:
            yield files
            key, files = folder + slash + own, RowFiles()
        if ending in files:
            raise EectlError(f"{shown_path(path)}: {shown_path(name)} stands twice; write the shard again")
        files[ending] = name, start, size
    yield files


class _CutShortError(Exception):
    """A shard that ends too early; its text says where."""


class _ShardFile(io.BufferedReader):
    """A shard that tarfile goes through from header to header: what would read more than a header is refused."""

    def read(self, size: int | None = -1) -> bytes:
        """Return as many bytes, if they are few."""
        if size is None or not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(file: _ShardFile, path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each member that is a file, the byte at which its content begins and its size, and check them.

    Raises:
        _CutShortError: where the shard ends in a member, or without the zeros that end an archive, or has zeros in its midst, as
            where a download was to fill it up, or another archive after them.
        EectlError: for what is no tar archive, and for links, devices and files with holes.
    """
    length = file.seek(0, 2)
    file.seek(0)
    last, end = "", 0  # the member before the place that is looked at, and where it ends
    try:
        if not length:
            raise _CutShortError("its first byte")
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else all are kept
                if not member.isdir():
                    _check(member, path, earliest=end)
                last, end = member.name, member.offset_data + (0 if member.isdir() else member.size)
                if end > length:
                    raise _CutShortError(shown_path(last))
                if not member.isdir():
                    yield member.name, member.offset_data, member.size
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _CutShortError(f"the header after {shown_path(last)}")
            rest = length - file.tell()
            if rest > MOST_END_BYTES or any(file.read(rest)):
                raise _CutShortError(f"{shown_path(last)}, where its archive ends with {rest:,} bytes to come")
    except tarfile.ReadError as error:
        if end:
            raise _CutShortError(f"the header after {shown_path(last)}") from error
        raise EectlError(f"{shown_path(path)}: not a tar archive, or cut short ({visible(str(error))[:80]}); {LAYOUT}") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        fault = f"damaged after {shown_path(last) or 'its first byte'} ({visible(str(error))[:80]})"
        raise EectlError(f"{shown_path(path)}: {fault}; write it again") from error


def _check(member: tarfile.TarInfo, path: Path, *, earliest: int) -> None:
    """Raise EectlError for a member of a shard that is no plain file, or whose header points back."""
    fault = None
    if not member.isreg() or member.issparse():
        fault = "is a link, a device or a file with holes; shards hold plain files"
    elif member.size < 0 or member.offset_data < earliest:
        fault = "has a damaged header; write the shard again"
    if fault is not None:
        raise EectlError(f"{shown_path(path)}: {shown_path(member.name)} {fault}")


def _add_row(shard: _Shard, file: _ShardFile, files: RowFiles, spec: DataSection) -> None:
    """Add a row, given as its files, to those of its shard; one without a picture is none."""
    wanted = None if spec.image is None else spec.image.lower().removeprefix(".")
    pictures = [ending for ending in files if (f".{ending}" in EXTENSIONS if wanted is None else ending == wanted)]
    if not pictures:
        return

    def where() -> str:
        return f"{shown_path(shard.path)}: {shown_path(files[pictures[0]][0])}"

    if len(pictures) > 1:
        raise EectlError(f"{where()}: {' and '.join(pictures)} are both pictures of this row; set data.image to one of them")
    name, start, size = files[pictures[0]]
    if size > MOST_ENCODED:
        raise EectlError(f"{where()}: a picture of more than {MOST_ENCODED >> 20} MiB; make it smaller or take it out")
    for cells, cell in zip(shard.targets, row_targets(file, files, spec, where), strict=True):
        cells.append(cell)
    shard.names.append(name)
    shard.places.append((start, size))


def _named_classes(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of classes: the lines of classes.txt where there is one and classes are numbers from 0, else `names`."""
    path = root / CLASSES_FILE
    with reading(path):
        is_there = path.is_file()
    if not is_there or not names or not all(name.isascii() and name.isdecimal() for name in names):
        return names
    lines = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    largest = max(map(int, names))
    if len(lines) <= largest:
        raise EectlError(f"{path}: names {len(lines)} classes, and the shards have class {largest}, counted from 0; add lines")
    return tuple(lines[int(name)] for name in names)
