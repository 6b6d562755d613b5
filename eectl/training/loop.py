"""The one training loop: one phase of any regime, from its first step or a resumed one to its restored best weights.

Every random draw is a function of (seed, phase, step), so a resumed run needs no generator state to be the run that was
never stopped. What a phase consists of is fixed before; what comes before and after it is `train`'s.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eectl.core.distributed import World, share_buffers, total
from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.models.multi_exit import MultiExitModel
from eectl.training.experiment_logs import ExperimentLogs
from eectl.training.feed import Feed, TrainingData
from eectl.training.gradient_dominance import Tracker, why_untracked
from eectl.training.phase import EpochSums, PhaseProgress, PhaseSettings, restore_state, resume_state, start_progress
from eectl.training.resume import SavedState
from eectl.training.run_folder import RunFolder
from eectl.training.running import Execution, RunningNetwork, start_network
from eectl.training.step import Stepper
from eectl.training.validation import Validator

LOOK_EVERY = 50  # steps between looks at the device: is the loss finite, and what is it
SAVE_EVERY = 60.0  # seconds between saves within an epoch


@dataclass(frozen=True)
class Journal:
    """A run's ways out and in while it trains: what it writes, and the signals it hears.

    `run_values` say where the run stands and go into every resume state; `signals` are the numbers of the signals that came.
    `logs` are those of experiment trackers.
    """

    folder: RunFolder
    display: Display
    run_values: Mapping[str, Any]
    signals: Sequence[int] = ()
    logs: ExperimentLogs = field(default_factory=ExperimentLogs)


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
    resumed: SavedState | None = None,
) -> dict[str, Any]:
    """Train one phase; `model` ends with the weights of the last evaluation at which any exit improved (paper §4.1).

    Returns:
        What the phase did, for the checkpoint's history.

    Raises:
        NotFiniteError: a loss that is not finite.
        StateError: `resumed` is not a state of this phase.
        EectlError: no evaluation gave a finite value.
        Interrupted: a signal came; the state is saved.
    """
    phase = begin_phase(model, settings, execution=execution, world=world, tracking=tracking, display=journal.display)
    try:
        return _run(phase, data, journal, resumed)
    finally:
        phase.net.capture.close()


@dataclass(frozen=True)
class RunningPhase:
    """A phase that is under way: its settings, the network and what trains and evaluates it, and how far it has come."""

    settings: PhaseSettings
    net: RunningNetwork
    progress: PhaseProgress
    sums: EpochSums
    step: Stepper
    validate: Validator
    world: World


def begin_phase(
    model: MultiExitModel,
    settings: PhaseSettings,
    *,
    execution: Execution,
    world: World,
    tracking: Tracking | None,
    display: Display,
) -> RunningPhase:
    """Freeze, and only then make the optimizer: so frozen parts stay out of it."""
    plain_because = None
    if settings.objective.learned:
        plain_because = "l2w differentiates its own steps"
    elif tracking is not None:
        plain_because = "tracking gradient dominance takes several backward passes through one forward pass"
    net = start_network(
        model,
        settings.phase,
        execution,
        num_steps=settings.epochs * settings.steps_per_epoch,
        freeze_until=settings.freeze_until,
        plain_because=plain_because,
        say=display.say,
    )
    progress = start_progress(model, settings, world.device)
    tracker = None if tracking is None else _make_tracker(model, settings, tracking, device=world.device, display=display)
    sums = EpochSums(model.num_exits, world.device, tracker)
    step = Stepper(net, settings, progress, sums, world)
    return RunningPhase(settings, net, progress, sums, step, Validator(net, settings, world), world)


def _run(phase: RunningPhase, data: TrainingData, journal: Journal, resumed: SavedState | None) -> dict[str, Any]:
    """Run a phase that has begun to its end; returns what it did."""
    settings, net, progress, sums, world = phase.settings, phase.net, phase.progress, phase.sums, phase.world
    model, number = net.model, settings.phase.number
    if resumed is not None:
        restore_state(resumed, model, settings, progress, sums, world)
    started = time.monotonic()
    feed = make_feed(model, settings, data, execution=net.execution, world=world, display=journal.display)
    progress.seconds += time.monotonic() - started
    journal.display.start_phase(
        number,
        settings.phase.title,
        epochs=settings.epochs,
        steps=settings.steps_per_epoch,
        done=progress.step,
        score_name=settings.objective.task.score_name,
        seconds=progress.seconds,
    )
    while progress.epoch < settings.epochs and not progress.stopper.should_stop:
        started = time.monotonic()
        train_epoch(phase, feed, journal=journal)
        _check_finite(phase)
        share_buffers(model)
        with progress.evaluated():
            if progress.average is not None:
                share_buffers(model)
            validation = phase.validate(feed)
            improved = progress.end_epoch(model, settings, validation)
        progress.seconds += time.monotonic() - started
        row = _row(settings, progress, sums.take(), validation, improved)
        if world.is_main:
            journal.folder.log(row)
            journal.logs.epoch(row)
            journal.display.epoch(row, since_improvement=progress.stopper.since_improvement)
        _save_or_stop(phase, journal=journal, due=journal.folder.due())
    if not progress.best_epoch:
        raise EectlError(f"phase {number}: no evaluation gave a finite {settings.metric}; try a lower optimizer.lr")
    model.load_state_dict(progress.best)
    return _entry(settings, progress, net.execution, world)


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


def train_epoch(phase: RunningPhase, feed: Feed, *, journal: Journal) -> None:
    """Run the rest of an epoch, from batch `progress.batch` on."""
    settings, progress, parts = phase.settings, phase.progress, phase.settings.phase
    phase.net.model.train_parts(parts.segments, parts.heads, combine=parts.combine, freeze_until=settings.freeze_until)
    loss_sets = settings.objective.loss_sets(parts, progress.epoch, device=phase.world.device)
    done = progress.step - progress.batch
    batches = feed.training(
        batch_size=settings.batch_size,
        seed=derive_seed(settings.seed, "order", parts.number),
        epoch=progress.epoch,
        start=progress.batch,
        world=phase.world,
        step_seed=lambda number: derive_seed(settings.seed, parts.number, done + number, phase.world.rank),
    )
    for batch in batches:
        phase.step(loss_sets[progress.step % len(loss_sets)], *batch)
        progress.batch += 1
        journal.display.step()
        if progress.step % LOOK_EVERY == 0:
            _check_finite(phase)
        due = time.monotonic() - journal.folder.saved_at > SAVE_EVERY and journal.folder.due()
        _save_or_stop(phase, journal=journal, due=due)


def _save_or_stop(phase: RunningPhase, *, journal: Journal, due: bool) -> None:
    """Save the state where process 0 finds it due; where a signal came to any process, save and raise Interrupted."""
    world = phase.world
    wish = max([int(due and world.is_main), *journal.signals])
    if world.size > 1:
        wish = int(total(torch.tensor(wish), op="max"))  # between CPUs: no process waits for its device
    if not wish:
        return
    _check_finite(phase)
    phase.sums.gather(world)
    if world.is_main:
        journal.folder.save_state(resume_state(phase.net.model, phase.progress, phase.sums, journal.run_values))
    if wish > 1:
        raise Interrupted(wish, hint="; the state is saved, the same command with --resume goes on")


def _check_finite(phase: RunningPhase) -> None:
    """Raise NotFiniteError where a loss was not, with the best weights in the network again if there are any."""
    found, progress = phase.sums.first_not_finite(), phase.progress
    if found is None:
        return
    if progress.best_epoch:
        phase.net.model.load_state_dict(progress.best)
    raise NotFiniteError(phase.settings.phase.number, *found, restored=bool(progress.best_epoch))


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
        **{f"validation_{name}": values for name, values in validation.items()},
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
