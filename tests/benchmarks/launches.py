"""What does a training step launch? Operations, copies and waits by part of a step, of an evaluation's batch and of early exit.

Counted, not timed, so it needs no GPU: with --device cpu the device is torch's `meta`, which computes nothing, and eectl takes
the paths that it takes on a GPU (in float32: there, bf16 adds a cast of most weights and activations). The optimizer is counted
on the CPU, as torch has no fused one for `meta`, and so is early exit, whose rows really leave. With --device cuda all of it is
counted on the GPU.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from counting import KINDS, Tally, as_on_a_gpu
from early_exit import rig
from measuring import begin, options, report
from synthetic import Clock, dataset, images, network, recipe_for
from torch import Tensor, nn

from eectl.core.distributed import World
from eectl.data import Batch, data_info, eval_batches
from eectl.data.augment import Augmenter
from eectl.evaluation.predictions import predict_rows
from eectl.exits.criteria import criterion_named
from eectl.exits.router import Router
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import Recipe
from eectl.training.feed import Feed, training_data, window_length
from eectl.training.loop import Journal, begin_phase, make_feed, train_epoch
from eectl.training.network import planned_phases
from eectl.training.optim import make_optimizer
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution

RECIPES = ("cifar100-vit-t", "tinyimagenet-resnet50")
PARTS = ("augment", "forward", "losses", "backward", "optimizer", "sums")  # the last: of an epoch's losses
ROUTED = 32  # rows of the batch that early exit takes: on a CPU they are computed


class Steps(Clock):
    """Counts the steps after the first ones, which make what all later ones use; each begins with its batch."""

    def __init__(self, tally: Tally, skipped: int) -> None:
        super().__init__(self._after_step)
        self._tally, self._skipped = tally, skipped

    def _after_step(self, done: int) -> None:
        self._tally.part = "augment"
        if done == self._skipped:
            self._tally.counts.clear()


def watch_parts(tally: Tally, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tell `tally` which part of a step runs: before, within and after the network, and from the optimizer on.

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


def training_step(recipe: Recipe, device: torch.device, steps: int, skipped: int = 1) -> Tally:
    """What `steps` steps of a recipe's own loop ask of the device."""
    data = dataset(recipe, {"train": (steps + skipped) * recipe.batch_size, "validation": 1}, device)
    model, recipe = network(recipe, data.info)
    aside = _optimizer_on_cpu(model, recipe, steps) if device.type == "meta" else None
    rows, world = training_data(data), World(0, 1, device)
    (phase,) = planned_phases(recipe)
    settings = phase_settings(recipe, phase, model, rows, num_processes=1)
    execution = make_execution(recipe, model.backbone, device)
    tally = Tally(device.type)
    clock = Steps(tally, skipped)
    journal = Journal(RunFolder.__new__(RunFolder), clock, {})
    journal.folder.saved_at = float("inf")
    running = begin_phase(model, settings, execution=execution, world=world, tracking=None, display=clock)
    watch_parts(tally, model, running.progress.optimizer)
    if aside is not None:
        running.progress.optimizer.step = lambda: setattr(tally, "part", "sums")
    feed = replace(make_feed(model, settings, rows, execution=execution, world=world, display=clock), window=1)
    tally.part = "augment"
    with tally, as_on_a_gpu(device):
        train_epoch(running, feed, journal=journal)
    if aside is not None:
        tally.counts.update(aside.counts)
    return tally


def augmented_window(recipe: Recipe, device: torch.device, *, quick: bool) -> tuple[Tally, int]:
    """What the images of a window of steps ask of the device, after a window that makes what all use; and its steps."""
    window = 2 if quick else window_length(data_info(recipe.data).input_shape, recipe.batch_size, device)
    data = dataset(recipe, {"train": 2 * window * recipe.batch_size, "validation": 1}, device)
    execution = make_execution(recipe, network(recipe, data.info)[0].backbone, device)
    feed, tally = Feed(training_data(data), execution, window=window), Tally(device.type)
    steps = feed.training(
        batch_size=recipe.batch_size, seed=0, epoch=0, start=0, world=World(0, 1, device), step_seed=lambda number: number
    )
    tally.part = "augment"
    with as_on_a_gpu(device):
        for _ in range(window):
            next(steps)
        with tally:
            next(steps)
    return tally, window


def _optimizer_on_cpu(model: MultiExitModel, recipe: Recipe, steps: int) -> Tally:
    """What the optimizer launches in `steps` steps, counted on the CPU."""
    parameters = [nn.Parameter(torch.zeros_like(parameter)) for parameter in model.parameters()]
    optimizer = make_optimizer(parameters, recipe.optimizer)
    tally = Tally("cpu")
    tally.part = "optimizer"
    for step in range(steps + 1):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if step:  # the first makes the moments
            with tally:
                optimizer.step()
        else:
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
    """What one batch asks of the device whose rows leave evenly over the exits."""
    data = dataset(recipe, {"test": 1}, torch.device("cpu"))
    model = network(recipe, data.info)[0].eval().to(device)
    inputs = (images(data.info, rows).float() / 255).to(device)
    if model.backbone.prefers_channels_last:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    router, tally = Router(model, rig(model, inputs)), Tally(device.type)
    router(inputs)
    tally.part = "batch"
    with tally:
        router(inputs)
    return tally


def measure(name: str, chosen, device: torch.device) -> dict:
    recipe = recipe_for(name, *(chosen.set or ()), quick=chosen.quick)
    on, steps = (torch.device("meta") if device.type == "cpu" else device), 2 if chosen.quick else chosen.steps
    step = training_step(recipe, on, steps)
    evaluated = evaluation_batches(recipe, on, steps)
    rows = 8 if chosen.quick else ROUTED
    left = early_exit_batch(recipe, device, rows)
    window, length = augmented_window(recipe, on, quick=chosen.quick)
    training = step.table(PARTS, per=steps) | window.table(("augment",), per=length)
    found = {
        "batch_size": recipe.batch_size,
        "steps augmented at once": length,
        "training step": training | {"whole": {kind: sum(part[kind] for part in training.values()) for kind in KINDS}},
        "evaluation": {
            "batch_size": recipe.eval_batch_size,
            "batch": evaluated.table(("pass", "end"), per=steps)["pass"],
            "end of the pass": evaluated.table(("pass", "end"))["end"],
        },
        "early exit": {"batch_size": rows, "exits": len(recipe.exits.after or ()) + 1, "batch": left.table(("batch",))["batch"]},
    }
    if chosen.operations:
        for key, tally in (("training step", step), ("evaluation", evaluated), ("early exit", left)):
            found[key]["operations"] = {f"{part}: {kind}: {each}": count for part, kind, each, count in tally.operations()}
    return found


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=1,
        recipes={"nargs": "*", "default": RECIPES, "help": "shipped recipes of images"},
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipes"},
        steps={"type": int, "default": 4, "help": "steps (and evaluated batches) that the mean is of (default 4)"},
        operations={"action": "store_true", "help": "name every operation, summed over the steps"},
    )  # fmt: skip
    device, _ = begin(chosen)
    return report("launches", chosen, {name: measure(name, chosen, device) for name in chosen.recipes})


if __name__ == "__main__":
    main()
