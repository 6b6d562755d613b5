"""A phase under way: what it consists of, and how it is saved and taken up again. The steps and the loop are not here."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eectl.core.distributed import World, total
from eectl.core.progress import Display
from eectl.data import Augmenter, Dataset
from eectl.models.heads import ExitOutput
from eectl.models.losses import Task
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import OptimizerSection, Recipe
from eectl.recipe.regimes import Phase
from eectl.training.feature_cache import CachedSplit
from eectl.training.gradient_dominance import Tracker
from eectl.training.l2w import LearnedWeights
from eectl.training.optim import EarlyStopper
from eectl.training.run_folder import RunFolder, State, optimizer_tensors, restore_optimizer, under_prefix, with_prefix


@dataclass
class Job:
    """What all phases of a run share. `caught` holds the signals that came.

    `track`: whether gradient dominance is measured on the way, every `track_every`-th batch (none: as it can be afforded).
    """

    recipe: Recipe
    world: World
    folder: RunFolder
    data: Dataset
    augmenter: Augmenter
    display: Display
    task: Task
    caught: list[int] = field(default_factory=list)
    track: bool = False
    track_every: int | None = None

    @property
    def precision(self) -> str:
        """float32 or bf16, `auto` resolved for the device."""
        if self.recipe.precision != "auto":
            return self.recipe.precision
        return "bf16" if self.world.device.type == "cuda" else "float32"

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def channels_last(self, model: MultiExitModel) -> bool:
        """Whether the network and its inputs lie in memory channels last, `auto` resolved for the network."""
        wish = self.recipe.channels_last
        return model.backbone.prefers_channels_last if wish == "auto" else wish

    def laid_out(self, model: MultiExitModel, inputs: Tensor) -> Tensor:
        """The inputs in the memory layout that the network has."""
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last(model) else inputs


@dataclass(frozen=True)
class Place:
    """Where a phase stands in its run: `values` go into every resume state, `start` names what it began from, and
    `keep(model)` writes the last good weights to a checkpoint when the phase fails."""

    values: Mapping[str, Any]
    start: str
    keep: Callable[[], Path]


@dataclass(frozen=True)
class LossSet:
    """The exits (numbers from 1) of one loss, their indices and weights on the device."""

    exits: list[int]
    index: Tensor
    weights: Tensor


@dataclass
class PhaseRun:
    """A phase under way: what a resume state must hold, and what is rebuilt around it."""

    phase: Phase
    optimizer_settings: OptimizerSection
    epochs: int
    batch_size: int
    model: MultiExitModel
    runner: Callable[..., list[ExitOutput]]
    optimizer: torch.optim.Optimizer
    stopper: EarlyStopper
    place: Place
    steps_per_epoch: int
    sums: Tensor  # [2, exit]: Σ loss · rows and Σ rows of this epoch, in this process
    first_bad: Tensor  # [exit]: the first step whose loss is not finite
    best: dict[str, Tensor]
    weighting: str | tuple[float, ...] = "uniform"
    shares: tuple[float, ...] = ()  # what `sdn-ramp` reads: each attached exit's share of the backbone's cost
    learned: LearnedWeights | None = None
    tracker: Tracker | None = None
    cached: Mapping[str, CachedSplit] = field(default_factory=dict)  # by split, where the heads alone run; else empty
    loss_sets: list[LossSet] = field(default_factory=list)  # of this epoch
    best_validation: Mapping[str, list[float]] = field(default_factory=dict)
    best_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps of this phase that are done."""
        return self.epoch * self.steps_per_epoch + self.batch


def gather_sums(job: Job, run: PhaseRun) -> None:
    """Process 0 takes everybody's sums, the others start from none: so the state that is saved is whole."""
    for sums in (run.sums, *([run.tracker.sums] if run.tracker else [])):
        whole = total(sums)
        sums.copy_(whole if job.world.is_main else torch.zeros_like(whole))


def save_state(job: Job, run: PhaseRun) -> None:
    """Write where this phase stands, in one step."""
    tensors = with_prefix("model", run.model.state_dict()) | with_prefix("best", run.best)
    tensors |= with_prefix("optimizer", optimizer_tensors(run.optimizer)) | {"sums": run.sums}
    if run.tracker:
        tensors["dominance"] = run.tracker.sums
    if run.learned:
        tensors |= with_prefix("l2w", run.learned.network.state_dict())
        tensors |= with_prefix("l2w-optimizer", optimizer_tensors(run.learned.optimizer))
    values = dict(run.place.values) | {
        "fresh": False,
        "epoch": run.epoch,
        "batch": run.batch,
        "best_epoch": run.best_epoch,
        "best_validation": dict(run.best_validation),
        "stopper": run.stopper.state(),
        "seconds": run.seconds,
    }
    job.folder.save_state(State(tensors, values))


def restore_state(job: Job, run: PhaseRun, state: State) -> None:
    """Take up where the phase stood when `save_state` wrote `state`."""
    device = run.sums.device
    run.model.load_state_dict(under_prefix("model", state.tensors))
    run.best = {name: tensor.to(device) for name, tensor in under_prefix("best", state.tensors).items()}
    restore_optimizer(run.optimizer, under_prefix("optimizer", state.tensors))
    if run.learned:
        run.learned.network.load_state_dict(under_prefix("l2w", state.tensors))
        restore_optimizer(run.learned.optimizer, under_prefix("l2w-optimizer", state.tensors))
    run.stopper.restore(state.values["stopper"])
    if job.world.is_main:
        run.sums.copy_(state.tensors["sums"])
        if run.tracker and "dominance" in state.tensors:  # else the epoch's first part was not tracked
            run.tracker.sums.copy_(state.tensors["dominance"])
    run.epoch, run.batch = state.values["epoch"], state.values["batch"]
    run.best_epoch, run.best_validation = state.values["best_epoch"], state.values["best_validation"]
    run.seconds = state.values["seconds"]
