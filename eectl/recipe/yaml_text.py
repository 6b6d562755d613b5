"""YAML as recipes are written: read from a text with its place in every complaint, and written so that it reads back the same.

Plain scalars are those of YAML 1.2, and numbers decimal: `017`, `0x10`, `1_0`, `1:30` and dates are texts, since readers of YAML
differ on them. Anchors with aliases, tags and several documents are not taken. What the values mean is not known here. No torch.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from eectl.core.errors import EectlError, visible
from eectl.core.numbers import decimal_number, whole_number

MOST_CHARACTERS = 256 * 1024  # of a document; the longest shipped recipe has 3,000
MOST_DEPTH = 32
_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_NO_NUMBER = re.compile(r"([-+]?)(?:\.(?:inf|Inf|INF)|(\.(?:nan|NaN|NAN)))")
_READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads ten times as fast
_NONE = object()


@dataclass
class _Open:
    """A list or mapping whose end has not been read; `key` waits for its value."""

    value: dict[str | int, Any] | list[Any]
    key: Any = _NONE


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a YAML document holds: None, texts, numbers, true and false, in lists and mappings by text or whole number.

    Raises:
        EectlError: with line and column.
    """
    if len(text) > MOST_CHARACTERS:
        raise EectlError(f"{where}: {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}")
    try:
        return _compose(yaml.parse(text, _READER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise EectlError(f"{where}{place}: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise EectlError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def _compose(events: Iterable[yaml.Event]) -> Any:
    document: list[Any] = []
    open_now = [_Open(document)]
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise _fault("aliases (*name) are not taken", event)
        if isinstance(event, yaml.DocumentStartEvent) and document:
            raise _fault("a second document begins; a recipe is one", event)
        if isinstance(event, yaml.CollectionEndEvent):
            open_now.pop()
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            continue
        if event.tag is not None:
            raise _fault(f"tags ({visible(event.tag)[:80]}) are not taken; write the value alone", event)
        value: Any = (
            _scalar(event) if isinstance(event, yaml.ScalarEvent) else [] if isinstance(event, yaml.SequenceStartEvent) else {}
        )
        _put(open_now[-1], value, event)
        if isinstance(event, yaml.CollectionStartEvent):
            open_now.append(_Open(value))
            if len(open_now) > MOST_DEPTH:
                raise _fault(f"lists and mappings more than {MOST_DEPTH} deep are not taken", event)
    return document[0] if document else None


def _fault(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _put(inside: _Open, value: Any, event: yaml.Event) -> None:
    """Append to a list, or take a mapping's next key, or the value of the key before."""
    if isinstance(inside.value, list):
        inside.value.append(value)
    elif inside.key is not _NONE:
        inside.value[inside.key] = value
        inside.key = _NONE
    elif type(value) not in (str, int):
        raise _fault("a key is a name or a whole number; put other texts in quotes", event)
    elif value in inside.value:
        raise _fault(f"key {value!r:.80} stands twice; keep one", event)
    else:
        inside.key = value


def _scalar(event: yaml.ScalarEvent) -> Any:
    if not event.implicit[0]:  # in quotes, or a block of lines
        return event.value
    value = _meaning(event.value)
    if isinstance(value, float) and math.isinf(value) and not _NO_NUMBER.fullmatch(event.value):
        raise _fault(f"{event.value[:80]} is too large a number", event)
    return value


def _meaning(text: str) -> Any:
    """Return what a scalar without quotes is: None, true, false, a number, or the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for number in (whole_number(text), decimal_number(text)):
        if number is not None:
            return number
    if found := _NO_NUMBER.fullmatch(text):
        return math.nan if found[2] else math.copysign(math.inf, -1 if found[1] == "-" else 1)
    return text


class _Writer(yaml.SafeDumper):
    """Quotes every text that a reader of YAML, this one or another, might take for something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _write_text(writer: _Writer, text: str) -> yaml.Node:
    is_plain = text.isprintable() and text == text.strip() and _meaning(text) is text
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Writer.add_representer(str, _write_text)


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=math.inf)


def inline_yaml(value: Any) -> str:
    """Write plain data on one line, as the value of a `key=value` change."""
    return yaml.dump([value], Dumper=_Writer, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)[1:-2]
