"""The one training loop: one phase of any regime, from its first step or a resumed one to its restored best weights.

Every random draw is a function of (seed, phase, step), so a resumed run needs no generator state to be the run that was
never stopped. What trains is the Phase's business, what came before and after is `train`'s.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.distributed import share_buffers, total
from eectl.core.errors import EectlError, Interrupted
from eectl.core.seeds import derive_seed
from eectl.data import Split, eval_batches, num_batches, train_batches
from eectl.exits.costs import measure_costs
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel, Reads
from eectl.recipe.recipe import phase_change
from eectl.recipe.regimes import Phase
from eectl.recipe.weighting import exit_weights
from eectl.training.feature_cache import CachedSplit, cache_splits
from eectl.training.gradient_dominance import Tracker, why_untracked
from eectl.training.l2w import LearnedWeights
from eectl.training.optim import EarlyStopper, make_optimizer
from eectl.training.phase import Job, LossSet, PhaseRun, Place, gather_sums, restore_state, save_state
from eectl.training.run_folder import State
from eectl.training.step import learned_step, rate, step

NEVER = 2**62
LOOK_EVERY = 50  # steps between looks at the device: is the loss finite, and what is it
SAVE_EVERY = 60.0  # seconds between saves within an epoch


def run_phase(job: Job, model: MultiExitModel, phase: Phase, *, place: Place, resumed: State | None = None) -> dict[str, Any]:
    """Train one phase; `model` ends with the weights of the last evaluation at which any exit improved (paper §4.1).

    Returns the entry for the checkpoint's history. Raises EectlError for a loss that is not finite, Interrupted after a signal.
    """
    run = _begin(job, model, phase, place)
    if resumed is not None:
        restore_state(job, run, resumed)
    started = time.monotonic()
    run.cached = _cached(job, run)
    run.seconds += time.monotonic() - started
    job.display.start_phase(phase.number, phase.title, epochs=run.epochs, steps=run.steps_per_epoch, done=run.step)
    while run.epoch < run.epochs and not run.stopper.should_stop:
        started = time.monotonic()
        _train_epoch(job, run)
        _check_finite(job, run)
        share_buffers(model)
        validation = validate(job, model, job.data.splits["validation"], run.cached.get("validation"))
        values = validation[job.recipe.metric]
        improved = run.stopper.update({number: values[number - 1] for number in sorted(phase.scored)})
        run.epoch, run.batch = run.epoch + 1, 0
        if improved:
            run.best, run.best_validation, run.best_epoch = _snapshot(model), validation, run.epoch
        run.seconds += time.monotonic() - started
        sums = total(run.sums)
        run.sums.zero_()
        tracked = {"gradient_dominance": run.tracker.take()} if run.tracker else {}
        if job.world.is_main:
            row = _row(run, rate(job, run, run.step - 1), sums.cpu(), validation, improved) | tracked
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
    own = phase_change(recipe, phase).model_dump(exclude_none=True)
    settings = recipe.optimizer.model_copy(update={key: own[key] for key in ("lr", "weight_decay") if key in own})
    batch_size = own.get("batch_size", recipe.batch_size)
    if batch_size < job.world.size:
        raise EectlError(f"batch_size {batch_size} is over all processes and must be at least their number, {job.world.size}")
    model.to(device)
    if job.channels_last(model):
        model.to(memory_format=torch.channels_last)
    model.set_trainable(phase.segments, phase.heads, combine=phase.combine)
    model.checkpoint_activations(recipe.checkpoint_activations)
    patience = own.get("patience", recipe.patience)
    weighting = job.recipe.loss_weights if model.num_exits > 1 else "uniform"  # no exits are attached yet
    weighting = model.default_weights if weighting == "auto" else weighting
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
        steps_per_epoch=num_batches(job.data.splits["train"], batch_size),
        sums=torch.zeros(2, model.num_exits, dtype=_wide(device), device=device),
        first_bad=torch.full((model.num_exits,), NEVER, device=device),
        best=_snapshot(model),
        weighting=weighting,
        shares=measure_costs(model, job.data.info.input_shape).backbone_shares if weighting == "sdn-ramp" else (),
        learned=_learned(job, phase, model.num_exits) if weighting == "l2w" else None,
        tracker=_tracker(job, model, phase, weighting) if job.track else None,
    )


def _learned(job: Job, phase: Phase, num_exits: int) -> LearnedWeights | None:
    """Fresh learned weights, drawn from the seed, for a phase with exits to weigh."""
    if phase.scored == {num_exits}:
        return None
    torch.manual_seed(derive_seed(job.recipe.seed, "l2w", phase.number))
    return LearnedWeights(len(phase.scored), job.recipe.l2w, device=job.world.device)


def _tracker(job: Job, model: MultiExitModel, phase: Phase, weighting: str | tuple[float, ...]) -> Tracker | None:
    """What measures gradient dominance in a phase that has any; says what will be measured, or why nothing is."""
    reason = why_untracked(model, phase, weighting)
    if reason is not None:
        job.display.say(f"phase {phase.number}: gradient dominance is not tracked: {reason}")
        return None
    tracker = Tracker(model, phase, every=job.track_every, device=job.world.device)
    job.display.say(f"phase {phase.number}: gradient dominance is tracked on 1 of {tracker.every} batches")
    return tracker


def _cached(job: Job, run: PhaseRun) -> dict[str, CachedSplit]:
    """What the exits read of training and validation rows, where nothing in the phase changes it and it is small enough."""
    recipe, model, place = job.recipe, run.model, f"phase {run.phase.number}: the frozen backbone runs"
    if run.phase.segments or recipe.data.augment.is_random or not recipe.cache_features:
        return {}
    if run.learned:
        job.display.say(f"{place} at every step: l2w takes its batches as they are")
        return {}

    def read(inputs: Tensor) -> Reads:
        with torch.no_grad(), job.autocast():
            return model.reads(job.laid_out(model, job.augmenter.eval(inputs)))

    splits = {name: job.data.splits[name] for name in ("train", "validation")}
    cached, amount = cache_splits(
        model, splits, read, limit=recipe.cache_features, batch_size=recipe.eval_batch_size, world=job.world
    )
    job.display.say(f"{place} {'once' if cached else 'at every step'}: what heads read of {amount}")
    return cached


def _loss_sets(job: Job, run: PhaseRun) -> list[LossSet]:
    """The exits of each loss and their weights: a function of the epoch, constant within it."""
    device = job.world.device
    sets = []
    for exits in map(sorted, run.phase.losses):
        weights = exit_weights(
            run.weighting,
            num_exits=run.model.num_exits,
            taking_part=exits,
            slope=job.recipe.weight_slope,
            shares=run.shares,
            progress=(run.epoch + 1) / (job.recipe.ramp_epochs or run.epochs),
        )
        sets.append(LossSet(exits, torch.tensor(exits, device=device) - 1, torch.tensor(weights, device=device)))
    return sets


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
    run.model.train_parts(run.phase.segments, run.phase.heads, combine=run.phase.combine)
    run.loss_sets = _loss_sets(job, run)
    take_step = learned_step if run.learned else step
    seed = derive_seed(job.recipe.seed, "order", run.phase.number)
    batches = train_batches(
        run.cached["train"].split if run.cached else job.data.splits["train"],
        batch_size=run.batch_size,
        seed=seed,
        epoch=run.epoch,
        start=run.batch,
        rank=job.world.rank,
        world=job.world.size,
    )
    for batch in batches:
        take_step(job, run, batch)
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
    gather_sums(job, run)
    if job.world.is_main:
        save_state(job, run)
    if wish > 1:
        raise Interrupted(wish, hint="; the state is saved, the same command with --resume goes on")


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


def validate(job: Job, model: MultiExitModel, split: Split, cached: CachedSplit | None = None) -> dict[str, list[float]]:
    """Every exit's mean loss and score on a split, in eval mode, over all processes: {"loss": [exit], "score": [exit]}.

    `cached` is the split with what the exits read, where that is kept.
    """
    split = cached.split if cached else split
    model.eval()
    sums = torch.zeros(2, model.num_exits, dtype=_wide(job.world.device), device=job.world.device)
    with torch.no_grad():
        for batch in eval_batches(split, batch_size=job.recipe.eval_batch_size, rank=job.world.rank, world=job.world.size):
            inputs = cached.take(batch.inputs) if cached else job.laid_out(model, job.augmenter.eval(batch.inputs))
            with job.autocast():
                outputs = model(inputs)
            for number, output in enumerate(outputs):
                loss = job.task.loss(output.logits, batch.targets, 0.0) * len(batch.targets)
                sums[:, number] += torch.stack([loss, job.task.points(output.logits, batch.targets).sum()])
    means = total(sums).cpu().double() / len(split)
    return {"loss": means[0].tolist(), "score": means[1].tolist()}


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


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
        "start": job.recipe.start,
        "exits": sorted(run.phase.scored),
        "heads": sorted(run.phase.heads),
        "epochs": run.epoch,
        "restored_epoch": run.best_epoch,
        "steps": run.step,
        "stopped_by": "patience" if run.stopper.should_stop else "epochs",
        "best": {str(number): value for number, value in run.stopper.best.items()},
        "metric": job.recipe.metric,
        "loss_weights": run.weighting,
        "validation": dict(run.best_validation),
        "seed": job.recipe.seed,
        "batch_size": run.batch_size,
        "precision": job.precision,
        "processes": job.world.size,
        "device": job.world.device.type,
        "seconds": round(run.seconds, 1),
    }
