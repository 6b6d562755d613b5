"""Reading recipes from YAML and `--set`, with all mistakes at once, and writing them. No torch."""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from eectl.core.errors import EectlError, closest, lookup, visible
from eectl.core.files import read_text, reading
from eectl.recipe.data_paths import not_a_recipe
from eectl.recipe.recipe import PhaseSection, Recipe
from eectl.recipe.section import Section
from eectl.recipe.yaml_text import dump_yaml, parse_yaml

_S = TypeVar("_S", bound=Section)
_Place = tuple[int | str, ...]
_MOST_MISTAKES = 20  # that are listed
_MOST_NUMBER = 6  # digits of a number in the key of --set
_LONGEST_NAME = 100  # that is compared with the known ones
_SMALL = re.compile(r"0\.0{3,}[1-9]")  # as pydantic writes 1e-12
_LONGEST_PATH = 4096
_LONGEST_VALUE = 80  # characters of what is refused that a message quotes


def shipped_recipes() -> dict[str, str]:
    """Return the text of every recipe in the package, by name."""
    folder = resources.files("eectl") / "recipes"
    if not folder.is_dir():  # an editable install reads the checkout's own folder
        folder = resources.files("eectl").joinpath("../recipes")
    return {
        item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".yaml")
    }


def is_recipe(source: str) -> bool:
    """Return whether `source` names a shipped recipe or a YAML file, rather than a checkpoint."""
    return Path(source).suffix in (".yaml", ".yml") or (source in shipped_recipes() and not Path(source).exists())


def read_recipe(source: str, *, changes: Iterable[str] = ()) -> Recipe:
    """Return the recipe called `source`, with `key=value` changes.

    Args:
        source: the name of a shipped recipe, or the path of a YAML file.
        changes: as `--set` takes them, such as `optimizer.lr=1e-3`; later ones win.

    Raises:
        EectlError: that lists every mistake, one a line.
    """
    shipped = shipped_recipes()
    if "\0" in source or len(source) > _LONGEST_PATH:
        raise EectlError(f"{_shown(source)}: no file can have this name; name a recipe")
    if source in shipped:
        text = shipped[source]
    else:
        with reading(Path(source)):
            text = _text_of(source, shipped)
    value = parse_yaml(text, where=source)
    if not isinstance(value, (dict, NoneType)):
        raise EectlError(f"{source}: a recipe is a mapping of keys to values, this is a {type(value).__name__}")
    return make_recipe(value or {}, where=source, changes=changes)


def _text_of(source: str, shipped: Mapping[str, str]) -> str:
    """Return the text of the file called `source`; raises EectlError, or OSError, where there is none that is a recipe."""
    if (advice := not_a_recipe(source)) is not None:
        raise EectlError(advice)
    if is_recipe(source) or Path(source).exists():
        return read_text(Path(source))
    return lookup(shipped, source, what="recipe (and no file)")


def make_recipe(value: Mapping[str, Any], *, where: str, changes: Iterable[str] = ()) -> Recipe:
    """Make a Recipe of plain data and `key.sub=value` changes; raises EectlError that lists the mistakes, one a line."""
    data = dict(value)
    for change in changes:
        _apply(data, change)
    return make_section(Recipe, data, where=where)


def make_section(form: type[_S], value: Any, *, where: str) -> _S:
    """Make a recipe, or a part of one, of plain data; raises EectlError that lists the mistakes, one a line."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise EectlError(*_mistakes(error, form, value, where)) from error


def _apply(data: dict[Any, Any], change: str) -> None:
    """Set one `key.sub=value`, in copies of the sections on the way; exits.after and exits.placement replace each other."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise EectlError(f"--set {_shown(change)}: write it as key=value, such as --set optimizer.lr=1e-3")
    *parents, last = [_as_number(part) for part in key.split(".")]
    target = data
    for parent in parents:
        inner = target.get(parent, {})
        if not isinstance(inner, Mapping):
            if inner is not None:
                raise EectlError(f"--set {_shown(change)}: {_shown(parent)} is not a section")
            inner = {}
        target[parent] = dict(inner)
        target = target[parent]
    if parents == ["exits"] and last in ("after", "placement"):
        target.pop("placement" if last == "after" else "after", None)
    target[last] = parse_yaml(text, where=f"--set {_shown(key)}")


def _as_number(part: str) -> str | int:
    return int(part) if part.isascii() and part.isdecimal() and len(part) <= _MOST_NUMBER else part


def _shown(value: object) -> str:
    """Return the start of a value, with what is no printable character as an escape."""
    text = visible(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _quoted(value: object) -> str:
    """Return a value as Python writes it, long ones shortened; escapes come out as text."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST_VALUE
    short.maxlist = short.maxtuple = 8
    return short.repr(value)


def _mistakes(error: ValidationError, form: type[Section], value: Any, where: str) -> list[str]:
    """Return the first mistakes in `value`, one a line, and how many there are more."""
    found: dict[_Place, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=False):
        found.setdefault(_place(item, value), []).append(item)
    within = {place[:length] for place in found for length in range(len(place))}
    found = {place: items for place, items in found.items() if place not in within}  # the part that is wrong says more
    lines = []
    for place, items in list(found.items())[:_MOST_MISTAKES]:
        lines.append(": ".join([where, *filter(None, [_written(place)]), _fault(items, form, place)]))
    if len(found) > _MOST_MISTAKES:
        lines.append(f"{where}: and {len(found) - _MOST_MISTAKES:,} more mistakes")
    return lines


def _fault(items: Sequence[Any], form: type[Section], place: _Place) -> str:
    """Say what is wrong at one place; there are several `items` where it takes values of several kinds."""
    first = items[0]
    if first["type"] == "extra_forbidden":
        return f"no such key{closest(str(place[-1])[:_LONGEST_NAME], _keys(form, place[:-1]))}"
    faults = dict.fromkeys(item["msg"].removeprefix("Value error, ").replace(" after validation", "") for item in items)
    message = ", or ".join(faults).replace(", or Input should be", ", or")
    message = _SMALL.sub(lambda number: f"{float(number[0]):g}", message)
    if isinstance(first["input"], dict):
        return message
    message = f"is {_quoted(first['input'])}; {message[:1].lower()}{message[1:]}"
    is_text = first["type"] in ("int_type", "float_type") and isinstance(first["input"], str)
    return message + ", in decimal and without quotes, as 17 or 1e-4" if is_text else message


def _place(item: Mapping[str, Any], value: Any) -> _Place:
    """Return where a mistake is, without the names of kinds that pydantic puts in where a place takes several."""
    place: list[int | str] = []
    for number, part in enumerate(item["loc"], 1):
        is_missing = item["type"] == "missing" and number == len(item["loc"])
        if isinstance(value, Mapping) and (part in value or str(part) in value):
            value = value.get(part, value.get(str(part)))
        elif isinstance(part, int) or is_missing:
            value = value[part] if isinstance(value, list | tuple) and isinstance(part, int) and part < len(value) else None
        else:
            continue
        place.append(part)
    return tuple(place)


def _written(place: _Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + _shown(part)
    return text


def _keys(form: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at `location` of a `form` takes."""
    model: Any = form
    for part in location:
        if isinstance(part, int) or (isinstance(model, type) and issubclass(model, PhaseSection)):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = PhaseSection if part == "phases" else annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def dump_recipe(recipe: Recipe) -> str:
    """Write the recipe as YAML that reads back to an equal recipe."""
    return dump_yaml(recipe.plain())


def flatten(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested sections as one level of dotted keys: `{"optimizer.lr": 0.001, …}`; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = item
    return flat
