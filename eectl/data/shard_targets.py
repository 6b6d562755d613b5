"""Targets in shards: what a row's `.cls` says, or keys of its `.json`. What the cells mean is `targets`' business."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from eectl.core.errors import EectlError, visible
from eectl.recipe.data_section import MOST_TARGETS, DataSection

LAYOUT = "expected: tar archives that hold NAME.jpg (or png, webp, …) and NAME.cls or NAME.json of each row side by side"
MOST_BYTES = 2**20  # of a .cls or .json member
_MOST_CHARACTERS = 1000  # of a number that is written as text
_SHOWN = 80

RowFiles = dict[str, tuple[str, int, int]]  # a row's files: ending → the member's name, and where it begins and how long it is


def row_targets(file: BinaryIO, files: RowFiles, spec: DataSection, where: Callable[[], str]) -> list[Any]:
    """Return a row's cell for each of `spec.targets`, as a table would have it; `where` names the row in messages.

    `.cls` is read where it is there and the recipe names no key, else `.json`; of several labels that may be their list alone.

    Raises:
        EectlError: where neither is there, too large or damaged, or holds what no target can be.
    """
    ending = _ending(files, spec, where)
    text = _text(file, files, ending, where)
    if ending == "cls":
        if len(spec.targets) > 1:
            raise EectlError(
                f"{where()}: its .cls says one target, and data.target names {len(spec.targets)}; write a .json of them"
            )
        return [_checked(text, spec, lambda: f"{where()}: its .cls")]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EectlError(f"{where()}: its .json is not JSON ({error!s:.80}); write the shard again") from error
    if isinstance(value, list) and spec.task == "multilabel" and len(spec.targets) == 1:
        value = {spec.targets[0]: value}
    return [_checked(_of_key(value, key, where), spec, lambda: f"{where()}: its .json") for key in spec.targets]


def _ending(files: Mapping[str, Any], spec: DataSection, where: Callable[[], str]) -> str:
    """Return the ending of the file that says a row's targets."""
    is_named = spec.target != type(spec).model_fields["target"].default
    ending = next((each for each in (("json", "cls") if is_named else ("cls", "json")) if each in files), None)
    if ending is None:
        what = "class" if spec.task == "classification" else "target"
        raise EectlError(f"{where()}: neither .cls nor .json beside it says its {what}; {LAYOUT}")
    return ending


def _text(file: BinaryIO, files: RowFiles, ending: str, where: Callable[[], str]) -> str:
    """Return what is in one of a row's files."""
    _, start, size = files[ending]
    if size > MOST_BYTES:
        raise EectlError(f"{where()}: its .{ending} has {size:,} bytes; at most {MOST_BYTES:,} are read")
    file.seek(start)
    try:
        return file.read(size).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise EectlError(f"{where()}: its .{ending} is not UTF-8; write the shard again") from error


def _of_key(value: Any, key: str, where: Callable[[], str]) -> Any:
    """Return what a row's JSON has under a key."""
    if not isinstance(value, dict) or key not in value:
        there = f" among {', '.join(visible(name)[:40] for name in list(value)[:5])}" if isinstance(value, dict) else ""
        raise EectlError(f"{where()}: its .json has no key '{key}'{there}; set data.target to the one with the target")
    return value[key]


def _checked(value: Any, spec: DataSection, where: Callable[[], str]) -> Any:
    """Return a cell; raises EectlError for one that no target can be, or that is too large to be kept for every row."""
    if spec.task in ("classification", "ordinal"):
        value = str(value) if type(value) is int else value
        if not isinstance(value, str) or not value or not value.isprintable():
            raise EectlError(f"{where()} says {value!r:.{_SHOWN}}, which is no class; a class is a word or a whole number")
        return sys.intern(value)
    if spec.task == "multilabel" and len(spec.targets) == 1:
        return _labels(value, where)
    if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > _MOST_CHARACTERS):
        raise EectlError(f"{where()} says {value!r:.{_SHOWN}}, which is no number; write numbers")
    return value


def _labels(value: Any, where: Callable[[], str]) -> list[Any] | str:
    """Return the labels of a row: a list of names, of whole numbers, or of 0 and 1, or a text as in a table."""
    if isinstance(value, str) and (value.isprintable() or not value):
        return sys.intern(value)
    if not isinstance(value, list) or len(value) > MOST_TARGETS:
        what = f"{len(value):,} labels" if isinstance(value, list) else f"{value!r:.{_SHOWN}}"
        raise EectlError(f"{where()} says {what}; give a list of up to {MOST_TARGETS:,} labels")
    for each in value:
        if not (isinstance(each, str) and each and each.isprintable()) and not isinstance(each, int | float):
            raise EectlError(f"{where()} has {each!r:.{_SHOWN}} among its labels; a label is a word or a whole number")
    return [sys.intern(each) if isinstance(each, str) else each for each in value]
