"""One training step: the plain one, and that of learned weighting. Nothing here waits for the device.

Which batches come, their learning rate and what happens between them is `loop`'s. Both steps return [(losses [exit], rows)]: the
mean losses, without a gradient, of the exits that took part over `rows` rows, once for each step of the optimizer.
"""

import torch
from torch import Tensor, nn

from eectl.models.losses import distil, with_auxiliary
from eectl.models.multi_exit import Reads
from eectl.training.gradient_dominance import Tracker
from eectl.training.l2w import LearnedWeights
from eectl.training.objective import LossSet, Objective
from eectl.training.running import RunningNetwork

Losses = list[tuple[Tensor, int]]


def plain_step(
    net: RunningNetwork,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    wanted: LossSet,
    inputs: Tensor | Reads,
    targets: Tensor,
    *,
    scale: float,
    clip_norm: float | None,
    tracker: Tracker | None = None,
) -> Losses:
    """Step down the gradient of the exits' weighted loss, and of what else the objective has.

    Args:
        inputs: images [row, channel, height, width], texts [row, 3, token], or what exits 1..K read of the rows.
        scale: a factor of the loss. DDP averages over processes whose row counts may differ by one; rows here · processes / rows
            of all makes that the mean over rows.
        clip_norm: the norm that gradients are scaled down to; None: no clipping.
        tracker: measures the exits' gradients on the way; it changes no weight.
    """
    with net.execution.autocast():
        outputs = net.run(inputs, wanted.exits, equilibrium=objective.equilibrium)
    logits = [outputs[k - 1].logits for k in wanted.exits]
    apart = [objective.task.loss(each, targets, objective.label_smoothing) for each in logits]
    if tracker is not None:
        tracker.measure(apart, wanted.weights, wanted.exits, wanted.index)
    losses = torch.stack(apart)
    value = with_auxiliary(net.model.auxiliary, (losses * wanted.weights).sum(), outputs)
    lesson = objective.lesson
    if lesson is not None:
        distance = distil(logits, teacher=lesson.teacher, temperature=lesson.temperature, task=objective.task)
        value = value + lesson.weight * distance
    _descend(optimizer, value * scale, clip_norm)
    return [(losses.detach(), len(targets))]


def learned_step(
    net: RunningNetwork,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    wanted: LossSet,
    inputs: Tensor,
    targets: Tensor,
    *,
    learned: LearnedWeights,
    learns: bool,
    clip_norm: float | None,
) -> Losses:
    """Make two steps, each on one half of the batch with weights learned on the other, as in L2W's source.

    The loss is the mean over rows and exits of weight · loss (the source's is K times that: the sum over exits).

    Args:
        learns: whether the weights learn in this step, for both halves; else they are used as they are.
    """
    first, second = zip(inputs.chunk(2), targets.chunk(2), strict=True)
    done = []
    for own, other in ((first, second), (second, first)):
        if learns:
            learned.learn(
                net.model,
                optimizer,
                wanted.exits,
                train=own,
                meta=other,
                task=objective.task,
                label_smoothing=objective.label_smoothing,
                autocast=net.execution.autocast,
            )
        with net.execution.autocast():
            outputs = net.run(own[0], wanted.exits)
        each = [objective.task.losses(outputs[k - 1].logits, own[1], objective.label_smoothing) for k in wanted.exits]
        losses = torch.stack(each, dim=1)
        with torch.no_grad():
            weights = learned.weights(losses)
        _descend(optimizer, with_auxiliary(net.model.auxiliary, (weights * losses).mean(), outputs), clip_norm)
        done.append((losses.detach().mean(dim=0), len(own[0])))
    return done


def _descend(optimizer: torch.optim.Optimizer, objective: Tensor, clip_norm: float | None) -> None:
    """Make one step of the optimizer down the gradient of `objective`."""
    objective.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_([parameter for parameter in parameters if parameter.grad is not None], clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
