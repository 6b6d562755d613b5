"""The one training loop: one phase of any regime, from its first step or a resumed one to its restored best weights.

Every random draw is a function of (seed, phase, step), so a resumed run needs no generator state to be the run that was
never stopped. What a phase consists of is fixed before; what comes before and after it is `train`'s.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eectl.core.distributed import World, share_buffers, total
from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import Batch
from eectl.models.losses import Task
from eectl.models.multi_exit import MultiExitModel
from eectl.training.feed import Feed, TrainingData
from eectl.training.gradient_dominance import Tracker, why_untracked
from eectl.training.objective import LossSet
from eectl.training.phase import EpochSums, PhaseProgress, PhaseSettings, restore_state, resume_state, start_progress, wide
from eectl.training.run_folder import RunFolder, State
from eectl.training.running import Execution, RunningNetwork, start_network
from eectl.training.step import Losses, learned_step, plain_step

LOOK_EVERY = 50  # steps between looks at the device: is the loss finite, and what is it
SAVE_EVERY = 60.0  # seconds between saves within an epoch


@dataclass(frozen=True)
class Journal:
    """A run's ways out and in while it trains: what it writes, and the signals it hears.

    `run_values` say where the run stands and go into every resume state; `signals` are the numbers of the signals that came.
    """

    folder: RunFolder
    display: Display
    run_values: Mapping[str, Any]
    signals: Sequence[int] = ()


@dataclass(frozen=True)
class Tracking:
    """That gradient dominance is measured: on every `every`-th batch; None: as often as a tenth of the time allows."""

    every: int | None = None


class NotFiniteError(Exception):
    """A loss was not finite at `step` in `exit`. Where an evaluation came before, the network has its best weights again.

    Whoever runs the phase says so to the user, with the checkpoint to go back to.
    """

    def __init__(self, phase: int, step: int, exit: int, *, restored: bool) -> None:
        super().__init__(f"phase {phase}, step {step}: the loss of exit {exit} is not finite")
        self.restored = restored


def run_phase(
    model: MultiExitModel,
    settings: PhaseSettings,
    data: TrainingData,
    *,
    execution: Execution,
    world: World,
    journal: Journal,
    tracking: Tracking | None = None,
    resumed: State | None = None,
) -> dict[str, Any]:
    """Train one phase; `model` ends with the weights of the last evaluation at which any exit improved (paper §4.1).

    Returns:
        What the phase did, for the checkpoint's history.

    Raises:
        NotFiniteError: a loss that is not finite.
        EectlError: no evaluation gave a finite value.
        Interrupted: a signal came; the state is saved.
    """
    net, progress, sums = begin_phase(
        model, settings, execution=execution, world=world, tracking=tracking, display=journal.display
    )
    if resumed is not None:
        restore_state(resumed, model, progress, sums, world)
    started = time.monotonic()
    feed = make_feed(net.model, settings, data, execution=execution, world=world, display=journal.display)
    progress.seconds += time.monotonic() - started
    number, task = settings.phase.number, settings.objective.task
    journal.display.start_phase(
        number,
        settings.phase.title,
        epochs=settings.epochs,
        steps=settings.steps_per_epoch,
        done=progress.step,
        score_name=task.score_name,
        seconds=progress.seconds,
    )
    while progress.epoch < settings.epochs and not progress.stopper.should_stop:
        started = time.monotonic()
        train_epoch(net, settings, feed, progress, sums, world=world, journal=journal)
        _check_finite(net, settings, progress, sums)
        share_buffers(model)
        validation = validate(net, feed, task, batch_size=settings.eval_batch_size, world=world)
        improved = progress.end_epoch(model, settings, validation)
        progress.seconds += time.monotonic() - started
        row = _row(settings, progress, sums.take(), validation, improved)
        if world.is_main:
            journal.folder.log(row)
            journal.display.epoch(row, since_improvement=progress.stopper.since_improvement)
        _save_or_stop(net, settings, progress, sums, world=world, journal=journal, due=journal.folder.due())
    if not progress.best_epoch:
        raise EectlError(f"phase {number}: no evaluation gave a finite {settings.metric}; try a lower optimizer.lr")
    model.load_state_dict(progress.best)
    return _entry(settings, progress, execution, world)


def begin_phase(
    model: MultiExitModel,
    settings: PhaseSettings,
    *,
    execution: Execution,
    world: World,
    tracking: Tracking | None,
    display: Display,
) -> tuple[RunningNetwork, PhaseProgress, EpochSums]:
    """Freeze, wrap, and only then make the optimizer: so frozen parts stay out of both."""
    net = start_network(model, settings.phase, execution, world)
    progress = start_progress(model, settings, world.device)
    tracker = None if tracking is None else _make_tracker(model, settings, tracking, device=world.device, display=display)
    return net, progress, EpochSums(model.num_exits, world.device, tracker)


def _make_tracker(
    model: MultiExitModel, settings: PhaseSettings, tracking: Tracking, *, device: torch.device, display: Display
) -> Tracker | None:
    """Return what measures gradient dominance, None in a phase that has none; says which, and why."""
    number = settings.phase.number
    reason = why_untracked(model, settings.phase, settings.objective.weighting)
    if reason is not None:
        display.say(f"phase {number}: gradient dominance is not tracked: {reason}")
        return None
    tracker = Tracker(model, settings.phase, every=tracking.every, device=device)
    display.say(f"phase {number}: gradient dominance is tracked on 1 of {tracker.every} batches")
    return tracker


def make_feed(
    model: MultiExitModel, settings: PhaseSettings, data: TrainingData, *, execution: Execution, world: World, display: Display
) -> Feed:
    """Return the phase's batches; those of a frozen backbone that always gives the same are computed here, where they fit."""
    feed, place = Feed(data, execution), f"phase {settings.phase.number}: the frozen backbone runs"
    if not settings.cache_bytes:
        return feed
    if settings.objective.learned:
        display.say(f"{place} at every step: l2w takes its batches as they are")
        return feed
    feed, amount = feed.keeping_reads(model, limit=settings.cache_bytes, batch_size=settings.eval_batch_size, world=world)
    display.say(f"{place} {'once' if feed.cached else 'at every step'}: what heads read of {amount}")
    return feed


def train_epoch(
    net: RunningNetwork,
    settings: PhaseSettings,
    feed: Feed,
    progress: PhaseProgress,
    sums: EpochSums,
    *,
    world: World,
    journal: Journal,
) -> None:
    """Run the rest of an epoch, from batch `progress.batch` on."""
    phase = settings.phase
    net.model.train_parts(phase.segments, phase.heads, combine=phase.combine)
    loss_sets = settings.objective.loss_sets(phase, progress.epoch, device=world.device)
    batches = feed.training(
        batch_size=settings.batch_size,
        seed=derive_seed(settings.seed, "order", phase.number),
        epoch=progress.epoch,
        start=progress.batch,
        world=world,
    )
    for batch in batches:
        wanted = loss_sets[progress.step % len(loss_sets)]
        for losses, rows in _step(net, settings, feed, progress, sums, wanted, batch, world=world):
            sums.add(wanted.index, losses, rows, step=progress.step)
        progress.batch += 1
        journal.display.step()
        if progress.step % LOOK_EVERY == 0:
            _check_finite(net, settings, progress, sums)
        due = time.monotonic() - journal.folder.saved_at > SAVE_EVERY and journal.folder.due()
        _save_or_stop(net, settings, progress, sums, world=world, journal=journal, due=due)


def _step(
    net: RunningNetwork,
    settings: PhaseSettings,
    feed: Feed,
    progress: PhaseProgress,
    sums: EpochSums,
    wanted: LossSet,
    batch: Batch,
    *,
    world: World,
) -> Losses:
    """Seed a step, set its learning rate, and take it: with learned weights where the phase has them."""
    number = progress.step
    torch.manual_seed(derive_seed(settings.seed, settings.phase.number, number, world.rank))
    rate = settings.learning_rate(number)
    _set_rate(progress.optimizer, rate)
    inputs, targets = feed.inputs_and_targets(batch)
    clip_norm = settings.optimizer.clip_norm
    if progress.learned is None:
        tracker = sums.tracker if sums.tracker and sums.tracker.due(number, wanted.exits) else None
        scale = len(batch.rows) * world.size / settings.rows_per_step
        return plain_step(
            net,
            progress.optimizer,
            settings.objective,
            wanted,
            inputs,
            targets,
            scale=scale,
            clip_norm=clip_norm,
            tracker=tracker,
        )
    assert isinstance(inputs, Tensor)  # no features are kept under learned weighting
    learned = progress.learned
    _set_rate(learned.optimizer, learned.settings.lr * rate / settings.optimizer.lr)  # follows the schedule, as in the source
    learns = number % learned.settings.interval == 0
    return learned_step(
        net, progress.optimizer, settings.objective, wanted, inputs, targets, learned=learned, learns=learns, clip_norm=clip_norm
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _save_or_stop(
    net: RunningNetwork,
    settings: PhaseSettings,
    progress: PhaseProgress,
    sums: EpochSums,
    *,
    world: World,
    journal: Journal,
    due: bool,
) -> None:
    """Save the state where process 0 finds it due; where a signal came to any process, save and raise Interrupted."""
    wish = max([int(due and world.is_main), *journal.signals])
    if world.size > 1:
        wish = int(total(torch.tensor(wish), op="max"))  # between CPUs: no process waits for its device
    if not wish:
        return
    _check_finite(net, settings, progress, sums)
    sums.gather(world)
    if world.is_main:
        journal.folder.save_state(resume_state(net.model, progress, sums, journal.run_values))
    if wish > 1:
        raise Interrupted(wish, hint="; the state is saved, the same command with --resume goes on")


def _check_finite(net: RunningNetwork, settings: PhaseSettings, progress: PhaseProgress, sums: EpochSums) -> None:
    """Raise NotFiniteError where a loss was not, with the best weights in the network again if there are any."""
    found = sums.first_not_finite()
    if found is None:
        return
    if progress.best_epoch:
        net.model.load_state_dict(progress.best)
    raise NotFiniteError(settings.phase.number, *found, restored=bool(progress.best_epoch))


def validate(net: RunningNetwork, feed: Feed, task: Task, *, batch_size: int, world: World) -> dict[str, list[float]]:
    """Return every exit's mean loss and score on the validation split, in eval mode, over all processes.

    Returns:
        {"loss": [exit], "score": [exit]}.
    """
    model = net.model
    model.eval()
    sums = torch.zeros(2, model.num_exits, dtype=wide(world.device), device=world.device)
    with torch.no_grad():
        for inputs, targets in feed.validation(batch_size=batch_size, world=world):
            with net.execution.autocast():
                outputs = model(inputs)
            for number, output in enumerate(outputs):
                loss = task.loss(output.logits, targets, 0.0) * len(targets)
                sums[:, number] += torch.stack([loss, task.points(output.logits, targets).sum()])
    means = total(sums).cpu().double() / len(feed.data.validation)
    return {"loss": means[0].tolist(), "score": means[1].tolist()}


def _row(
    settings: PhaseSettings,
    progress: PhaseProgress,
    trained: Mapping[str, Any],
    validation: Mapping[str, list[float]],
    improved: bool,
) -> dict[str, Any]:
    """Return an epoch's row of metrics.jsonl; `lr` is the last step's, exits that no step trained have a train_loss of null."""
    more = {key: value for key, value in trained.items() if key != "train_loss"}
    return {
        "phase": settings.phase.number,
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": settings.learning_rate(progress.step - 1),
        "train_loss": trained["train_loss"],
        "validation_loss": validation["loss"],
        "validation_score": validation["score"],
        "improved": improved,
        "seconds": round(progress.seconds, 3),
        **more,
    }


def _entry(settings: PhaseSettings, progress: PhaseProgress, execution: Execution, world: World) -> dict[str, Any]:
    phase = settings.phase
    return {
        "phase": phase.number,
        "title": phase.title,
        "exits": sorted(phase.scored),
        "heads": sorted(phase.heads),
        "epochs": progress.epoch,
        "restored_epoch": progress.best_epoch,
        "steps": progress.step,
        "stopped_by": "patience" if progress.stopper.should_stop else "epochs",
        "best": {str(number): value for number, value in progress.stopper.best.items()},
        "metric": settings.metric,
        "loss_weights": settings.objective.weighting,
        "validation": dict(progress.best_validation),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "precision": execution.precision,
        "deterministic": execution.deterministic,
        "processes": world.size,
        "device": execution.device.type,
        "seconds": round(progress.seconds, 1),
    }
