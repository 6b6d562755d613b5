"""Pickles of plain data, which is how CIFAR is published, read without running what a pickle may say.

Dictionaries, lists, texts, bytes, numbers, and NumPy's arrays of whole numbers are read; a name of anything else is refused.
NumPy's own ways to make an array are never called either: what stands here in their place looks at each part first.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError, visible
from eectl.core.files import reading

WHOLE = re.compile(r"[ui][1248]|b1")  # NumPy's names of the types of whole numbers
ORDERS = ("<", ">", "|", "=")


def read_plain(path: Path) -> dict[str, Any]:
    """Return the dictionary that a pickle holds, its arrays as NumPy's.

    Raises:
        EectlError: for a file that is no pickle, or that names anything but plain data.
    """
    with reading(path), open(path, "rb") as file:
        try:
            found = _Unpickler(file, encoding="latin1").load()
            if not isinstance(found, dict):
                raise pickle.UnpicklingError(f"a {type(found).__name__} in place of a dictionary")
            return {str(key): value.array if isinstance(value, _Array) else value for key, value in found.items()}
        except OSError:
            raise
        except Exception as error:  # a pickle is a program, and may fail in any way
            reason = visible(" ".join(str(error).split())) or type(error).__name__
            raise EectlError(f"{path}: not the published file ({reason}); fetch it again") from error


class _Type:
    """The stand-in for `numpy.dtype`: called with a name, and then told the order of bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if not WHOLE.fullmatch(name):
            raise pickle.UnpicklingError(f"numbers of type {name[:20]!r}")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ORDERS:
            raise pickle.UnpicklingError("an unknown order of bytes")
        self.order = state[1]

    def made(self, data: Any, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
        """Return an array of these numbers from bytes, which Python 2 stored as text."""
        content = data.encode("latin1") if isinstance(data, str) else bytes(data)
        kind = np.dtype(self.order + self.name)
        if math.prod(shape) * kind.itemsize != len(content):
            raise pickle.UnpicklingError(f"{len(content)} bytes for an array of shape {shape}")
        return np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")


class _Array:
    """The stand-in for `numpy.ndarray`: made empty, then told its shape, type and bytes."""

    array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        self.array = kind.made(data, shape, "F" if is_fortran else "C")


class _Maker:
    """A function that a pickle may call, and not change."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("a function that is given a state")


def _scalar(kind: _Type, data: Any) -> int:
    return int(kind.made(data, (), "C"))


def _frombuffer(data: Any, kind: _Type, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return kind.made(data, shape, order)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding[:20]!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads what plain data is made of; NumPy's names are those of version 1 and of 2, of pickles of any protocol."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for the name that a pickle gives; raises UnpicklingError for one that plain data does not need."""
        place = module.replace("numpy.core", "numpy._core")
        if (place, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain data")
        found = STAND_INS[place, name]
        return found if isinstance(found, type) else _Maker(found)


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}
