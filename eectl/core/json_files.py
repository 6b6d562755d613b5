"""Read and write JSON files that one command makes and another reads, each with a kind and a schema number.

What they mean is not known here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from eectl.core.errors import EectlError
from eectl.core.files import replacing, unreadable

_Form = TypeVar("_Form")


def clean_json(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): clean_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_json(item) for item in value]
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object in one step; raises EectlError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(clean_json(value), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, *, kind: str, schema: int) -> dict[str, Any]:
    """Return the JSON object in `path`; raises EectlError where it cannot be read, or is of another kind or a newer schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise EectlError(f"{path}: not JSON, or cut short ({error}); write it again") from error
    check_kind(path, value, kind=kind, schema=schema)
    return dict(value)


def check_kind(path: Path, value: Any, *, kind: str, schema: int) -> None:
    """Raise EectlError unless `value` is a mapping whose `kind` is this one and whose `schema` is not newer than this one."""
    found = value.get("kind") if isinstance(value, Mapping) else None
    if found != kind:
        says = f"says it is {_with_article(found)}" if isinstance(found, str) else "does not say what it is"
        raise EectlError(f"{path}: not {_with_article(kind)} of eectl's (it {says})")
    number = value.get("schema")
    if not isinstance(number, int) or number > schema:
        raise EectlError(f"{path}: {kind} schema {number}, this eectl reads up to {schema}; upgrade eectl")


def _with_article(kind: str) -> str:
    return f"a{'n' * kind.startswith(tuple('aeiou'))} {kind}"


def read_as(form: type[_Form], path: Path, *, kind: str, schema: int, again: str) -> _Form:
    """Read a dataclass from a JSON file.

    Args:
        form: the dataclass.
        path: the file.
        kind: the kind that it must be of.
        schema: the newest schema that can be read.
        again: the command that writes such a file, for messages.

    Raises:
        EectlError: where the file cannot be read, or for the first field that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_python(read_json(path, kind=kind, schema=schema))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise EectlError(f"{path}: {place}: {first['msg']}; write it again with {again}") from error
