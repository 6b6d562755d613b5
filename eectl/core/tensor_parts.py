"""Write and read .safetensors files part by part, for tensors that need not fit in memory.

It reads and writes at positions of the file; nothing is mapped, as the pages of a mapping count as memory. What files mean is not
known here. No torch at import.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.errors import EectlError
from eectl.core.files import beside, put_in_place, reading, writing
from eectl.core.tensor_files import METADATA_KEY, TENSORS, as_metadata, damaged

if TYPE_CHECKING:
    from torch import Tensor

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
_SIZES = {"F32": 4, "I64": 8}
_TORCH_NAMES = {"F32": "torch.float32", "I64": "torch.int64"}
_AT_ONCE = 2**23  # bytes that are hashed at a time


@dataclass(frozen=True)
class TensorParts:
    """An open file. `read` and `write` move successive elements of one of its tensors, from the index `at` on.

    Numbers that the index leaves out at its end are 0. The tensor in memory is contiguous, on the CPU, and of the file's type.

    Attributes:
        path: the file's name in errors.
        layout: the type (as safetensors calls it) and the shape of each tensor.
    """

    path: Path
    layout: Layout
    _starts: Mapping[str, int]
    _handle: int

    def write(self, name: str, values: "Tensor", *, at: Sequence[int] = ()) -> None:
        """Write `values` into tensor `name`; raises EectlError where the disk is full."""
        left, position = values.numpy().data.cast("B"), self._position(name, at)
        with writing(self.path):
            while left:
                done = os.pwrite(self._handle, left, position)
                left, position = left[done:], position + done

    def read(self, name: str, values: "Tensor", *, at: Sequence[int] = ()) -> None:
        """Fill `values` from tensor `name`; raises EectlError where the file has become shorter or the disk fails."""
        left, position = values.numpy().data.cast("B"), self._position(name, at)
        while left:
            with reading(self.path):
                done = os.preadv(self._handle, [left], position)
            if not done:
                raise EectlError(f"{self.path}: cut short while it was read; write it again")
            left, position = left[done:], position + done

    def _position(self, name: str, at: Sequence[int]) -> int:
        kind, shape = self.layout[name]
        index = 0
        for size, number in zip_longest(shape, at, fillvalue=0):
            index = index * size + number
        return self._starts[name] + index * _SIZES[kind]


@contextmanager
def new_parts(
    path: Path, layout: Layout, metadata: Mapping[str, Any], *, overwrite: bool = True
) -> Iterator[tuple[TensorParts, Path]]:
    """Make a new file of full size, all zeros, and yield it open, with the temporary path where it lies.

    When the block ends without an error, what was written gets its digest and the file replaces `path`, else it is removed.
    Raises EectlError where it cannot be written.
    """
    header = _header(layout, {**metadata, TENSORS: "0" * 64})
    with beside(path) as temporary:
        with writing(path):
            temporary.write_bytes(header)
            os.truncate(temporary, len(header) + sum(_num_bytes(*each) for each in layout.values()))
        with join_parts(temporary, of=path) as parts:
            yield parts, temporary
            sealed_header = _header(layout, {**metadata, TENSORS: digest_of_parts(parts)})
            assert len(sealed_header) == len(header)
            with writing(path):
                os.pwrite(parts._handle, sealed_header, 0)
        with writing(path):
            put_in_place(temporary, path, overwrite=overwrite)


def digest_of_parts(parts: TensorParts) -> str:
    """Return what `tensor_files.digest` gives for the tensors of a file, some bytes at a time."""
    total = hashlib.sha256()
    for name, (kind, shape) in sorted(parts.layout.items()):
        total.update(f"{name} {_TORCH_NAMES[kind]} {shape}\n".encode())
        position, left = parts._starts[name], _num_bytes(kind, shape)
        while left:
            with reading(parts.path):
                piece = os.pread(parts._handle, min(left, _AT_ONCE), position)
            if not piece:
                raise EectlError(f"{parts.path}: cut short while it was read; write it again")
            total.update(piece)
            position, left = position + len(piece), left - len(piece)
    return total.hexdigest()


@contextmanager
def join_parts(temporary: Path, *, of: Path) -> Iterator[TensorParts]:
    """Open, in another process, the file that `new_parts` made for the path `of`; raises EectlError where it sees none."""
    try:
        handle = os.open(temporary, os.O_RDWR)
    except OSError as error:
        raise EectlError(
            f"{of}: process 0 writes to it, but not all processes can ({error.strerror}); name a place in a folder that all share"
        ) from error
    with _closing(handle):
        yield _read_header(of, handle)[0]


@contextmanager
def open_parts(path: Path, *, again: str = "write it again") -> Iterator[TensorParts]:
    """Open a file to read, whose digest is checked first where it has one.

    Args:
        path: the file. `read_metadata` must have found it to be whole before.
        again: what to do about a damaged file, for messages.

    Raises:
        EectlError: where it cannot be read, has tensors of other types, or not those that were saved.
    """
    with reading(path):
        handle = os.open(path, os.O_RDONLY)
    with _closing(handle):
        parts, saved = _read_header(path, handle)
        if saved is not None and saved != digest_of_parts(parts):
            raise damaged(path, TENSORS, again)
        yield parts


@contextmanager
def _closing(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


def _num_bytes(kind: str, shape: Sequence[int]) -> int:
    return _SIZES[kind] * math.prod(shape)


def _header(layout: Layout, metadata: Mapping[str, Any]) -> bytes:
    """Return the first bytes of a .safetensors file: the header's length in 8 bytes, and JSON that ends at a multiple of 8.

    The tensors that follow lie without gaps, those of larger types first, so that each is aligned.
    """
    entries: dict[str, Any] = {"__metadata__": as_metadata(metadata)}
    stop = 0
    for name, (kind, shape) in sorted(layout.items(), key=lambda item: (-_SIZES[item[1][0]], item[0])):
        start, stop = stop, stop + _num_bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path, handle: int) -> tuple[TensorParts, str | None]:
    """Return an open file, whose header safetensors or `_header` has made whole, and the digest that it says its tensors have."""
    (size,) = struct.unpack("<Q", os.pread(handle, 8, 0))
    entries = json.loads(os.pread(handle, size, 8))
    about = json.loads(entries.pop("__metadata__")[METADATA_KEY])
    for name, entry in entries.items():
        if entry["dtype"] not in _SIZES:
            raise EectlError(
                f"{path}: {name[:60]} is of the type {entry['dtype']}, which eectl does not write; name another file"
            )
    layout = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    starts = {name: 8 + size + entry["data_offsets"][0] for name, entry in entries.items()}
    return TensorParts(path, layout, starts, handle), about.get(TENSORS)
