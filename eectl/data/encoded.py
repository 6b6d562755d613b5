"""EncodedPictures pictures where they are kept: in files, in a column of a table, or in the members of tar archives.

Gives their bytes and their names, a row at a time and in any order. Decodes nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError
from eectl.core.files import reading

MOST_ENCODED = 2**29  # bytes of one picture in a table or an archive; the largest that eectl decodes has fewer
_SEEN = 4096  # bytes from the middle of a table's picture that go into its row's id


class EncodedPictures(Protocol):
    """EncodedPictures pictures, one a row."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def select(self, rows: Sequence[int]) -> "EncodedPictures":
        """Return these rows alone, in this order."""

    def path(self, row: int) -> Path:
        """Return the file of a row, or what stands for it in messages; its ending may tell the type."""

    def name(self, row: int) -> str:
        """Return the short name of a row, without what all have in common."""

    def size(self, row: int) -> int:
        """Return the bytes of a row's picture."""

    def read(self, row: int, start: int, count: int) -> bytes:
        """Return `count` bytes of a row's picture from byte `start` on, fewer at its end."""

    def whole(self, row: int) -> bytes | None:
        """Return all bytes of a row's picture; None where it is the file at `path`."""

    def key(self, row: int) -> bytes:
        """Return what tells a row from all others without reading it whole; its id is made from it."""


@dataclass(frozen=True)
class Files:
    """Pictures in files below the folder `root`."""

    paths: tuple[Path, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int]) -> "Files":
        """Return these files alone."""
        return replace(self, paths=tuple(self.paths[row] for row in rows))

    def path(self, row: int) -> Path:
        """Return the file."""
        return self.paths[row]

    def name(self, row: int) -> str:
        """Return the file's path below the root."""
        return str(self.paths[row].relative_to(self.root))

    def size(self, row: int) -> int:
        """Return the file's size."""
        with reading(self.paths[row]):
            return self.paths[row].stat().st_size

    def read(self, row: int, start: int, count: int) -> bytes:
        """Return a part of the file."""
        with reading(self.paths[row]), open(self.paths[row], "rb") as file:
            file.seek(start)
            return file.read(count)

    def whole(self, row: int) -> bytes | None:  # noqa: ARG002 (whoever decodes opens the file)
        """Return nothing: the file is opened where it is."""
        return None

    def key(self, row: int) -> bytes:
        """Return the file's path below the root, and its size."""
        path = self.paths[row]
        return os.fsencode(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}")


@dataclass(frozen=True)
class Column:
    """Pictures in a binary column of a table, an array of pyarrow's, of which `rows` [row] are taken; `place` is the file."""

    place: Path
    cells: Any
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Sequence[int]) -> "Column":
        """Return these rows alone."""
        return replace(self, rows=self.rows[np.asarray(rows, dtype=np.int64)])

    def path(self, row: int) -> Path:
        """Return the table's file with the row, counted from 1."""
        return self.place.with_name(self.name(row))

    def name(self, row: int) -> str:
        """Return the file's name with the row."""
        return f"{self.place.name}: row {int(self.rows[row]) + 1}"

    def size(self, row: int) -> int:
        """Return the size of the cell."""
        return int(self._cell(row).size)

    def read(self, row: int, start: int, count: int) -> bytes:
        """Return a part of the cell."""
        cell = self._cell(row)
        return bytes(cell.slice(min(start, cell.size), min(count, max(0, cell.size - start))).to_pybytes())

    def whole(self, row: int) -> bytes | None:
        """Return the cell."""
        return bytes(self._cell(row).to_pybytes())

    def key(self, row: int) -> bytes:
        """Return the table's name and row, the cell's size, and bytes from its middle."""
        size = self.size(row)
        name = f"{self.name(row)}\0{size}\0".encode("utf-8", "surrogateescape")
        return name + self.read(row, max(0, size - _SEEN) // 2, _SEEN)

    def _cell(self, row: int) -> Any:
        return self.cells[int(self.rows[row])].as_buffer()


@dataclass(frozen=True)
class Members:
    """Pictures in members of tar archives, the `shards` below the folder `root`.

    `places` int64 [row, 3] are the number of a row's shard, the byte at which its picture begins, and the bytes of it; `names`
    [row] are those of the members.
    """

    shards: tuple[Path, ...]
    root: Path
    places: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Sequence[int]) -> "Members":
        """Return these members alone."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(self, places=self.places[index], names=tuple(self.names[row] for row in index.tolist()))

    def path(self, row: int) -> Path:
        """Return the shard with the member's name below it, as if it were a folder."""
        return Path(f"{self.shards[int(self.places[row, 0])]}/{self.names[row]}")

    def name(self, row: int) -> str:
        """Return the same below the root."""
        shard = self.shards[int(self.places[row, 0])]
        return f"{shard.relative_to(self.root) if shard.is_relative_to(self.root) else shard}/{self.names[row]}"

    def size(self, row: int) -> int:
        """Return the member's size."""
        return int(self.places[row, 2])

    def read(self, row: int, start: int, count: int) -> bytes:
        """Return a part of the member; raises EectlError where the shard became shorter since it was looked through."""
        shard, begin, size = (int(place) for place in self.places[row])
        count = min(count, max(0, size - start))
        with reading(self.shards[shard]), open(self.shards[shard], "rb") as file:
            file.seek(begin + start)
            found = file.read(count)
        if len(found) < count:
            raise EectlError(f"{self.shards[shard]}: cut short at {self.names[row]} since it was looked through; fetch it again")
        return found

    def whole(self, row: int) -> bytes | None:
        """Return the member."""
        return self.read(row, 0, self.size(row))

    def key(self, row: int) -> bytes:
        """Return the shard, the member's name and its size."""
        return f"{self.name(row)}\0{self.size(row)}".encode("utf-8", "surrogateescape")
