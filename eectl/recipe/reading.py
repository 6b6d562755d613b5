"""Reading recipes from YAML and `--set`, with all mistakes at once, and writing them. No torch."""

import re
from collections.abc import Hashable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from eectl.core.errors import EectlError, closest, lookup
from eectl.recipe.data_paths import not_a_recipe
from eectl.recipe.recipe import PhaseSection, Recipe


class _Loader(yaml.SafeLoader):
    """Reads YAML with the scalars of YAML 1.2 (1e-4 is a number, `no` is text); refuses a key that stands twice, and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice; keep one", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.Inf)$|^\.(?:nan|NaN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a YAML document holds; raises EectlError with line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise EectlError(f"{where}{place}: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise EectlError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


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
    if source in shipped:
        text = shipped[source]
    elif (advice := not_a_recipe(source)) is not None:
        raise EectlError(advice)
    elif is_recipe(source) or Path(source).exists():
        text = _read_text(Path(source))
    else:
        text = lookup(shipped, source, what="recipe (and no file)")
    value = parse_yaml(text, where=source)
    if not isinstance(value, (dict, NoneType)):
        raise EectlError(f"{source}: a recipe is a mapping of keys to values, this is a {type(value).__name__}")
    return make_recipe(value or {}, where=source, changes=changes)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EectlError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def make_recipe(value: Mapping[str, Any], *, where: str, changes: Iterable[str] = ()) -> Recipe:
    """Make a Recipe of plain data and `key.sub=value` changes; raises EectlError that lists every mistake, one a line."""
    data = _deep_copy(value)
    for change in changes:
        _apply(data, change)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise EectlError("\n".join(_mistakes(error, where))) from error


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return [_deep_copy(item) for item in value] if isinstance(value, list) else value


def _apply(data: dict[Any, Any], change: str) -> None:
    """Set one `key.sub=value`; exits.after and exits.placement replace each other."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise EectlError(f"--set {change}: write it as key=value, such as --set optimizer.lr=1e-3")
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    target = data
    for parent in parents:
        inner = target.get(parent)
        if not isinstance(inner, dict):
            if inner is not None:
                raise EectlError(f"--set {change}: {parent} is not a section")
            inner = target[parent] = {}
        target = inner
    if parents == ["exits"] and last in ("after", "placement"):
        target.pop("placement" if last == "after" else "after", None)
    target[last] = parse_yaml(text, where=f"--set {key}")


def _mistakes(error: ValidationError, where: str) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        place = _place(item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"no such key{closest(str(item['loc'][-1]), _keys(item['loc'][:-1]))}"
        elif not isinstance(item["input"], dict):
            message = f"is {item['input']!r}; {message[:1].lower()}{message[1:]}"
        lines.append(f"{where}: {place}: {message}" if place else f"{where}: {message}")
    return list(dict.fromkeys(lines))


def _place(location: tuple[int | str, ...]) -> str:
    place = ""
    for part in location:
        place += f"[{part}]" if isinstance(part, int) else ("." if place else "") + str(part)
    return place


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at `location` takes."""
    model: Any = Recipe
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
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def flatten(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested sections as one level of dotted keys: `{"optimizer.lr": 0.001, …}`; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = item
    return flat
