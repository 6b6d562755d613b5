"""A learning-rate range test (Smith 2017): steps at rates that grow from tiny to huge, to see where the loss falls fastest.

The network that makes these steps is thrown away; no checkpoint and no run folder is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eectl.core.console import silent
from eectl.core.distributed import joined
from eectl.core.errors import EectlError
from eectl.core.figures import COLOURS, render, title
from eectl.core.files import as_path, check_outputs, write_all
from eectl.core.hub import local_path
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import load_data
from eectl.recipe.recipe import Recipe
from eectl.training.conditions import explained, set_up
from eectl.training.feed import Feed, training_data
from eectl.training.find_recipe import find_recipe
from eectl.training.loop import RunningPhase, begin_phase, make_feed
from eectl.training.network import first_network, network_for, planned_phases, resolve
from eectl.training.phase import PhaseSettings, phase_settings
from eectl.training.running import make_execution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST, MOST = 1e-7, 10.0  # the first and the last rate
SMOOTHING = 0.9  # how much of the loss's moving average stays at each step
DIVERGED = 4.0  # times the least smoothed loss: there the ramp ends
LEFT_OUT = 0.1  # of the steps, the first, in which the average has seen too little to have a slope
FLAT = 1e-6  # a fall in a step, as a share of the first loss, that is rounding
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class RateTest:
    """A learning-rate range test of one phase; all lists go by step.

    Attributes:
        phase: its number.
        rates: the learning rates.
        losses: the mean loss of the exits that trained, by their weights, before the step was made.
        smoothed: their moving average, corrected for its start.
        suggestion: the rate at which the smoothed loss falls fastest; None where it never falls.
        diverged: whether the ramp ended because the loss did.
        files: what was written.
    """

    phase: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool
    files: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the test as JSON-able data."""
        return {"kind": "rate-test", "schema": 1} | {
            each.name: [str(path) for path in self.files] if each.name == "files" else getattr(self, each.name)
            for each in fields(self)
        }


@dataclass(frozen=True)
class _Ramp(PhaseSettings):
    """A phase's settings with a learning rate that grows by the same factor at each of `num_steps` steps."""

    num_steps: int = 100

    def learning_rate(self, step: int) -> float:
        return ramp_rate(step, self.num_steps)


def ramp_rate(step: int, num_steps: int) -> float:
    """Return the learning rate of step `step`, from 0, of `num_steps`."""
    return float(LEAST * (MOST / LEAST) ** (step / (num_steps - 1)))


def find_lr(
    recipe: Recipe | str | Path | None = None,
    *,
    start: str | Path | None = None,
    phase: int | None = None,
    changes: Sequence[str] = (),
    steps: int = 100,
    out: str | Path | None = None,
    device: str = "auto",
    data_root: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = silent,
) -> RateTest:
    """Find the learning rate for a recipe by a range test: `eectl train --find-lr`.

    Args:
        recipe: a recipe, the name of a shipped one, or a path; default: that of `start`, else `digits`.
        start: a checkpoint to start from.
        phase: the phase that is tried; default: the first that the recipe runs.
        changes: changes of the recipe, such as `"batch_size=64"`.
        steps: how many steps the ramp from 1e-7 to 10 takes.
        out: a folder for lr.csv and lr.png, or a plot by its suffix; default: nothing is written.
        device: auto, cpu, cuda, cuda:N or mps.
        data_root: where the data lies; default: where the recipe says.
        overwrite: replace files that exist.
        quiet: show no progress on stderr.
        say: is called with each line of that progress, whether quiet or not.

    Raises:
        EectlError: what the user can mend.

    Example:
        >>> found = find_lr("digits", steps=50)  # doctest: +SKIP
        >>> found.suggestion  # doctest: +SKIP
        0.0021
    """
    given = {"start": start, "phase": phase, "data_root": data_root and Path(data_root)}
    asked = find_recipe(recipe, changes=changes, given=given).recipe
    if steps < 10:
        raise EectlError(f"{steps} steps are too few to see a slope; take 10 or more")
    paths = _outputs(as_path(out))
    check_outputs(paths, inputs=[None if asked.init is None else local_path(asked.init)], overwrite=overwrite)
    with joined(device, hint="start the test again") as world:
        if world.size > 1:
            raise EectlError("--find-lr runs in one process, with the batch of all; start it without torchrun")
        display = Display(quiet=quiet, say=say)
        data = load_data(asked.data, device=world.device)
        data.copies.check()
        network = first_network(asked, data.info)
        asked = resolve(asked, network)
        with explained(asked, world), set_up(asked, world):
            network, chosen = network_for(planned_phases(asked)[0], network, asked, say=display.say)
            known = training_data(data)
            settings = phase_settings(asked, chosen, network.model, known, num_processes=1)
            own = {each.name: getattr(settings, each.name) for each in fields(PhaseSettings)}
            execution = replace(make_execution(asked, network.model.backbone, world.device), compile=False)
            running = begin_phase(
                network.model, _Ramp(**own, num_steps=steps), execution=execution, world=world, tracking=None, display=display
            )
            feed = make_feed(network.model, settings, known, execution=execution, world=world, display=display)
            with display.counting("learning rates", steps) as tick:
                losses = _until_divergence(_losses(running, feed), steps, tick)
    if not math.isfinite(losses[0]):
        raise EectlError("the loss is not finite before a weight has moved; look at the data, or train with precision=float32")
    test = read_ramp(losses, phase=chosen.number, num_steps=steps)
    test = replace(test, files=tuple(paths))
    if paths:
        name = f"{data.info.name}, {network.spec.backbone.name}, {asked.regime}, phase {chosen.number}"
        _write(test, paths, name=name, overwrite=overwrite)
    return test


def _outputs(out: Path | None) -> list[Path]:
    """Return the files that `out` stands for."""
    if out is None:
        return []
    if out.suffix.lower() in SUFFIXES:
        return [out]
    if out.suffix and not out.is_dir():
        raise EectlError(f"-o {out}: a plot ends in {', '.join(SUFFIXES)}; a name without an ending is a folder")
    return [out / "lr.csv", out / "lr.png"]


def _losses(phase: RunningPhase, feed: Feed) -> Iterator[float]:
    """Take one step after the other, in as many epochs as it takes, and yield the loss that each began with."""
    settings, progress, parts, world = phase.settings, phase.progress, phase.settings.phase, phase.world
    while True:
        phase.net.model.train_parts(parts.segments, parts.heads, combine=parts.combine, freeze_until=settings.freeze_until)
        sets, done = settings.objective.loss_sets(parts, progress.epoch, device=world.device), progress.step
        batches = feed.training(
            batch_size=settings.batch_size,
            seed=derive_seed(settings.seed, "order", parts.number),
            epoch=progress.epoch,
            start=0,
            world=world,
            step_seed=lambda number, done=done: derive_seed(settings.seed, parts.number, done + number, world.rank),  # type: ignore[misc]
        )
        for inputs, targets in batches:
            wanted = sets[progress.step % len(sets)]
            phase.step(wanted, inputs, targets)
            progress.batch += 1
            found = torch.tensor(phase.sums.take()["train_loss"])[wanted.index.cpu()]
            weights = wanted.weights.cpu().to(found.dtype)
            yield float((found * weights).sum() / weights.sum())
        progress.epoch, progress.batch = progress.epoch + 1, 0


def _until_divergence(losses: Iterator[float], num_steps: int, tick: Callable[[], None]) -> list[float]:
    """Return the losses of the ramp, at most `num_steps`, the last of them the first that has diverged if one has."""
    found: list[float] = []
    for loss in losses:
        found.append(loss)
        tick()
        if len(found) == num_steps or has_diverged(smooth(found)):
            break
    return found


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the moving average after each loss, divided by the weight that it has had so far."""
    average, found = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**number))
    return found


def has_diverged(smoothed: Sequence[float]) -> bool:
    """Return whether the last smoothed loss is not finite, or DIVERGED times the least."""
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def read_ramp(losses: Sequence[float], *, phase: int, num_steps: int) -> RateTest:
    """Return what a ramp's losses say; the slope at a step is half the way from the step before to the one after."""
    smoothed, rates = smooth(losses), [ramp_rate(step, num_steps) for step in range(len(losses))]
    diverged = has_diverged(smoothed)
    usable = len(losses) - diverged
    slopes = {
        step: (smoothed[step + 1] - smoothed[step - 1]) / 2 for step in range(max(round(LEFT_OUT * num_steps), 1), usable - 1)
    }
    steepest = min(slopes, key=lambda step: slopes[step], default=None)
    falls = steepest is not None and slopes[steepest] < -FLAT * abs(smoothed[0])
    suggestion = rates[steepest] if steepest is not None and falls else None
    return RateTest(phase, tuple(rates), tuple(losses), tuple(smoothed), suggestion, diverged)


def _write(test: RateTest, paths: Sequence[Path], *, name: str, overwrite: bool) -> None:
    lines = ["rate,loss,smoothed", *(",".join(f"{each:.6g}" for each in row) for row in _rows(test))]
    contents: dict[Path, bytes | str] = {path: "\n".join(lines) + "\n" for path in paths if path.suffix == ".csv"}
    contents |= render([path for path in paths if path.suffix != ".csv"], lambda figure: _draw(figure, test, name))
    write_all(contents, overwrite=overwrite)


def _rows(test: RateTest) -> Iterator[tuple[float, float, float]]:
    return zip(test.rates, test.losses, test.smoothed, strict=True)


def _draw(figure: "Figure", test: RateTest, name: str) -> None:
    axes = figure.subplots()
    finite = [(rate, loss, mean) for rate, loss, mean in _rows(test) if math.isfinite(mean)]
    rates, losses, smoothed = zip(*finite, strict=True)
    axes.plot(rates, losses, ".", color="0.7", ms=4, label="loss of a step")
    axes.plot(rates, smoothed, color=COLOURS[0], lw=1.4, label="moving average")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color=COLOURS[1], lw=1, ls="--", label=f"falls fastest at {test.suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(0.95 * min(smoothed), min(max(smoothed), 2 * smoothed[0]) * 1.05)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)
    title(figure, name, paper=False)
