"""The network between phases: what the first phase starts from, how exits are attached, and its history."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from eectl.core.errors import EectlError
from eectl.core.hub import local_path
from eectl.core.seeds import derive_seed
from eectl.data import DataInfo
from eectl.models.adapters.dropout import RATES
from eectl.models.backbone import Backbone
from eectl.models.build import (
    attach_ensembles,
    attach_exits,
    build_backbone,
    build_model,
    check_inputs_fit,
    model_spec,
    with_dropout,
)
from eectl.models.checkpoint import load_checkpoint
from eectl.models.heads import head_class
from eectl.models.multi_exit import MultiExitModel, blocks_of
from eectl.recipe.data_section import describe_outputs
from eectl.recipe.recipe import BackboneSection, ExitsSection, ModelSpec, Recipe
from eectl.recipe.regimes import Phase, phase_numbered, regime_phases
from eectl.recipe.weighting import exit_weights
from eectl.training.l2w import check_phases


@dataclass(frozen=True)
class Network:
    """A network between phases: its spec, the history of what made it, and the digest of the checkpoint it came from."""

    model: MultiExitModel
    spec: ModelSpec
    history: tuple[dict[str, Any], ...] = ()
    parent: str | None = None


def first_network(recipe: Recipe, info: DataInfo) -> Network:
    """Return the network that the first phase starts from: that of `init`, the library's weights, or fresh ones from the seed.

    Raises EectlError for a network that takes other inputs, or gives other outputs, than the data has.
    """
    outputs = info.num_outputs
    if recipe.init is None:
        torch.manual_seed(derive_seed(recipe.seed, "backbone"))
        backbone = build_backbone(recipe.backbone, input_shape=info.input_shape, num_outputs=outputs)
        _check_tokens(recipe, info, backbone)
        model = MultiExitModel(backbone)
        return Network(model, model_spec(model, recipe.backbone, input_shape=info.input_shape, num_outputs=outputs))
    loaded = load_checkpoint(local_path(recipe.init))
    spec = loaded.about.spec
    check_inputs_fit(spec.backbone.name, info.input_shape)
    if (spec.num_outputs, loaded.about.task) != (outputs, info.task):
        made, has = (describe_outputs(*each) for each in ((loaded.about.task, spec.num_outputs), (info.task, outputs)))
        raise EectlError(f"{recipe.init}: a network for {made}, but {info.name} has {has}")
    if spec.input_shape != info.input_shape:
        wanted, found = ("×".join(map(str, shape)) for shape in (spec.input_shape, info.input_shape))
        keys = f"data.max_length={spec.input_shape[-1]}" if info.kind == "text" else "data.image_size or data.channels"
        raise EectlError(f"{recipe.init}: a network for {wanted} inputs, but {info.name} gives {found}; set {keys}")
    _check_tokens(recipe, info, loaded.model.backbone)
    model, spec = _with_rates(loaded.model, spec, recipe.backbone)
    return Network(model, spec, tuple(dict(entry) for entry in loaded.about.history), loaded.digest)


def _with_rates(model: MultiExitModel, spec: ModelSpec, asked: BackboneSection) -> tuple[MultiExitModel, ModelSpec]:
    """Return a network of `init`, and its spec, with the drop path and dropout that a recipe asks for; its weights stay."""
    rates = {key: rate for key in ("drop_path", "dropout") if (rate := getattr(asked, key)) is not None}
    old = {key: value for key, value in spec.backbone.args.items() if not any(key in RATES[rate][0] for rate in rates)}
    changed = with_dropout(spec.backbone.model_copy(update={"args": old, **rates}))
    if changed.args == spec.backbone.args:
        return model, spec
    spec = spec.model_copy(update={"backbone": changed})
    other = build_model(spec)
    other.load_state_dict(model.state_dict())
    return other, spec


def _check_tokens(recipe: Recipe, info: DataInfo, backbone: Backbone) -> None:
    """Raise EectlError where the data has token ids that the network has no embedding for."""
    if info.largest_token is not None and backbone.vocabulary is not None and info.largest_token >= backbone.vocabulary:
        raise EectlError(
            f"data.tokenizer: '{recipe.data.tokenizer}' gives token ids up to {info.largest_token}, and {backbone.name} takes "
            f"those below {backbone.vocabulary}; name the tokenizer that belongs to the backbone"
        )


def resolve(recipe: Recipe, network: Network) -> Recipe:
    """Return the recipe with its backbone and exits as they will be: those of `init` if it has any, exits as a list of blocks."""
    start = recipe.backbone if recipe.init is None else network.spec.backbone
    return recipe.model_copy(update={"exits": resolve_exits(recipe.exits, network), "backbone": start})


def resolve_exits(exits: ExitsSection, network: Network) -> ExitsSection:
    """Return the network's own exits, or if it has none those asked for, as a sorted list of blocks and a kind of head."""
    if network.spec.after:
        return ExitsSection(after=network.spec.after, head=network.spec.heads[0])
    backbone = network.model.backbone
    after = blocks_of(exits.placement or "", backbone.depth) if exits.after is None else exits.after
    return ExitsSection(after=tuple(sorted(after)), head=backbone.default_head if exits.head == "auto" else exits.head)


def with_exits(network: Network, exits: ExitsSection, *, seed: int) -> Network:
    """Return the network with fresh exits, drawn from the seed."""
    torch.manual_seed(derive_seed(seed, "exits"))
    model = attach_exits(
        network.model.backbone,
        after=exits.after or (),
        heads=exits.head,
        num_outputs=network.spec.num_outputs,
        input_shape=network.spec.input_shape,
    )
    spec = network.spec.model_copy(update={"after": model.after, "heads": (exits.head,) * len(model.after)})
    return replace(
        network, model=model, spec=spec, history=(*network.history, {"attached": list(model.after), "head": exits.head})
    )


def with_combine(network: Network, *, seed: int) -> Network:
    """Return the network with the ensembles that its heads are made for, drawn from the seed; ones it has stay as they are."""
    kind = head_class(network.spec.heads[0])[0].ensemble
    if network.model.combine is not None:
        return network
    assert kind is not None, "a phase of ensembles is only planned for heads that have them"
    torch.manual_seed(derive_seed(seed, "combine"))
    model = attach_ensembles(network.model, kind, num_outputs=network.spec.num_outputs)
    spec = network.spec.model_copy(update={"combine": kind})
    return replace(network, model=model, spec=spec, history=(*network.history, {"combined": kind}))


def network_for(phase: Phase, network: Network, recipe: Recipe, *, say: Callable[[str], None]) -> tuple[Network, Phase]:
    """Return the network with what the phase trains: exits, or ensembles; and the phase as that network numbers its exits.

    Args:
        phase: one of `planned_phases`.
        network: the network as the phase before it left it.
        recipe: the resolved one.
        say: is called with what the user should know.
    """
    if phase.needs_heads(len(recipe.exits.after or ()) + 1) and not network.model.after:
        network = with_exits(network, recipe.exits, seed=recipe.seed)
        blocks = ", ".join(map(str, network.model.after))
        say(f"attaching {recipe.exits.head} exits after blocks {blocks}")
    if not network.model.after:
        phase = phase_numbered(recipe.regime, 1, phase.number)
    return with_combine(network, seed=recipe.seed) if phase.combine else without_combine(network), phase


def without_combine(network: Network) -> Network:
    """Return the network without ensembles, as every phase but the ensembles' own trains it."""
    if network.model.combine is None:
        return network
    model = MultiExitModel(network.model.backbone, network.model.heads, after=network.model.after)
    spec = network.spec.model_copy(update={"combine": None})
    return replace(network, model=model, spec=spec, history=(*network.history, {"combined": None}))


def later_specs(network: Network, exits: ExitsSection) -> list[ModelSpec]:
    """Return the specs that a network can have after phases of its run: as it is or with exits, with ensembles or without."""
    specs = [network.spec]
    if not network.spec.after:
        after = exits.after or ()
        specs.append(network.spec.model_copy(update={"after": after, "heads": (exits.head,) * len(after)}))
    kinds = {head_class(kind)[0].ensemble for spec in specs for kind in spec.heads}
    return [spec.model_copy(update={"combine": kind}) for spec in specs for kind in (None, network.spec.combine, *kinds)]


def check_frozen(recipe: Recipe, network: Network) -> list[str]:
    """Raise EectlError where `freeze_until` is no block of the network; returns what the user should know of it."""
    last, depth = recipe.freeze_until, network.model.backbone.depth
    if last is None:
        return []
    if last >= depth:
        raise EectlError(f"freeze_until is {last}; {network.spec.backbone.name} has blocks 0–{depth - 1}, and its head trains")
    if recipe.start != "random":
        return []
    return [f"the stem and blocks 0–{last} are frozen at random weights; start from trained ones, --pretrained or --from"]


def planned_phases(recipe: Recipe) -> tuple[Phase, ...]:
    """Return the phases that a resolved recipe runs, in the numbering of the whole network's exits.

    Raises EectlError for a phase that is not there, in `phase` or `phases`, and for loss weights that do not fit the exits.
    """
    num_exits = len(recipe.exits.after or ()) + 1
    combine = num_exits > 1 and head_class(recipe.exits.head)[0].ensemble is not None
    for number in recipe.phases:
        phase_numbered(recipe.regime, num_exits, number, place=f"phases.{number}", combine=combine)
    phases = regime_phases(recipe.regime, num_exits, combine=combine)
    if recipe.phase is not None:
        phases = (phase_numbered(recipe.regime, num_exits, recipe.phase, combine=combine),)
    for exits in (exits for phase in phases for exits in phase.losses):
        exit_weights(recipe.loss_weights, num_exits=num_exits, taking_part=sorted(exits))
    if recipe.loss_weights == "l2w":
        check_phases(phases, num_exits)
    return phases
