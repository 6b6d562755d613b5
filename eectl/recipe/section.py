"""The base of every section of a recipe: the frozen base class and the kinds of values that keys take. No torch.

A kind is strict and finite: `true` is no number, `"3"` is no 3, and a number has a least and a greatest value. The ranges are
wider than what anybody trains with, and narrow enough that nothing overflows, loops without end or fills the memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from eectl.core.errors import visible
from eectl.core.hub import FORM, is_hub_address, parse_address
from eectl.recipe.choices import MOST_IN_A_NAME

MOST_CHARACTERS = 4096  # of a text; also the longest path that Linux takes
MOST_DEPTH = 16  # of free data, lists in lists
MOST_VALUES = 10_000  # of free data
MOST_WHOLE = 2**53  # of free data: larger whole numbers are others in JSON readers that only know floats


def _writable(text: str) -> str:
    """Refuse what no file name, file of UTF-8 or message can hold."""
    if "\0" in text:
        raise ValueError("a NUL character stands in it; take it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair stands in it, which is no character; write it again in UTF-8")
    return text


def _path_text(value: Any) -> Any:
    """Take a path, or a text that can be one."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("a path is a text; put it in quotes")
    if not 0 < len(value) <= MOST_CHARACTERS:
        raise ValueError(f"a path has 1 to {MOST_CHARACTERS:,} characters, not {len(value):,}")
    return _writable(value)


def start_text(value: Any) -> Path | str:
    """Take a path, or the address of a file on the hub, which stays a text."""
    text = str(_path_text(value))
    if is_hub_address(text):
        parse_address(text)
        return text
    if text.startswith("hf:"):
        raise ValueError(f"an address on the hub is written as {FORM}")
    return Path(text)


def whole_or_none(value: Any) -> Any:
    """Refuse true and 1.0 where they would pass for 1."""
    if value is not None and type(value) is not int:
        raise ValueError("input should be a whole number")
    return value


def plain_data(value: Any) -> Any:
    """Return free data as JSON has it, texts, finite numbers, true, false, null, lists and mappings by name, of a bounded size.

    Raises:
        ValueError: there is something else in it, or too much.
    """
    num_left = MOST_VALUES

    def copied(part: Any, place: str, depth: int) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise ValueError(f"more than {MOST_VALUES:,} values; that is too much")
        if depth > MOST_DEPTH:
            raise ValueError(f"lists and mappings more than {MOST_DEPTH} deep; that is too much")
        if isinstance(part, Mapping):
            return {_name(key, place): copied(each, f"{place}.{key}", depth + 1) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [copied(each, f"{place}[{number}]", depth + 1) for number, each in enumerate(part)]
        return _scalar(part, place)

    return copied(value, "", 0)


def _name(key: Any, place: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{_at(place)}the key {key!r:.80} is no text; put it in quotes")
    return str(_scalar(key, place))


def _scalar(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= MOST_WHOLE:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise ValueError(f"{_at(place)}a text of {len(value):,} characters; at most {MOST_CHARACTERS:,} are taken")
        return _writable(value)
    if isinstance(value, int):
        raise ValueError(f"{_at(place)}a number beyond ±2^53; smaller ones are taken")
    if isinstance(value, float):
        raise ValueError(f"{_at(place)}is {value}; finite numbers are taken")
    raise ValueError(f"{_at(place)}a {type(value).__name__}; texts, numbers, true, false, null, lists and mappings are taken")


def _at(place: str) -> str:
    return f"{visible(place.removeprefix('.'))[:80]}: " if place else ""


Switch = Annotated[bool, Field(strict=True)]
ShortText = Annotated[str, Field(strict=True, min_length=1, max_length=MOST_CHARACTERS), AfterValidator(_writable)]
PathText = Annotated[Path, BeforeValidator(_path_text)]
StartText = Annotated[Path | str, PlainValidator(start_text), WithJsonSchema({"type": "string", "format": "path"})]
FreeData = Annotated[dict[str, Any], BeforeValidator(plain_data)]

Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)]
Rate = Annotated[float, Field(ge=1e-12, le=1e3, allow_inf_nan=False, strict=True)]  # a learning rate
RateOrZero = Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False, strict=True)]  # the same, or 0; and a weight decay
Factor = Annotated[float, Field(ge=1e-12, le=1e6, allow_inf_nan=False, strict=True)]  # what something is multiplied or divided by
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False, strict=True)]  # of an exit's loss
Epochs = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False, strict=True)]  # a time, in parts of epochs too

Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]
Rows = Annotated[int, Field(ge=1, le=10**6, strict=True)]  # of a batch
Width = Annotated[int, Field(ge=1, le=MOST_IN_A_NAME, strict=True)]  # of a layer
Pixels = Annotated[int, Field(ge=1, le=8192, strict=True)]  # a side of an image
Block = Annotated[int, Field(ge=0, lt=10_000, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
