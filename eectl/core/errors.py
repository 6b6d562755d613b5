"""Mistakes that a user can mend: one exception type, the way to look a name up in a table, and the words of messages.

The command line turns an `EectlError` into one line on stderr and an exit code, and `Interrupted` into an exit code. Anything
else that is raised is a bug of ours and keeps its traceback.
"""

import errno
import signal
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # Unicode's names of the characters that do


class EectlError(Exception):
    """Mistakes that the user can mend, mostly one. A message says place, fault, what is allowed and what to do next.

    Each of `messages` is a line for the user. `exit_code` is 1 for a run that could not be done, and 3 for a target that was
    asked for and not met.
    """

    def __init__(self, *messages: str, exit_code: int = 1) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages
        self.exit_code = exit_code


class Interrupted(BaseException):  # an Exception would be swallowed by the libraries that are being imported
    """A stop by SIGINT or SIGTERM. `exit_code` is 130 or 143, `hint` says what can be done now."""

    def __init__(self, number: int, *, hint: str = "; nothing is left half-written") -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.hint = hint


def visible(text: str) -> str:
    """Return text from a file with what would steer a terminal written out: control characters, and those that turn direction.

    >>> print(visible("red \\x1b[31m"))
    red \\x1b[31m
    """
    return "".join(each if each in "\n\t" or not _steers(each) else each.encode("unicode_escape").decode() for each in text)


def one_line(text: str) -> str:
    """Return text as `visible` does, with ends of lines written out too."""
    return visible(text).replace("\n", "\\n")


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS


def advice(error: OSError) -> str:
    """Return what a user can do about what the operating system refused."""
    return _ADVICE.get(error.errno or 0, "look at what lies there, or name another place")


def refused_by_system(error: OSError) -> EectlError:
    """Return the error for what the operating system refused, which no reader or writer of ours has put into words."""
    place = error.filename.decode(errors="surrogateescape") if isinstance(error.filename, bytes) else error.filename
    fault = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return EectlError(f"{place}: {fault}; {advice(error)}" if isinstance(place, str) else f"{fault}; {advice(error)}")


_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "ask for the right to it, or name another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or name another place"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another place",
    errno.ELOOP: "a symbolic link leads back to itself; mend it, or name another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "a part of this path is a file; name another place",
    errno.EISDIR: "it is a folder; name a file",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other programs, or raise the limit on open files (ulimit -n)"),
    errno.ENOMEM: "free some memory",
    errno.EIO: "the disk fails; name another place",
    errno.EBADF: "let it lead to a file or a terminal",
}


def closest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the nearest of `known`, or an empty string where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def lookup(table: Mapping[str, T], name: str, *, what: str) -> T:
    """Return the entry `name` of a table; for an unknown name raise EectlError with the nearest and all known ones.

    `what` is what the message calls the name, such as "criterion".
    """
    if name in table:
        return table[name]
    raise EectlError(f"unknown {what} '{name}'{closest(name, table)}; known: {', '.join(table)}")


def out_of_memory(device: object, option: str, size: int, *, note: str = "", also: str = "") -> EectlError:
    """Return the error for a device whose memory is full, which proposes half of a batch size.

    Args:
        device: the device that is full.
        option: what sets the batch size, up to the number: `--batch-size ` or `--set batch_size=`.
        size: the batch size that did not fit.
        note: more about that size, such as `over all processes`.
        also: what else would help.
    """
    current = ", ".join([f"it is {size}", *([note] if note else [])])
    return EectlError(f"out of memory on {device}; try {option}{max(size // 2, 1)} ({current}){also}")
