"""What does a training step launch? Operations, copies and waits by part of a step, of an evaluation's batch and of early exit.

Counted, not timed, so it needs no GPU: with --device cpu the device is torch's `meta`, which computes nothing, and eectl takes
the paths that it takes on a GPU (in float32: there, bf16 adds a cast of most weights and activations). The optimizer is counted
on the CPU, as torch has no fused one for `meta`, and so is early exit, whose rows really leave. With --device cuda all of it is
counted on the GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from counting import KINDS, Tally, as_on_a_gpu
from early_exit import rig
from measuring import begin, options, report
from synthetic import Steps, dataset, images, network, recipe_for
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from eectl.core.capture import Capture
from eectl.core.distributed import World
from eectl.data import Batch, eval_batches
from eectl.data.augment import Augmenter
from eectl.evaluation.predictions import predict_rows
from eectl.exits.criteria import criterion_named
from eectl.exits.router import Router
from eectl.exits.static_router import Direct, StaticRouter
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import Recipe
from eectl.training.feed import training_data, window_length
from eectl.training.loop import Journal, begin_phase, make_feed, train_epoch
from eectl.training.network import planned_phases
from eectl.training.optim import ParameterGroup, make_optimizer, set_rate
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import Execution, make_execution

RECIPES = ("cifar100-vit-t", "tinyimagenet-resnet50")
PARTS = ("augment", "forward", "losses", "backward", "optimizer", "sums")  # the last: and the learning rate
ROUTERS = ("exact sizes", "programs", "programs by the host, recorded")
ROUTED = 32  # rows of the batch that early exit takes: on a CPU they are computed


@dataclass(frozen=True)
class Recorded(Execution):
    """An execution whose steps are recorded and not compiled, whatever the recipe says."""

    def accelerated(self, num_steps: int) -> tuple[bool, bool]:
        return False, True


class Counts:
    """Stands in for what records on a device: a recording's work counts while it is made, and then each replay as one launch."""

    def __init__(self, tally: Tally) -> None:
        self.num_bytes = 0
        self._tally = tally

    def rehearse(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return lambda: self._replay(function), function()

    def _replay(self, function: Callable[[], Any]) -> None:
        self._tally.add("launches", "replay")
        if not self._tally.is_meta:  # the values are needed
            with _disable_current_modes():
                function()


class Post:
    """Brings counts to the host: each time a copy that nobody waits for."""

    lags = False

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def send(self, counts: Tensor) -> Any:
        self._tally.add("to_host", "counts")
        with _disable_current_modes():
            return Direct().send(counts)


def watch_parts(tally: Tally, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tell `tally` which part of a step runs: within and after the network, and from the optimizer on.

    The backward pass knows itself. What clipping launches counts with the losses.
    """

    def start(part: str):
        def hook(*_: object) -> None:
            tally.part = part

        return hook

    model.register_forward_pre_hook(start("forward"))
    model.register_forward_hook(start("losses"))
    optimizer.register_step_pre_hook(start("optimizer"))
    optimizer.register_step_post_hook(start("sums"))


def training_step(
    recipe: Recipe, device: torch.device, steps: int, *, recorded: bool, window: int | None = None
) -> tuple[Tally, int]:
    """What a recipe's own loop asks of the device, in at least so many steps and in whole windows, which it returns too.

    As many steps come first and are not counted: they make what all later ones use.
    """
    info = dataset(recipe, {}, device).info
    window = window or window_length(info.input_shape, recipe.batch_size, device)
    steps = -(-steps // window) * window
    data = dataset(recipe, {"train": 2 * max(steps, 8) * recipe.batch_size, "validation": 1}, device)
    model, recipe = network(recipe, data.info)
    aside = _optimizer_on_cpu(model, recipe, steps) if device.type == "meta" else None
    rows, world = training_data(data), World(0, 1, device)
    (phase,) = planned_phases(recipe)
    settings = phase_settings(recipe, phase, model, rows, num_processes=1)
    tally, clock = Tally(device.type), Steps()
    execution = make_execution(recipe, model.backbone, device)
    if recorded:
        known = {each.name: getattr(execution, each.name) for each in fields(execution)}
        execution = Recorded(**known | {"make_recorder": lambda _: Counts(tally)})
    journal = Journal(RunFolder.__new__(RunFolder), clock, {})
    journal.folder.saved_at = float("inf")
    running = begin_phase(model, settings, execution=execution, world=world, tracking=None, display=clock)
    watch_parts(tally, model, running.progress.optimizer)
    if aside is not None:
        running.progress.optimizer.step = lambda: setattr(tally, "part", "sums")

    def step(*inputs: Any) -> None:
        tally.part = "sums"
        running.step(*inputs)
        tally.part = "augment"
        if running.progress.step + 1 == settings.steps_per_epoch - steps:
            tally.counts.clear()

    feed = make_feed(model, settings, rows, execution=execution, world=world, display=clock)
    feed, tally.part = replace(feed, window=window), "augment"
    never = patch("eectl.training.loop.LOOK_EVERY", 2**62)  # that look lies between steps, and meta has nothing to see
    with tally, as_on_a_gpu(device), never:
        train_epoch(replace(running, step=step), feed, journal=journal)
    if aside is not None:
        tally.counts.update({key: n for key, n in aside.counts.items() if not recorded or key[0] == "sums"})
    return tally, steps


def _optimizer_on_cpu(model: MultiExitModel, recipe: Recipe, steps: int) -> Tally:
    """What the optimizer and its learning rate launch in `steps` steps, counted on the CPU."""
    parameters = [nn.Parameter(torch.zeros_like(parameter)) for parameter in model.parameters()]
    optimizer = make_optimizer([ParameterGroup(parameters, recipe.optimizer.decay.value)], recipe.optimizer)
    tally = Tally("cpu")
    tally.part = "optimizer"
    for step in range(steps + 1):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with tally if step else nullcontext():  # the first makes the moments
            tally.part = "sums"
            set_rate(optimizer, 0.1)
            tally.part = "optimizer"
            optimizer.step()
    return tally


def evaluation_batches(recipe: Recipe, device: torch.device, batches: int) -> Tally:
    """What the pass of `evaluate` over so many batches asks of the device; the copy of its table at the end is `end`."""
    size = recipe.eval_batch_size
    data = dataset(recipe, {"test": (batches + 1) * size}, device)
    model, recipe = network(recipe, data.info)
    layout = torch.channels_last if model.backbone.lies_channels_last(recipe.channels_last) else torch.preserve_format
    model = model.eval().to(device, memory_format=layout)
    augmenter, tally = Augmenter(data.info, data.augment, len(data.info.classes)), Tally(device.type)

    def watched() -> Iterator[Batch]:
        for number, batch in enumerate(eval_batches(data.splits["test"], batch_size=size)):
            if number == 1:  # the first makes the table
                tally.counts.clear()
            tally.part = "pass"
            yield batch
        tally.part = "end"

    def prepare(inputs: Tensor) -> Tensor:
        return augmenter.eval(inputs).contiguous(memory_format=layout)

    with tally, as_on_a_gpu(device):
        predict_rows(model, watched(), num_rows=(batches + 1) * size, criterion=criterion_named("max-softmax"), prepare=prepare)
    return tally


@torch.inference_mode()
def early_exit_batch(recipe: Recipe, device: torch.device, rows: int) -> Tally:
    """What one batch asks of the device whose rows leave evenly over the exits.

    By exact sizes, as on a CPU; by the programs of fixed shape that a GPU records; and by the host alone, once those are.
    """
    data = dataset(recipe, {"test": 1}, torch.device("cpu"))
    model = network(recipe, data.info)[0].eval().to(device)
    inputs = (images(data.info, rows).float() / 255).to(device)
    if model.backbone.prefers_channels_last:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    policy, tally = rig(model, inputs), Tally(device.type)
    capture = Capture(Counts(tally), plain_calls=2)
    exact, programs = Router(model, policy), StaticRouter(model, policy, capture=capture, courier=Post(tally))
    turns = dict.fromkeys(("exact sizes", "programs", "recording", "programs by the host, recorded"), programs) | {
        "exact sizes": exact
    }
    for router in (exact, programs):
        router(inputs)
    with tally:
        for tally.part, router in turns.items():
            router(inputs)
    return tally


def measure(name: str, chosen, device: torch.device) -> dict:
    recipe = recipe_for(name, *(chosen.set or ()), quick=chosen.quick)
    on, steps = (torch.device("meta") if device.type == "cpu" else device), 2 if chosen.quick else chosen.steps
    window = 2 if chosen.quick else None
    step, num_steps = training_step(recipe, on, steps, recorded=False, window=window)
    replayed, _ = training_step(recipe, on, steps, recorded=True, window=window)
    evaluated = evaluation_batches(recipe, on, steps)
    rows = 8 if chosen.quick else ROUTED
    left = early_exit_batch(recipe, device, rows)
    training, host = step.table(PARTS, per=num_steps), replayed.table(PARTS, per=num_steps)
    again = {"augment": host.pop("augment"), "rest": _sum(host)}
    found = {
        "batch_size": recipe.batch_size,
        "steps": num_steps,
        "training step": training | {"whole": _sum(training)},
        "training step by the host, recorded": again | {"whole": _sum(again)},
        "evaluation": {
            "batch_size": recipe.eval_batch_size,
            "batch": evaluated.table(("pass", "end"), per=steps)["pass"],
            "end of the pass": evaluated.table(("pass", "end"))["end"],
        },
        "early exit": {"batch_size": rows, "exits": len(recipe.exits.after or ()) + 1, **left.table(ROUTERS)},
    }
    if chosen.operations:
        tallies = {"training step": step, "training step by the host, recorded": replayed, "evaluation": evaluated}
        for key, tally in (tallies | {"early exit": left}).items():
            found[key]["operations"] = {f"{part}: {kind}: {each}": count for part, kind, each, count in tally.operations()}
    return found


def _sum(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {kind: sum(part[kind] for part in parts.values()) for kind in KINDS}


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=1,
        recipes={"nargs": "*", "default": RECIPES, "help": "shipped recipes of images"},
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipes"},
        steps={"type": int, "default": 4, "help": "steps, in whole windows, and evaluated batches (default 4)"},
        operations={"action": "store_true", "help": "name every operation, summed over the steps"},
    )  # fmt: skip
    device, _ = begin(chosen)
    return report("launches", chosen, {name: measure(name, chosen, device) for name in chosen.recipes})


if __name__ == "__main__":
    main()
