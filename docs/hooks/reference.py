"""Fills the reference pages while the documentation is built: commands from Typer, recipe keys from pydantic, names from `eectl`.

A page asks for its part with a line such as `<!-- generated: commands -->`, so nothing that the code says is kept twice.
Docstrings are rendered by mkdocstrings, to which the `api` part leaves a line for each name in `eectl.__all__`.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # the checkout that is documented, not another one that is installed
    sys.path.insert(0, str(ROOT))

WORDS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}
# what is shown of a class; default: all
MEMBERS = {"Model": "[device, exits, costs, forward, preprocess, predict]", "Recipe": "false"}
MANY = 6  # choices that a column has room for; more of them stand in the description
MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker of a page by the part it names; mkdocs calls this for every page."""
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def commands() -> str:
    """Return every command with its arguments and options, in the order of `eectl --help`."""
    import typer

    from eectl.cli.app import app

    sections = []
    for path, command in _commands(typer.main.get_command(app), ("eectl",)):
        sections.append(_command(" ".join(path), command))
    return "\n\n".join(sections)


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        here = (*path, name)
        yield here, command
        if hasattr(command, "commands"):
            yield from _commands(command, here)


def _command(name: str, command: Any) -> str:
    about, example = _help(command.help or "")
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    if hasattr(command, "commands"):
        usage = f"{name} COMMAND …"
    else:
        usage = " ".join([name, *(_shown(each) for each in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"{'#' * len(name.split())} {name}", about, f"```text\n{usage}\n```"]
    if example:
        lines.append(f"For example:\n\n```sh\n{example}\n```")
    if arguments:
        rows = [(f"`{_shown(each)}`", _cell(each.help or "")) for each in arguments]
        lines.append(_table(("argument", "what it is"), rows))
    if options:
        rows = [(_names(each, command), _default(each), _cell(each.help or "")) for each in options]
        lines.append(_table(("option", "default", "what it does"), rows))
    return "\n\n".join(line for line in lines if line)


def _help(text: str) -> tuple[str, str]:
    """Split a command's help into its prose and the command line after `Example:`."""
    prose, _, example = inspect.cleandoc(text).replace("\f", "").partition("Example:")
    paragraphs = [" ".join(part.split()) for part in prose.strip().split("\n\n")]
    return "\n\n".join(paragraphs), " ".join(example.split())


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _names(option: Any, command: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    if not option.is_flag:
        annotation = inspect.signature(command.callback).parameters[option.name].annotation
        names[-1] += f" {option.metavar or _value_word(annotation)}"
    return ", ".join(f"`{name}`" for name in names)


def _value_word(annotation: Any) -> str:
    """Return what stands for an option's value, from its type: `Annotated[Path | None, …]` is PATH."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and each in WORDS:
            return WORDS[each]
        if get_origin(each) is not None and (found := _value_word(get_args(each)[0])):
            return found
    return ""


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag and not option.secondary_opts:
        return "off"
    if option.default in (None, [], ()):
        return ""
    return f"`{option.default}`" if not option.is_flag else f"`{option.opts[0] if option.default else option.secondary_opts[0]}`"


def recipe_keys() -> str:
    """Return every key of a recipe with its type, default and description, a table per section."""
    from eectl.recipe.recipe import Recipe

    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    sections = []
    for path, part in _sections(schema, definitions, ""):
        rows = [
            (f"`{path}.{key}`".replace("`.", "`"), _type(field, definitions), _value(field), _cell(field.get("description", "")))
            for key, field in part["properties"].items()
            if _section_of(field, definitions) is None
        ]
        about = " ".join(inspect.cleandoc(part.get("description", "")).split("\n\n")[0].split())
        title = f"`{path}`" if path else "At the top"
        sections.append(f"## {title}\n\n{about}\n\n{_table(('key', 'type', 'default', 'what it does'), rows)}")
    return "\n\n".join(sections)


def _sections(part: Mapping[str, Any], definitions: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, part
    for key, field in part["properties"].items():
        section = _section_of(field, definitions)
        if section is not None:
            yield from _sections(section, definitions, f"{path}.{key}".lstrip("."))


def _section_of(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a key opens, if it opens one, and not a plain value."""
    reference = field.get("$ref") or (field.get("allOf") or [{}])[0].get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else None


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return a JSON schema's type in words."""
    if "$ref" in field:
        return "a section: " + ", ".join(f"`{key}`" for key in definitions[field["$ref"].rpartition("/")[2]]["properties"])
    if len(field.get("enum", ())) > MANY:
        return "one of the names on the right"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(each, definitions) for each in field["anyOf"] if each.get("type") != "null"))
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(_type(each, definitions) for each in field["prefixItems"]) + "]"
        return f"list of {_type(field.get('items', {}), definitions)}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(values, definitions)}" if isinstance(values, Mapping) else "mapping"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _range(field)
    return {"boolean": "true or false", "string": "path" if field.get("format") == "path" else "text"}.get(str(kind), "any value")


def _range(field: Mapping[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign}\u00a0{_number(field[name])}" for name, sign in words.items() if name in field]
    return f" {' and '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    """Return a number as people write it: 65,536, 0.001, 1e9."""
    return f"{value:,.0f}" if 1 <= value < 1e7 and value == int(value) else re.sub(r"e\+?(-?)0?", r"e\1", f"{value:g}")


def _value(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if value is None or (isinstance(value, Mapping) and value and not any(value.values())):  # nothing is set
        return ""
    return f"`{value:g}`".replace("e+0", "e") if isinstance(value, float) else f"`{json.dumps(value)}`".replace('"', "")


def api() -> str:
    """Return a line for mkdocstrings about each public name, in the order of `eectl.__all__`."""
    import eectl

    parts = []
    for name in eectl.__all__:
        found = getattr(eectl, name)
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            continue
        members = f"        members: {MEMBERS[name]}\n" if name in MEMBERS else ""
        parts.append(f"::: {found.__module__}.{found.__qualname__}\n    options:\n        heading: eectl.{name}\n{members}")
    return "\n".join(parts)


def changelog() -> str:
    """Return CHANGELOG.md without its title."""
    return _beside("CHANGELOG.md")


def contributing() -> str:
    """Return CONTRIBUTING.md without its title."""
    return _beside("CONTRIBUTING.md")


def security() -> str:
    """Return SECURITY.md without its title."""
    return _beside("SECURITY.md")


def _beside(name: str) -> str:
    """Return a file of the checkout as a part of a page: no title, and links as they are from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").partition("\n")[2]
    return text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)").replace("](SECURITY.md)", "](security.md)")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipe-keys": recipe_keys,
    "api": api,
    "changelog": changelog,
    "contributing": contributing,
    "security": security,
}
