"""Find the recipe that `eectl train` was asked for, and change it by the options that stand for recipe keys. No torch.

A start on the hub is fetched here, as its recipe may be the one that is meant; the recipe then names its commit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError, one_line
from eectl.core.hub import fetch, local_path, parse_address
from eectl.models.checkpoint import read_about
from eectl.recipe.own_data import own_data
from eectl.recipe.reading import make_recipe, read_recipe
from eectl.recipe.recipe import Recipe
from eectl.recipe.section import start_text
from eectl.recipe.yaml_text import inline_yaml

SHORTHANDS = {  # an option of `eectl train`, by its name in Python → the recipe key that it sets
    "regime": "regime",
    "phase": "phase",
    "seed": "seed",
    "epochs": "epochs",
    "precision": "precision",
    "deterministic": "deterministic",
    "data_root": "data.root",
    "start": "init",
    "pretrained": "backbone.pretrained",
}
OWN_DATA = ("data", "text", "target", "task", "backbone", "weights")  # options that `own_data` turns into recipe keys


@dataclass(frozen=True)
class Found:
    """A recipe, the folder that its run goes to where no other is named, and notes on what was chosen for the user."""

    recipe: Recipe
    folder: Path
    notes: tuple[str, ...] = ()


def find_recipe(
    recipe: Recipe | str | Path | None = None, *, changes: Iterable[str] = (), given: Mapping[str, Any] | None = None
) -> Found:
    """Return the recipe that is meant, with all changes made to it.

    Args:
        recipe: a recipe, the name of a shipped one, or a path; default: that of the checkpoint `given["start"]`, else `digits`.
        changes: `key=value` texts, as in `--set`.
        given: values by the names in SHORTHANDS, which come after `changes`, and in OWN_DATA, which come before; None is no
            change.

    Raises:
        EectlError: a recipe that is not there, or its mistakes, one a line; a start on the hub that cannot be fetched.
    """
    options = {name: value for name, value in (given or {}).items() if value is not None}
    if "start" in options:
        options["start"] = _checked(options["start"])
    edits = [
        *changes,
        *(f"{SHORTHANDS[name]}={inline_yaml(_plain(value))}" for name, value in options.items() if name in SHORTHANDS),
    ]
    start = options.get("start")
    own = own_data(
        None if isinstance(recipe, Recipe) or recipe is None else str(recipe),
        has_start=isinstance(recipe, Recipe) or start is not None,
        changes=edits,
        **{name: options[name] for name in OWN_DATA if name in options},
    )
    edits = [*own.changes, *edits]
    if isinstance(recipe, Recipe):
        name = recipe.data.name.replace("/", "-")
        full = make_recipe(recipe.plain(), where="recipe", changes=edits) if edits else recipe
    elif own.recipe is None and start is not None:
        name = parse_address(start).name if isinstance(start, str) else Path(start).stem
        start = _fetched(start)
        trained = {key: value for key, value in read_about(local_path(start)).recipe.items() if key not in ("phase", "init")}
        full = make_recipe(trained, where=f"{start} (its recipe)", changes=edits)
    else:
        source = own.recipe or "digits"
        name, full = Path(source).stem, read_recipe(source, changes=edits)
    if full.init is not None:
        full = full.model_copy(update={"init": _fetched(full.init)})
    part = "" if full.phase is None else f"-phase-{full.phase}"
    return Found(full, Path("runs") / f"{own.name or name}-{full.regime}{part}-seed-{full.seed}", own.notes)


def _fetched(start: Path | str) -> Path | str:
    """Return what a run starts from, one on the hub with its commit and fetched."""
    return fetch(start)[1] if isinstance(start, str) else start


def _checked(start: Path | str) -> Path | str:
    """Return a path, or an address on the hub; raises EectlError for an address that is not written as one."""
    try:
        return start_text(start)
    except ValueError as error:
        raise EectlError(f"--from {one_line(str(start))[:80]}: {error}") from error


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
