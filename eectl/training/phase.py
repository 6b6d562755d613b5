"""A phase's settings, fixed before its first step, and how far it has come, as a resume file keeps it. No loop is here."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.distributed import World, total
from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import num_batches
from eectl.models.losses import balanced_weights
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.optimizer_section import EmaSection, OptimizerSection, ScheduleSection
from eectl.recipe.recipe import Recipe, phase_change
from eectl.recipe.regimes import Phase
from eectl.training.averaging import WeightAverage
from eectl.training.feed import TrainingData
from eectl.training.gradient_dominance import Tracker
from eectl.training.l2w import LearnedWeights
from eectl.training.objective import Objective, make_objective
from eectl.training.optim import EarlyStopper, learning_rate, make_optimizer
from eectl.training.parameter_groups import parameter_groups
from eectl.training.resume import (
    PhaseValues,
    SavedState,
    State,
    StateError,
    optimizer_tensors,
    restore_optimizer,
    tensors_like,
    with_prefix,
    worst_or,
)

NEVER = 2**62


@dataclass(frozen=True)
class PhaseSettings:
    """A phase's settings: the parts that train, and all that they train with.

    `batch_size` and `rows_per_step` are over all processes; the second is smaller where the split is. The rows of a step pass in
    `accumulate` pieces in each process, or in as many as it has rows. `metric` is what early
    stopping compares, an entry of METRIC_CHOICES; `validation_weights` are what a validation row of each class counts in it, None
    where all count alike. `most_tokens` are those of a text, None for images. `cache_bytes` is the most that may
    be kept of what exits read of a frozen backbone, 0 where that may change from step to step.
    """

    phase: Phase
    objective: Objective
    freeze_until: int | None
    optimizer: OptimizerSection
    schedule: ScheduleSection
    ema: EmaSection
    epochs: int
    patience: int
    metric: str
    validation_weights: tuple[float, ...] | None
    batch_size: int
    accumulate: int
    eval_batch_size: int
    steps_per_epoch: int
    rows_per_step: int
    most_tokens: int | None
    cache_bytes: float
    seed: int

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this phase, counted from 0."""
        return learning_rate(
            step, base=self.optimizer.lr, schedule=self.schedule, steps_per_epoch=self.steps_per_epoch, epochs=self.epochs
        )


def phase_settings(
    recipe: Recipe, phase: Phase, model: MultiExitModel, data: TrainingData, *, num_processes: int
) -> PhaseSettings:
    """Resolve what a recipe says of a phase, its own changes included.

    Raises:
        EectlError: a batch that does not go round the processes.
    """
    own = phase_change(recipe, phase).model_dump(exclude_none=True)
    batch_size, epochs = own.get("batch_size", recipe.batch_size), own.get("epochs", recipe.epochs)
    if batch_size < num_processes:
        raise EectlError(f"batch_size {batch_size} is over all processes and must be at least their number, {num_processes}")
    keeps_reads = not phase.segments and not recipe.data.augment.is_random
    return PhaseSettings(
        phase=phase,
        objective=make_objective(
            recipe, model, phase, task=data.task, epochs=epochs, input_shape=data.input_shape, labels=data.train.labels
        ),
        freeze_until=recipe.freeze_until,
        optimizer=recipe.optimizer.changed(lr=own.get("lr"), weight_decay=own.get("weight_decay")),
        schedule=recipe.schedule,
        ema=recipe.ema,
        epochs=epochs,
        patience=own.get("patience", recipe.patience),
        metric=recipe.metric,
        validation_weights=tuple(balanced_weights(data.validation.labels).tolist()) if recipe.metric == "balanced" else None,
        batch_size=batch_size,
        accumulate=own.get("accumulate", recipe.accumulate),
        eval_batch_size=recipe.eval_batch_size,
        steps_per_epoch=num_batches(data.train, batch_size),
        rows_per_step=min(batch_size, len(data.train)),
        most_tokens=data.input_shape[-1] if recipe.data.is_text else None,
        cache_bytes=recipe.cache_features if keeps_reads else 0.0,
        seed=recipe.seed,
    )


@dataclass
class PhaseProgress:
    """The state of a phase's optimisation: beside the network's weights and the epoch's sums, what a resume file holds.

    `average` is the moving average of the weights, None where there is none: see `evaluated`.
    `best` are the weights of the last evaluation at which an exit improved, `best_validation` its losses and scores, and
    `best_epoch` its epoch, from 1; 0 is none yet. `epoch` counts the epochs that are done, `batch` the steps of the next.
    """

    optimizer: torch.optim.Optimizer
    learned: LearnedWeights | None
    stopper: EarlyStopper
    best: dict[str, Tensor]
    steps_per_epoch: int
    average: WeightAverage | None = None
    best_validation: Mapping[str, list[float]] = field(default_factory=dict)
    best_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """The steps of this phase that are done."""
        return self.epoch * self.steps_per_epoch + self.batch

    def evaluated(self) -> AbstractContextManager[None]:
        """Return the context in which the network has the weights that are evaluated and kept: their average, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def end_epoch(self, model: nn.Module, settings: PhaseSettings, validation: Mapping[str, list[float]]) -> bool:
        """Take an epoch's evaluation; returns whether any exit improved, in which case the weights are kept."""
        values = validation[settings.metric]
        improved = self.stopper.update({number: values[number - 1] for number in sorted(settings.phase.scored)})
        self.epoch, self.batch = self.epoch + 1, 0
        if improved:
            self.best, self.best_validation, self.best_epoch = _snapshot(model), validation, self.epoch
        return improved


def start_progress(model: MultiExitModel, settings: PhaseSettings, device: torch.device) -> PhaseProgress:
    """Return the state before the first step. Learned weights are drawn from the seed."""
    learned = None
    if settings.objective.learned is not None:
        torch.manual_seed(derive_seed(settings.seed, "l2w", settings.phase.number))
        learned = LearnedWeights(len(settings.phase.scored), settings.objective.learned, device=device)
    return PhaseProgress(
        make_optimizer(parameter_groups(model, settings.optimizer), settings.optimizer),
        learned,
        EarlyStopper(settings.patience, settings.metric != "loss" and settings.objective.task.higher_is_better),
        _snapshot(model),
        settings.steps_per_epoch,
        WeightAverage(model, settings.ema) if settings.ema.decay else None,
    )


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class EpochSums:
    """Sums over an epoch in this process, on the device, so that no step waits for it.

    `losses` [2, exit] are Σ loss · rows and Σ rows; `first_bad` [exit] is the first step whose loss is not finite; `tracker`
    keeps the sums of gradient dominance where that is measured.
    """

    def __init__(self, num_exits: int, device: torch.device, tracker: Tracker | None = None) -> None:
        self.losses = torch.zeros(2, num_exits, dtype=wide(device), device=device)
        self.first_bad = torch.full((num_exits,), NEVER, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.tracker = tracker

    def begin_step(self, number: int) -> None:
        """Say which step of the phase, from 0, the next losses are of."""
        self.step.fill_(number)

    def add(self, index: Tensor, losses: Tensor, rows: int) -> None:
        """Add the mean losses over `rows` rows of the exits with these indices from 0, and note those that are not finite.

        All that changes from step to step is in tensors, so that a captured step can do this.
        """
        self.losses[0].index_add_(0, index, (losses * rows).to(self.losses.dtype))
        self.losses[1].index_add_(0, index, torch.full_like(losses, rows, dtype=self.losses.dtype))
        seen = self.first_bad[index]
        self.first_bad.index_copy_(0, index, torch.where(torch.isfinite(losses), seen, seen.minimum(self.step)))

    def take(self) -> dict[str, Any]:
        """Return the epoch's means over all processes, as they go into metrics.jsonl, and start again from 0.

        An exit that no step trained has a loss of NaN.
        """
        sums = total(self.losses).cpu()
        self.losses.zero_()
        found: dict[str, Any] = {"train_loss": (sums[0] / sums[1]).tolist()}
        return found | ({"gradient_dominance": self.tracker.take()} if self.tracker else {})

    def first_not_finite(self) -> tuple[int, int] | None:
        """Return the first step and exit (number from 1) in any process whose loss was not finite, or None."""
        bad = total(self.first_bad, op="min").tolist()
        return None if min(bad) == NEVER else (min(bad), bad.index(min(bad)) + 1)

    def gather(self, world: World) -> None:
        """Give process 0 everybody's sums and the others none, so that what process 0 saves is whole."""
        for sums in self._all():
            whole = total(sums)
            sums.copy_(whole if world.is_main else torch.zeros_like(whole))

    def _all(self) -> list[Tensor]:
        return [self.losses, *([self.tracker.sums] if self.tracker else [])]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resume file keeps."""
        return {"sums": self.losses} | ({"dominance": self.tracker.sums} if self.tracker else {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors()` gave. A run that is resumed with --track had not been tracked: then its part is missing."""
        for name, sums in self.tensors().items():
            if name == "dominance" and name not in tensors:
                continue
            if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (sums.shape, sums.dtype):
                raise StateError(f"{name} is missing, or of another shape than this run's")
            sums.copy_(tensors[name])


def wide(device: torch.device) -> torch.dtype:
    """Return the type that sums are kept in; mps has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def resume_state(model: nn.Module, progress: PhaseProgress, sums: EpochSums, run_values: Mapping[str, Any]) -> State:
    """Return where a phase stands, for the resume file. `run_values` say where its run stands."""
    tensors = with_prefix("model", model.state_dict()) | with_prefix("best", progress.best)
    tensors |= with_prefix("optimizer", optimizer_tensors(progress.optimizer)) | sums.tensors()
    if progress.learned:
        tensors |= with_prefix("l2w", progress.learned.network.state_dict())
        tensors |= with_prefix("l2w-optimizer", optimizer_tensors(progress.learned.optimizer))
    if progress.average:
        tensors |= with_prefix("ema", progress.average.tensors)
    values = {
        "epoch": progress.epoch,
        "batch": progress.batch,
        "best_epoch": progress.best_epoch,
        "best_validation": dict(progress.best_validation),
        "stopper": progress.stopper.state(),
        "seconds": progress.seconds,
    }
    return State(tensors, run_values, values)


def restore_state(
    state: SavedState, model: MultiExitModel, settings: PhaseSettings, progress: PhaseProgress, sums: EpochSums, world: World
) -> None:
    """Take up where the phase stood when `resume_state` gave `state`; the sums, which are everybody's, in process 0.

    Raises StateError for a state that is not one of this phase.
    """
    values, tensors, weights = state.phase, state.tensors, model.state_dict()
    assert values is not None, "a state between two phases has nothing to take up"
    _check_place(values, settings, num_exits=model.num_exits)
    parts = {name.partition(".")[0] for name in tensors}
    known = {"model", "best", "optimizer", "sums", "dominance"} | ({"l2w", "l2w-optimizer"} if progress.learned else set())
    known |= {"ema"} if progress.average else set()
    if parts - known:
        raise StateError(f"{min(parts - known)} is not part of this run")
    best = tensors_like("best", tensors, weights)
    model.load_state_dict(tensors_like("model", tensors, weights))
    progress.best = {name: tensor.to(world.device) for name, tensor in best.items()}
    restore_optimizer(progress.optimizer, "optimizer", tensors)
    if progress.learned:
        network = progress.learned.network
        network.load_state_dict(tensors_like("l2w", tensors, network.state_dict()))
        restore_optimizer(progress.learned.optimizer, "l2w-optimizer", tensors)
    if progress.average:
        progress.average.restore(tensors_like("ema", tensors, progress.average.tensors))
    higher = progress.stopper.higher_is_better
    bests = {number: worst_or(value, higher_is_better=higher) for number, value in values.stopper.best.items()}
    progress.stopper.restore({"best": bests, "since": values.stopper.since})
    if world.is_main:
        sums.restore(tensors)
    progress.epoch, progress.batch, progress.seconds = values.epoch, values.batch, values.seconds
    progress.best_epoch = values.best_epoch
    progress.best_validation = {
        name: [math.nan if value is None else value for value in found] for name, found in values.best_validation.items()
    }


def _check_place(values: PhaseValues, settings: PhaseSettings, *, num_exits: int) -> None:
    """Raise StateError for an epoch, a step or an exit that the phase does not have."""
    stopper, exits = values.stopper, {str(number) for number in settings.phase.scored}
    most = settings.steps_per_epoch if values.epoch < settings.epochs else 0
    place = f"phase {settings.phase.number} of {settings.epochs} epochs with {settings.steps_per_epoch} steps"
    if values.epoch > settings.epochs or values.batch > most:
        raise StateError(f"says epoch {values.epoch} and step {values.batch}, of {place}")
    if max(values.best_epoch, stopper.since) > values.epoch or not set(stopper.best) <= exits:
        raise StateError(f"says what no {values.epoch} epochs of {place} and its exits can give")
    lengths = {name: len(found) for name, found in values.best_validation.items()}
    measured = ("loss", "score") if settings.validation_weights is None else ("loss", "score", "balanced")
    if lengths != (dict.fromkeys(measured, num_exits) if values.best_epoch else {}):
        raise StateError(f"has a validation of {lengths or 'no'} exits, and the network has {num_exits}")
