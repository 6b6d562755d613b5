"""What one batch does to a phase: the plain step, and that of learned weighting. Nothing here waits for the device.

Every random draw is a function of (seed, phase, step). Which batches come, and what happens between them, is `loop`'s.
"""

import torch
from torch import Tensor, nn

from eectl.core.seeds import derive_seed
from eectl.data import Batch
from eectl.models.losses import distil, with_auxiliary
from eectl.models.multi_exit import Reads
from eectl.training.optim import learning_rate
from eectl.training.phase import Job, LossSet, PhaseRun


def step(job: Job, run: PhaseRun, batch: Batch) -> None:
    """One step of the optimizer on the weighted sum of the exits' losses, and what else the recipe minimises."""
    wanted, inputs, targets = _prepare(job, run, batch)
    with job.autocast():
        outputs = run.runner(inputs, wanted.exits, equilibrium=run.weighting == "equilibrium")
    logits = [outputs[k - 1].logits for k in wanted.exits]
    apart = [job.task.loss(each, targets, job.recipe.label_smoothing) for each in logits]
    if run.tracker is not None and run.tracker.due(run.step, wanted.exits):
        run.tracker.measure(apart, wanted.weights, wanted.exits, wanted.index)
    losses = torch.stack(apart)
    objective = with_auxiliary(run.model.auxiliary, (losses * wanted.weights).sum(), outputs)
    lesson = job.recipe.distillation
    if lesson.teacher != "none":
        objective = objective + lesson.weight * distil(
            logits, teacher=lesson.teacher, temperature=lesson.temperature, task=job.task
        )
    rows = len(batch.rows)
    global_rows = min(run.batch_size, len(job.data.splits["train"]))
    # DDP averages over processes whose row counts differ by one: this makes it the mean over rows
    _update(run, objective * (rows * job.world.size / global_rows))
    _note(run, wanted, losses.detach(), rows)


def learned_step(job: Job, run: PhaseRun, batch: Batch) -> None:
    """Two steps of the optimizer, each on one half of the batch with weights learned on the other, as in L2W's source.

    The loss is the mean over rows and exits of weight · loss (the source's is K times that: the sum over exits). Weights are
    learned every `interval` steps, for both halves; their learning rate follows the schedule, as in the source.
    """
    learned = run.learned
    assert learned is not None
    wanted, inputs, targets = _prepare(job, run, batch)
    for group in learned.optimizer.param_groups:
        group["lr"] = learned.settings.lr * rate(job, run, run.step) / run.optimizer_settings.lr
    assert isinstance(inputs, Tensor)  # no features are kept under learned weighting
    first, second = zip(inputs.chunk(2), targets.chunk(2), strict=True)
    smoothing = job.recipe.label_smoothing
    for own, other in ((first, second), (second, first)):
        if run.step % learned.settings.interval == 0:
            learned.learn(
                run.model,
                run.optimizer,
                wanted.exits,
                train=own,
                meta=other,
                task=job.task,
                label_smoothing=smoothing,
                autocast=job.autocast,
            )
        with job.autocast():
            outputs = run.runner(own[0], wanted.exits)
        losses = torch.stack([job.task.losses(outputs[k - 1].logits, own[1], smoothing) for k in wanted.exits], dim=1)
        with torch.no_grad():
            weights = learned.weights(losses)
        _update(run, with_auxiliary(run.model.auxiliary, (weights * losses).mean(), outputs))
        _note(run, wanted, losses.detach().mean(dim=0), len(own[0]))


def _prepare(job: Job, run: PhaseRun, batch: Batch) -> tuple[LossSet, Tensor | Reads, Tensor]:
    """Seeds the step, sets its learning rate, augments: the exits of its loss, inputs (or what exits read) and targets."""
    torch.manual_seed(derive_seed(job.recipe.seed, run.phase.number, run.step, job.world.rank))
    for group in run.optimizer.param_groups:
        group["lr"] = rate(job, run, run.step)
    wanted = run.loss_sets[run.step % len(run.loss_sets)]
    if run.cached:
        return wanted, run.cached["train"].take(batch.inputs), batch.targets
    inputs, targets = job.augmenter.train(batch.inputs, batch.targets)
    return wanted, job.laid_out(run.model, inputs), targets


def _update(run: PhaseRun, objective: Tensor) -> None:
    """One step of the optimizer down the gradient of `objective`."""
    objective.backward()  # type: ignore[no-untyped-call]
    if run.optimizer_settings.clip_norm is not None:
        nn.utils.clip_grad_norm_((p for p in run.model.parameters() if p.grad is not None), run.optimizer_settings.clip_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _note(run: PhaseRun, wanted: LossSet, losses: Tensor, rows: int) -> None:
    """Add the exits' mean losses over `rows` rows to the epoch's sums, and note where one is not finite."""
    run.sums[0].index_add_(0, wanted.index, (losses * rows).to(run.sums.dtype))
    run.sums[1].index_add_(0, wanted.index, torch.full_like(losses, rows, dtype=run.sums.dtype))
    seen = run.first_bad[wanted.index]
    run.first_bad.index_copy_(0, wanted.index, torch.where(torch.isfinite(losses), seen, seen.clamp(max=run.step)))


def rate(job: Job, run: PhaseRun, step_number: int) -> float:
    """The learning rate of a step of this phase."""
    return learning_rate(
        step_number,
        base=run.optimizer_settings.lr,
        schedule=job.recipe.schedule,
        steps_per_epoch=run.steps_per_epoch,
        epochs=run.epochs,
    )
