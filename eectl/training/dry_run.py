"""What a recipe or a checkpoint amounts to before anything runs: its phases and what each exit costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eectl.core.errors import EectlError
from eectl.data import data_info
from eectl.exits.costs import Costs, measure_costs
from eectl.models.checkpoint import load_checkpoint
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.reading import is_recipe, read_recipe
from eectl.recipe.recipe import ModelSpec, Recipe
from eectl.recipe.regimes import Phase
from eectl.training.network import first_network, planned_phases, resolve, with_exits


@dataclass(frozen=True)
class Priced:
    """A network's spec and what its exits cost."""

    spec: ModelSpec
    costs: Costs


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, its phases, what its exits cost, and what its heads take for `loss_weights: auto`."""

    recipe: Recipe
    phases: tuple[Phase, ...]
    priced: Priced
    default_weights: str


def plan(recipe: Recipe) -> Plan:
    """Resolve a recipe without training; reads no images or texts where the data set's facts are known. Raises EectlError."""
    unloaded = recipe.backbone.model_copy(update={"pretrained": False})  # a plan has no use for published weights
    network = first_network(recipe.model_copy(update={"backbone": unloaded}), data_info(recipe.data))
    recipe = resolve(recipe, network)
    if not network.model.after:
        network = with_exits(network, recipe.exits, seed=recipe.seed)
    return Plan(recipe, planned_phases(recipe), _price(network.model, network.spec), network.model.default_weights)


def costs_of(source: str, *, changes: Sequence[str] = (), data_root: Path | None = None) -> Priced:
    """What the exits of a checkpoint or a recipe cost."""
    if changes and not is_recipe(source):
        raise EectlError(f"{source}: --set changes a recipe, and this is a checkpoint; name a recipe, or leave out --set")
    if is_recipe(source):
        more = [] if data_root is None else [f"data.root='{data_root}'"]
        return plan(read_recipe(source, changes=[*changes, *more])).priced
    loaded = load_checkpoint(Path(source))
    return _price(loaded.model, loaded.about.spec)


def _price(model: MultiExitModel, spec: ModelSpec) -> Priced:
    with torch.random.fork_rng(devices=[]):
        return Priced(spec, measure_costs(model, spec.input_shape))
