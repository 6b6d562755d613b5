"""Say what a recipe or a checkpoint amounts to before anything runs: phases, rows, costs of the exits, and a rough time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eectl.core.distributed import pick_device
from eectl.core.errors import EectlError
from eectl.core.precision import settings
from eectl.core.stopwatch import device_name, settle
from eectl.data import DataInfo, class_counts, data_info, note_on_classes, outline
from eectl.exits.costs import Costs, measure_costs
from eectl.models.adapters.args_and_weights import NotOnThisMachineError
from eectl.models.build import TRANSFORMERS
from eectl.models.checkpoint import load_checkpoint
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.data_section import DataSection
from eectl.recipe.preprocessing import with_preprocessing
from eectl.recipe.published_rows import published_parts, split_sizes
from eectl.recipe.reading import is_recipe, read_recipe
from eectl.recipe.recipe import ModelSpec, Recipe
from eectl.recipe.regimes import Phase
from eectl.training.network import Network, check_frozen, first_network, planned_phases, resolve, with_exits
from eectl.training.running import make_execution

STEP_MACS = 5e9  # what the timed step may take: about a second on a slow CPU


@dataclass(frozen=True)
class Priced:
    """A network's spec and what its exits cost."""

    spec: ModelSpec
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """Return the costs as JSON-able data; `unit` is the multiply-add."""
        costs, after = self.costs, self.spec.after
        return {
            "kind": "costs",
            "schema": 1,
            "unit": "MACs",
            "plain": costs.plain,
            "parameters": costs.parameters,
            "exits": [
                {
                    "number": number,
                    "after": after[number - 1] if number <= len(after) else None,
                    "cost": cost,
                    "share": costs.shares[number - 1],
                    "heads": sum(costs.heads[:number]),
                    "head_parameters": costs.head_parameters[number - 1] if number <= len(after) else None,
                }
                for number, cost in enumerate(costs.exits, 1)
            ],
        }


@dataclass(frozen=True)
class Plan:
    """A resolved recipe and what it amounts to.

    `default_weights` is what its heads take for `loss_weights: auto`; `rows` are those of each split, `classes` their names, or
    numbers where only the files know the names, `by_class` the rows of each class in each split where the files were read.
    `notes` say what the plan assumes and what stands out in the rows.
    """

    recipe: Recipe
    phases: tuple[Phase, ...]
    priced: Priced
    default_weights: str
    rows: dict[str, int]
    classes: tuple[str, ...]
    model: MultiExitModel
    notes: tuple[str, ...] = ()
    by_class: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of an epoch of each phase, roughly, and how they were found."""

    seconds: tuple[float, ...]
    how: str


def plan(recipe: Recipe) -> Plan:
    """Resolve a recipe without training it.

    Neither weights nor, for published data, any files are read: a network on the hub whose configuration is not on this machine
    is planned as its type is by default. Folders and text files of one's own are counted.

    Raises:
        EectlError: what training would refuse before its first step.
    """
    recipe, prepared = with_preprocessing(recipe)
    info = data_info(recipe.data)
    network, notes = _planned_network(recipe, info)
    notes = (*prepared, *notes)
    recipe = resolve(recipe, network)
    if not network.model.after:
        network = with_exits(network, recipe.exits, seed=recipe.seed)
    rows, frozen = _rows(recipe.data, info.classes), check_frozen(recipe, network)
    return Plan(
        recipe,
        planned_phases(recipe),
        _price(network.model, network.spec),
        network.model.default_weights,
        rows.splits,
        info.classes,
        network.model,
        (*notes, *frozen, *rows.notes),
        rows.by_class,
    )


def _planned_network(recipe: Recipe, info: DataInfo) -> tuple[Network, tuple[str, ...]]:
    """Return the first phase's network without published weights, and what had to be assumed of it."""
    plain = recipe.backbone.model_copy(update={"pretrained": False})
    try:
        return first_network(recipe.model_copy(update={"backbone": plain}), info), ()
    except NotOnThisMachineError as missing:
        if not recipe.backbone.pretrained:
            raise
        kind = missing.model_type
        if kind is None:
            raise EectlError(
                f"{plain.name} is not on this machine, and its name says no model type to plan with; without --dry-run it is "
                "downloaded, a folder with its config.json is hf/./FOLDER"
            ) from missing
    stand_in = plain.model_copy(update={"name": TRANSFORMERS + kind})
    note = f"{plain.name} is not on this machine: planned with the sizes that transformers' {kind} has by default"
    try:
        return first_network(recipe.model_copy(update={"backbone": stand_in}), info), (note,)
    except EectlError as error:
        raise EectlError(f"{note}, where {error}") from error


@dataclass(frozen=True)
class _Rows:
    """The rows of each split, how many there are of each class where files were read, and what should be known of them."""

    splits: dict[str, int]
    by_class: dict[str, list[int]]
    notes: tuple[str, ...] = ()


def _rows(data: DataSection, classes: Sequence[str]) -> _Rows:
    """Return the rows of a published data set from a table, and of one's own from its files, whose images are not decoded.

    Raises EectlError where training would refuse them, as for copies.
    """
    parts = published_parts(data.name)
    if parts is not None:
        return _Rows(split_sizes(data, parts), {})
    found, noun = outline(data), "texts" if data.is_text else "images"
    found.copies.check()
    counts = class_counts(found.labels, classes)
    uneven = note_on_classes(counts.get("train", ()), classes, noun=noun) if data.task == "classification" else ()
    notes = (*found.notes, *found.copies.notes(), *uneven)
    return _Rows({name: len(labels) for name, labels in found.labels.items()}, counts, notes)


def estimate_time(planned: Plan, *, device: str = "auto") -> TimeEstimate:
    """Estimate an epoch of each phase from one timed step of the whole network on a few rows of noise.

    A step forward and backward counts as three times the MACs; a phase then takes its forward pass up to the last exit it
    trains, twice the MACs of what trains, and a forward pass of the validation rows. Blocks that `freeze_until` keeps run
    forward alone. Reading and augmenting data is left out.
    """
    place, costs = pick_device(device), planned.priced.costs
    rate, rows = _measure_rate(planned, place)
    ends = [cost - heads for cost, heads in zip(costs.exits[:-1], _running_sums(costs.heads), strict=True)] + [costs.plain]
    last_kept = planned.recipe.freeze_until
    kept = 0 if last_kept is None else costs.blocks[last_kept]
    segments = [max(end, kept) - max(start, kept) for start, end in zip([0, *ends], ends, strict=False)]  # what may train of each
    train, validation = planned.rows["train"], planned.rows["validation"]
    augments = planned.recipe.data.augment.is_random
    seconds = []
    for phase in planned.phases:
        last = max(phase.scored)
        backbone, heads = ends[last - 1], sum(costs.heads[number - 1] for number in range(1, min(last, len(costs.heads)) + 1))
        moves = sum(segments[number - 1] for number in phase.segments) + sum(costs.heads[number - 1] for number in phase.heads)
        reads_once = not phase.segments and not augments and planned.recipe.cache_features > 0
        forward = heads if reads_once else backbone + heads
        check = heads if reads_once else costs.exits[-1]
        seconds.append((train * (forward + 2 * moves) + validation * check) / rate)
    how = f"from one step of {rows} row{'s' * (rows > 1)} timed on {device_name(place)}; reading and augmenting data is left out"
    return TimeEstimate(tuple(seconds), how)


def _running_sums(numbers: Sequence[int]) -> list[int]:
    return [sum(numbers[: count + 1]) for count in range(len(numbers))]


def _measure_rate(planned: Plan, device: torch.device) -> tuple[float, int]:
    """Return MACs a second of a training step, and the rows of the step that was timed, after one that was not."""
    spec, total = planned.priced.spec, 3 * planned.priced.costs.exits[-1]
    rows = max(1, min(planned.recipe.batch_size, int(STEP_MACS / total)))
    model = planned.model.to(device)
    execution = make_execution(planned.recipe, model.backbone, device)
    if execution.channels_last:
        model.to(memory_format=torch.channels_last)
    model.eval()  # one row has no statistics for BatchNorm
    inputs = execution.laid_out(model.backbone.example(spec.input_shape).expand(rows, *spec.input_shape).contiguous())
    seconds = 0.0
    set_up = settings(execution.precision, device, deterministic=execution.deterministic, training=True)
    with torch.random.fork_rng(devices=[]), set_up:
        for _ in range(2):
            settle(device)
            started = time.perf_counter()
            with execution.autocast():
                outputs = model(inputs)
            loss = torch.stack([output.logits.float().square().mean() for output in outputs]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            settle(device)
            seconds = time.perf_counter() - started
    return total * rows / seconds, rows


def flops(source: str | Path, *, changes: Sequence[str] = (), data_root: str | Path | None = None) -> Priced:
    """Count what each exit costs, in multiply-adds (MACs) of one row, heads passed on the way included: `eectl flops`.

    Args:
        source: a checkpoint, the name of a shipped recipe, or a recipe's path.
        changes: changes of the recipe, such as `"exits.after=[2, 4]"`.
        data_root: where the recipe's data lies; default: where the recipe says.

    Raises:
        EectlError: a source that is neither, or changes of a checkpoint.

    Example:
        >>> priced = flops("digits", changes=["exits.after=[1]"])
        >>> priced.spec.after
        (1,)
    """
    name = str(source)
    if changes and not is_recipe(name):
        raise EectlError(f"{name}: --set changes a recipe, and this is a checkpoint; name a recipe, or leave out --set")
    if is_recipe(name):
        more = [] if data_root is None else [f"data.root='{data_root}'"]
        recipe = read_recipe(name, changes=[*changes, *more])
        recipe, _ = with_preprocessing(recipe)
        network, _ = _planned_network(recipe, data_info(recipe.data))
        if not network.model.after:
            network = with_exits(network, resolve(recipe, network).exits, seed=recipe.seed)
        return _price(network.model, network.spec)
    loaded = load_checkpoint(Path(name))
    return _price(loaded.model, loaded.about.spec)


def _price(model: MultiExitModel, spec: ModelSpec) -> Priced:
    with torch.random.fork_rng(devices=[]):
        return Priced(spec, measure_costs(model, spec.input_shape))
