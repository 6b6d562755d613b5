"""The one training loop: one phase of any regime, from its first step or a resumed one to its restored best weights.

Every random draw is a function of (seed, phase, step), so a resumed run needs no generator state to be the run that was
never stopped. What trains is the Phase's business, what came before and after is `train`'s.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eectl.data import Augmenter, Batch, Dataset, Split, eval_batches, num_batches, train_batches
from eectl.display import Display
from eectl.distributed import World, share_buffers, total
from eectl.errors import EectlError, Interrupted
from eectl.losses import Task, exit_weights
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel
from eectl.optim import EarlyStopper, learning_rate, make_optimizer
from eectl.recipe import Optimizer, Recipe
from eectl.regimes import Phase
from eectl.run_folder import RunFolder, State, optimizer_tensors, restore_optimizer, under_prefix, with_prefix
from eectl.seeds import derive_seed

NEVER = 2**62
LOOK_EVERY = 50  # steps between looks at the device: is the loss finite, and what is it
SAVE_EVERY = 60.0  # seconds between saves within an epoch


@dataclass
class Job:
    """What all phases of a run share. `caught` holds the signals that came."""

    recipe: Recipe
    world: World
    folder: RunFolder
    data: Dataset
    augmenter: Augmenter
    display: Display
    task: Task
    caught: list[int] = field(default_factory=list)

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
    optimizer_settings: Optimizer
    epochs: int
    batch_size: int
    model: MultiExitModel
    runner: Callable[..., list[ExitOutput]]
    optimizer: torch.optim.Optimizer
    stopper: EarlyStopper
    place: Place
    loss_sets: list[LossSet]
    steps_per_epoch: int
    sums: Tensor  # [2, exit]: Σ loss · rows and Σ rows of this epoch, in this process
    first_bad: Tensor  # [exit]: the first step whose loss is not finite
    best: dict[str, Tensor]
    best_validation: Mapping[str, list[float]] = field(default_factory=dict)
    best_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps of this phase that are done."""
        return self.epoch * self.steps_per_epoch + self.batch


def run_phase(job: Job, model: MultiExitModel, phase: Phase, *, place: Place, resumed: State | None = None) -> dict[str, Any]:
    """Train one phase; `model` ends with the weights of the last evaluation at which any exit improved (paper §4.1).

    Returns the entry for the checkpoint's history. Raises EectlError for a loss that is not finite, Interrupted after a signal.
    """
    run = _begin(job, model, phase, place)
    if resumed is not None:
        _restore(job, run, resumed)
    job.display.start_phase(phase.number, phase.title, epochs=run.epochs, steps=run.steps_per_epoch, done=run.step)
    while run.epoch < run.epochs and not run.stopper.should_stop:
        started = time.monotonic()
        _train_epoch(job, run)
        _check_finite(job, run)
        share_buffers(model)
        validation = validate(job, model, job.data.splits["validation"])
        values = validation[job.recipe.metric]
        improved = run.stopper.update({number: values[number - 1] for number in sorted(phase.scored)})
        run.epoch, run.batch = run.epoch + 1, 0
        if improved:
            run.best, run.best_validation, run.best_epoch = _snapshot(model), validation, run.epoch
        run.seconds += time.monotonic() - started
        sums = total(run.sums)
        run.sums.zero_()
        if job.world.is_main:
            row = _row(run, _rate(job, run, run.step - 1), sums.cpu(), validation, improved)
            job.folder.log(row)
            job.display.epoch(row, since_improvement=run.stopper.since_improvement)
        _save_or_stop(job, run, due=job.folder.due())
    if not run.best_epoch:
        raise EectlError(f"phase {phase.number}: no evaluation gave a finite {job.recipe.metric}; try a lower optimizer.lr")
    model.load_state_dict(run.best)
    return _entry(job, run)


def _begin(job: Job, model: MultiExitModel, phase: Phase, place: Place) -> PhaseRun:
    """Freeze, then optimizer and wrapping: the order that keeps frozen parts out of both."""
    recipe, device = job.recipe, job.world.device
    change = recipe.phases.get(phase.number)
    own = change.model_dump(exclude_none=True) if change else {}
    settings = recipe.optimizer.model_copy(update={key: own[key] for key in ("lr", "weight_decay") if key in own})
    batch_size = own.get("batch_size", recipe.batch_size)
    if batch_size < job.world.size:
        raise EectlError(f"batch_size {batch_size} is over all processes and must be at least their number, {job.world.size}")
    model.to(device)
    if job.channels_last(model):
        model.to(memory_format=torch.channels_last)
    model.set_trainable(phase.segments, phase.heads)
    patience = own.get("patience", recipe.patience)
    better = job.task.higher_is_better if recipe.metric == "score" else False
    return PhaseRun(
        phase=phase,
        optimizer_settings=settings,
        epochs=own.get("epochs", recipe.epochs),
        batch_size=batch_size,
        model=model,
        runner=_wrap(job, model, phase),
        optimizer=make_optimizer((p for p in model.parameters() if p.requires_grad), settings),
        stopper=EarlyStopper(patience, better),
        place=place,
        loss_sets=[_loss_set(job, sorted(exits), model.num_exits) for exits in phase.losses],
        steps_per_epoch=num_batches(job.data.splits["train"], batch_size),
        sums=torch.zeros(2, model.num_exits, dtype=_wide(device), device=device),
        first_bad=torch.full((model.num_exits,), NEVER, device=device),
        best=_snapshot(model),
    )


def _loss_set(job: Job, exits: list[int], num_exits: int) -> LossSet:
    own = job.recipe.loss_weights if num_exits > 1 else "uniform"  # no exits are attached yet
    weights = exit_weights(own, num_exits=num_exits, taking_part=exits)
    device = job.world.device
    return LossSet(exits, torch.tensor(exits, device=device) - 1, torch.tensor(weights, device=device))


def _wide(device: torch.device) -> torch.dtype:
    """What sums are kept in; mps has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _wrap(job: Job, model: MultiExitModel, phase: Phase) -> Callable[..., list[ExitOutput]]:
    """The network as steps run it: in DDP where there are several processes, compiled where that is asked for."""
    runner: nn.Module = model
    if job.world.size > 1:
        devices = [job.world.device] if job.world.device.type == "cuda" else None
        unused = len(phase.losses) > 1 or model.backbone.blocks_serve_later_exits
        runner = nn.parallel.DistributedDataParallel(runner, devices, find_unused_parameters=unused)
    return torch.compile(runner) if job.recipe.compile else runner


def _train_epoch(job: Job, run: PhaseRun) -> None:
    """The rest of an epoch from batch `run.batch` on."""
    run.model.train_parts(run.phase.segments, run.phase.heads)
    seed = derive_seed(job.recipe.seed, "order", run.phase.number)
    batches = train_batches(
        job.data.splits["train"],
        batch_size=run.batch_size,
        seed=seed,
        epoch=run.epoch,
        start=run.batch,
        rank=job.world.rank,
        world=job.world.size,
    )
    for batch in batches:
        step(job, run, batch)
        run.batch += 1
        job.display.step()
        if run.step % LOOK_EVERY == 0:
            _check_finite(job, run)
        _save_or_stop(job, run, due=time.monotonic() - job.folder.saved_at > SAVE_EVERY and job.folder.due())


def _save_or_stop(job: Job, run: PhaseRun, *, due: bool) -> None:
    """Save the state where process 0 finds it due; where a signal came to any process, save and raise Interrupted."""
    wish = max([int(due and job.world.is_main), *job.caught])
    if job.world.size > 1:
        wish = int(total(torch.tensor(wish), op="max"))  # between CPUs: no process waits for its device
    if not wish:
        return
    _check_finite(job, run)
    _gather_sums(job, run)
    if job.world.is_main:
        save_state(job, run)
    if wish > 1:
        raise Interrupted(wish, hint="; the state is saved, the same command with --resume goes on")


def step(job: Job, run: PhaseRun, batch: Batch) -> None:
    """One step of the optimizer. Nothing here waits for the device."""
    torch.manual_seed(derive_seed(job.recipe.seed, run.phase.number, run.step, job.world.rank))
    wanted = run.loss_sets[run.step % len(run.loss_sets)]
    inputs, targets = job.augmenter.train(batch.inputs, batch.targets)
    if job.channels_last(run.model):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    for group in run.optimizer.param_groups:
        group["lr"] = _rate(job, run, run.step)
    with job.autocast():
        outputs = run.runner(inputs, wanted.exits)
    losses = torch.stack([job.task.loss(outputs[k - 1].logits, targets, job.recipe.label_smoothing) for k in wanted.exits])
    rows = len(batch.rows)
    global_rows = min(run.batch_size, len(job.data.splits["train"]))
    # DDP averages over processes whose row counts differ by one: this makes it the mean over rows
    ((losses * wanted.weights).sum() * (rows * job.world.size / global_rows)).backward()  # type: ignore[no-untyped-call]
    if run.optimizer_settings.clip_norm is not None:
        nn.utils.clip_grad_norm_((p for p in run.model.parameters() if p.grad is not None), run.optimizer_settings.clip_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    losses = losses.detach()
    run.sums[0].index_add_(0, wanted.index, (losses * rows).to(run.sums.dtype))
    run.sums[1].index_add_(0, wanted.index, torch.full_like(losses, rows, dtype=run.sums.dtype))
    seen = run.first_bad[wanted.index]
    run.first_bad.index_copy_(0, wanted.index, torch.where(torch.isfinite(losses), seen, seen.clamp(max=run.step)))


def _rate(job: Job, run: PhaseRun, step_number: int) -> float:
    return learning_rate(
        step_number,
        base=run.optimizer_settings.lr,
        schedule=job.recipe.schedule,
        steps_per_epoch=run.steps_per_epoch,
        epochs=run.epochs,
    )


def _check_finite(job: Job, run: PhaseRun) -> None:
    """Raise EectlError where a loss was not finite, with the weights of the last evaluation kept as a checkpoint."""
    bad = total(run.first_bad, op="min").tolist()
    step_number = min(bad)
    if step_number == NEVER:
        return
    kept = ""
    if run.best_epoch and job.world.is_main:
        run.model.load_state_dict(run.best)
        kept = str(run.place.keep())
    raise EectlError(
        f"phase {run.phase.number}, step {step_number}: the loss of exit {bad.index(step_number) + 1} is not finite; "
        f"the last good checkpoint is {kept or run.place.start}; train again with a lower optimizer.lr or "
        "--set optimizer.clip_norm=1, and --overwrite or another -o"
    )


def validate(job: Job, model: MultiExitModel, split: Split) -> dict[str, list[float]]:
    """Every exit's mean loss and score on a split, in eval mode, over all processes: {"loss": [exit], "score": [exit]}."""
    model.eval()
    sums = torch.zeros(2, model.num_exits, dtype=_wide(job.world.device), device=job.world.device)
    with torch.no_grad():
        for batch in eval_batches(split, batch_size=job.recipe.eval_batch_size, rank=job.world.rank, world=job.world.size):
            inputs = job.augmenter.eval(batch.inputs)
            if job.channels_last(model):
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with job.autocast():
                outputs = model(inputs)
            for number, output in enumerate(outputs):
                loss = job.task.loss(output.logits, batch.targets, 0.0) * len(batch.targets)
                sums[:, number] += torch.stack([loss, job.task.points(output.logits, batch.targets).sum()])
    means = total(sums).cpu().double() / len(split)
    return {"loss": means[0].tolist(), "score": means[1].tolist()}


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _gather_sums(job: Job, run: PhaseRun) -> None:
    """Process 0 takes everybody's sums, the others start from none: so the state that is saved is whole."""
    whole = total(run.sums)
    run.sums.copy_(whole if job.world.is_main else torch.zeros_like(whole))


def save_state(job: Job, run: PhaseRun) -> None:
    """Write where this phase stands, in one step."""
    tensors = with_prefix("model", run.model.state_dict()) | with_prefix("best", run.best)
    tensors |= with_prefix("optimizer", optimizer_tensors(run.optimizer)) | {"sums": run.sums}
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


def _restore(job: Job, run: PhaseRun, state: State) -> None:
    device = run.sums.device
    run.model.load_state_dict(under_prefix("model", state.tensors))
    run.best = {name: tensor.to(device) for name, tensor in under_prefix("best", state.tensors).items()}
    restore_optimizer(run.optimizer, under_prefix("optimizer", state.tensors))
    run.stopper.restore(state.values["stopper"])
    if job.world.is_main:
        run.sums.copy_(state.tensors["sums"])
    run.epoch, run.batch = state.values["epoch"], state.values["batch"]
    run.best_epoch, run.best_validation = state.values["best_epoch"], state.values["best_validation"]
    run.seconds = state.values["seconds"]


def _row(run: PhaseRun, rate: float, sums: Tensor, validation: Mapping[str, list[float]], improved: bool) -> dict[str, Any]:
    """One row of metrics.jsonl; `lr` is the last step's, exits that no step trained have a train_loss of null."""
    train_loss = (sums[0] / sums[1]).tolist()
    return {
        "phase": run.phase.number,
        "epoch": run.epoch,
        "step": run.step,
        "lr": rate,
        "train_loss": train_loss,
        "validation_loss": validation["loss"],
        "validation_score": validation["score"],
        "improved": improved,
        "seconds": round(run.seconds, 3),
    }


def _entry(job: Job, run: PhaseRun) -> dict[str, Any]:
    return {
        "phase": run.phase.number,
        "title": run.phase.title,
        "regime": job.recipe.regime,
        "exits": sorted(run.phase.scored),
        "heads": sorted(run.phase.heads),
        "epochs": run.epoch,
        "restored_epoch": run.best_epoch,
        "steps": run.step,
        "stopped_by": "patience" if run.stopper.should_stop else "epochs",
        "best": {str(number): value for number, value in run.stopper.best.items()},
        "metric": job.recipe.metric,
        "validation": dict(run.best_validation),
        "seed": job.recipe.seed,
        "batch_size": run.batch_size,
        "precision": job.precision,
        "processes": job.world.size,
        "device": job.world.device.type,
        "seconds": round(run.seconds, 1),
    }
