"""The standard streams as the program needs them, whatever they lead to: a full disk, a closed end, a poor encoding.

What an encoding does not have is spelled in ASCII. Prints nothing itself.
"""

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from eectl.core.errors import EectlError, advice

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HANDLER = "eectl.spelled"  # the name of the way to encode, for codecs
SPELLINGS = {
    **{"≥": ">=", "≤": "<=", "±": "+/-", "×": "x", "·": ".", "→": "->", "…": "...", "−": "-", "–": "-", "—": "-"},
    **{"µ": "u", "λ": "lambda", "δ": "delta", "₀": "0", "₁": "1", "²": "2", "‘": "'", "’": "'", "“": '"', "”": '"'},
    **dict.fromkeys("─━╌┄╴╶╸╺", "-"),
    **dict.fromkeys("│┃╎┆", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛", "+"),
}


def spelled(text: str, encoding: str) -> str:
    """Return `text` with what `encoding` does not have spelled in ASCII: `>=` for ≥, an escape for what has no spelling."""
    codecs.register_error(HANDLER, _spell)
    return text.encode(encoding, HANDLER).decode(encoding)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell the characters that could not be encoded, as a handler of codecs' errors."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end


@contextmanager
def standard_streams() -> Iterator[None]:
    """Take over the standard streams for the block; afterwards stdout and stderr are as they were.

    Stdout that cannot be written is an EectlError, once. Stderr that cannot be written loses what is said there and nothing else:
    the work goes on. Characters that a stream cannot encode are spelled, and stdin takes any bytes, which may be names of files.
    A stream that was closed takes no file's number.
    """
    codecs.register_error(HANDLER, _spell)
    before = sys.stdin, sys.stdout, sys.stderr
    handlers = [(stream, stream.errors) for stream in before[1:] if isinstance(stream, io.TextIOWrapper)]
    _open_closed()
    sys.stdin = before[0] or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # somebody has read from it
            sys.stdin.reconfigure(errors="surrogateescape")  # as Python takes the names in sys.argv
    sys.stdout = _output(before[1], 1, _stdout_refused)
    sys.stderr = _output(before[2], 2, _nothing)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(EectlError, OSError, ValueError):  # said already, or nobody is there to hear it
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for stream, errors in handlers:
            stream.reconfigure(errors=errors)


def _open_closed() -> None:
    """Lead closed standard streams nowhere: the next file to be opened would get their number, and a library's words."""
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def _output(stream: TextIO | None, handle: int, refused: Callable[[OSError], None]) -> TextIO:
    """Return a stream in place of `stream` that hands the first fault of writing to `refused`; None is a closed one."""
    if stream is None:
        closed = _Watched(handle, refused, fault=OSError(9, "it is closed"))
        return io.TextIOWrapper(io.BufferedWriter(closed), encoding="utf-8", errors=HANDLER)
    if not isinstance(stream, io.TextIOWrapper):  # a test's, or a notebook's
        return stream
    stream.reconfigure(errors=HANDLER)
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    watched = _Watched(stream.fileno(), refused)
    return io.TextIOWrapper(
        watched if raw is stream.buffer else io.BufferedWriter(watched),  # `python -u` has no buffer
        encoding=stream.encoding,
        errors=HANDLER,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Watched(io.FileIO):
    """A standard stream's file: the first write that fails goes to `refused`, and what comes after it nowhere."""

    def __init__(self, handle: int, refused: Callable[[OSError], None], *, fault: OSError | None = None) -> None:
        super().__init__(handle, "wb", closefd=False)
        self._refused, self._fault, self._is_broken = refused, fault, False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write to the file."""
        if not self._is_broken:
            try:
                if self._fault is not None:
                    raise self._fault
                written = super().write(data)
                if written is not None:
                    return written
            except OSError as error:
                self._is_broken = True
                self._refused(error)
        return memoryview(data).nbytes


def _stdout_refused(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):  # the reader, such as head, has what it wants
        raise error
    raise EectlError(f"stdout: cannot be written ({error.strerror or error}); {advice(error)}") from error


def _nothing(error: OSError) -> None:
    """Let what is said on stderr be lost."""
