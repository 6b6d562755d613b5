"""Read and write JSON files that one command makes and another reads, each with a kind, a schema number and a digest.

A file is taken for hostile until its size, its nesting, its form and its digest have been looked at. What it means is not known
here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from eectl.core.errors import EectlError
from eectl.core.files import MOST_BYTES, read_text, write_all

_Form = TypeVar("_Form")
DIGEST = "digest"  # the key under which a file says what the rest of it hashes to
DEEPEST = 64  # levels of a value: eectl's own have fewer than ten
_MOST_DIGITS = 20  # of a whole number: those of 64 bits have no more


def clean_json(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): clean_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_json(item) for item in value]
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest added, by which a reader tells that nothing in it was damaged."""
    content = {key: item for key, item in clean_json(value).items() if key != DIGEST}
    return {**content, DIGEST: _digest(content)}


def check_seal(value: Mapping[str, Any], *, where: object, again: str) -> None:
    """Raise EectlError where a JSON object is not what its digest says; one without a digest is taken as it is.

    Args:
        value: the object, as it was read.
        where: what messages call it.
        again: what to do about a damaged one.
    """
    if DIGEST in value and value[DIGEST] != _digest({key: item for key, item in value.items() if key != DIGEST}):
        raise EectlError(
            f"{where}: damaged or changed since it was written (its digest says so); {again}; if the change was meant, take out "
            f"its key '{DIGEST}'"
        )


def _digest(value: Any) -> str:
    """Return a SHA-256 over a JSON object that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, value: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Write a JSON object in one step; raises EectlError where it cannot be written, as `files.replacing` does."""
    write_all({path: json_text(value)}, overwrite=overwrite)


def json_text(value: Mapping[str, Any]) -> str:
    """Return a JSON object as the text of a file, NaN as null."""
    return json.dumps(clean_json(value), indent=2) + "\n"


def parse_json(text: str, *, where: object, again: str = "write it again") -> Any:
    """Return what a JSON document holds.

    Args:
        text: the document.
        where: what messages call it.
        again: what to do about a damaged one.

    Raises:
        EectlError: where it is not JSON, has a key twice, numbers that are not finite or of more than 20 digits, more than
            `MOST_BYTES`, or more levels than `DEEPEST`.
    """
    if len(text) > MOST_BYTES:
        raise EectlError(f"{where}: more than {MOST_BYTES >> 20} MiB of JSON, which eectl does not take; name the right file")
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_float, parse_int=_int, object_pairs_hook=_object)
    except ValueError as error:
        raise EectlError(f"{where}: not JSON, or cut short ({error}); {again}") from error
    except RecursionError as error:
        raise EectlError(f"{where}: not JSON of eectl's (nested too deeply); {again}") from error
    _check_depth(value, where, again)
    return value


def _check_depth(value: Any, where: object, again: str) -> None:
    """Raise EectlError where a value has more than DEEPEST levels: what walks through values later may then recurse."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise EectlError(f"{where}: not JSON of eectl's (nested more than {DEEPEST} levels deep); {again}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} stands twice")
    return value


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.30} is too large a number")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


def read_json(path: Path, *, kind: str, schema: int, again: str = "write it again") -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        kind: the kind that it must be of.
        schema: the newest schema that can be read.
        again: what to do about a damaged file, for messages.

    Raises:
        EectlError: where it cannot be read, is of another kind or a newer schema, or was damaged.
    """
    value = parse_json(read_text(path), where=path)
    check_kind(path, value, kind=kind, schema=schema)
    check_seal(value, where=path, again=again)
    return {key: item for key, item in value.items() if key != DIGEST}


def check_kind(path: Path, value: Any, *, kind: str, schema: int) -> None:
    """Raise EectlError unless `value` is a mapping whose `kind` is this one and whose `schema` is not newer than this one."""
    found = value.get("kind") if isinstance(value, Mapping) else None
    if found != kind:
        says = f"says it is {_with_article(found[:60])}" if isinstance(found, str) else "does not say what it is"
        raise EectlError(f"{path}: not {_with_article(kind)} of eectl's (it {says})")
    number = value.get("schema")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= schema:
        raise EectlError(f"{path}: {kind} schema {number!s:.30}, this eectl reads up to {schema}; upgrade eectl")


def _with_article(kind: str) -> str:
    return f"a{'n' * kind.startswith(tuple('aeiou'))} {kind}"


def read_as(
    form: type[_Form],
    path: Path,
    *,
    kind: str,
    schema: int,
    again: str,
    check: Callable[[_Form], None] | None = None,
) -> _Form:
    """Read a dataclass from a JSON file, whose values must be of the very types: no text or truth value for a number.

    Args:
        form: the dataclass.
        path: the file.
        kind: the kind that it must be of.
        schema: the newest schema that can be read.
        again: the command that writes such a file, for messages.
        check: raises EectlError where fields do not go together; default: any do.

    Raises:
        EectlError: where the file cannot be read, for the first field that does not fit, or where the file was damaged.
    """
    value = parse_json(read_text(path), where=path)
    check_kind(path, value, kind=kind, schema=schema)
    found = checked(form, value, where=path, again=f"write it again with {again}")
    if check is not None:
        try:
            check(found)
        except EectlError as error:
            raise EectlError(f"{path}: {error}") from error
    check_seal(value, where=path, again=f"write it again with {again}")
    return found


def checked(form: type[_Form], value: Any, *, where: object, again: str) -> _Form:
    """Return plain JSON data as the dataclass or pydantic model `form`, by its schema.

    Args:
        form: the class.
        value: the data, as `parse_json` gives it.
        where: what messages call it.
        again: what to do where it does not fit.

    Raises:
        EectlError: for the first field that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")  # half characters, of undecodable names, become ?
    try:
        return TypeAdapter(form).validate_json(text, strict=True)  # in JSON a list may stand for a tuple
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"{part}." for part in first["loc"])[:-1][:200]
        fault = first["msg"].removeprefix("Value error, ")
        raise EectlError(f"{where}: {place + ': ' if place else ''}{fault}; {again}") from error
