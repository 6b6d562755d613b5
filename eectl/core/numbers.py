"""Numbers as a user writes them: decimal, in the digits 0 to 9, without leading zeros, separators or words such as nan.

Python's own `int` and `float` also read `1_0`, digits of every script, `nan` and `inf`. Nothing is known of what a number means.
"""

import math
import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TypeVar

from eectl.core.errors import EectlError, visible

_Number = TypeVar("_Number", int, float)
_MOST_DIGITS = 400  # more than the largest float has
_LONGEST = 60  # characters of what was written that a message quotes
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def whole_number(value: object, *, least: int | None = None, most: int | None = None) -> int | None:
    """Return a whole number that is a number or a text; None where it is none, or out of the range."""
    if isinstance(value, str):
        value = int(value) if len(value) <= _MOST_DIGITS and _WHOLE.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    number = int(value)
    return number if (least is None or number >= least) and (most is None or number <= most) else None


def decimal_number(value: object) -> float | None:
    """Return a number that is a number or a text, infinite where it is too large; None where it is none."""
    if isinstance(value, str):
        value = float(value) if len(value) <= _MOST_DIGITS and _DECIMAL.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number_list(
    given: object, read: Callable[[object], _Number | None], *, option: str, what: str, allowed: str
) -> tuple[_Number, ...]:
    """Return the numbers that an option, or an argument of a function, lists.

    Args:
        given: a text with commas such as `25,50`, one number, or several.
        read: makes a number of each; None: it is not allowed.
        option: its name, for messages.
        what: what a message calls one of them, such as `budget`.
        allowed: which numbers are allowed, and an example.

    Raises:
        EectlError: something in it is not allowed, or stands twice.
    """
    if isinstance(given, str):
        parts: list[object] = [part.strip(" ") for part in given.split(",")]
    else:
        parts = list(given) if isinstance(given, Iterable) else [given]
    shown = _short(",".join(map(_text, parts)))
    found: list[_Number] = []
    for part in parts or [""]:
        number = read(part)
        if number is None:
            raise EectlError(f"{option} {shown}: '{_short(_text(part))}' is not a {what}; give {allowed}")
        if number in found:
            raise EectlError(f"{option} {shown}: {number:g} stands twice; give each {what} once")
        found.append(number)
    return tuple(found)


def _text(part: object) -> str:
    return f"{part:.15g}" if isinstance(part, float) else str(part) if isinstance(part, str) else f"{part!r:.80}"


def _short(text: str) -> str:
    text = visible(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
