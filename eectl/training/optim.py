"""The optimizer, the learning rate as a function of the step, and early stopping. Knows no model and no data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eectl.recipe.optimizer_section import OptimizerSection, ScheduleSection

SCALE = "lr_scale"  # the key of an optimizer's group


def learning_rate(step: int, *, base: float, schedule: ScheduleSection, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of step `step` (from 0) of a phase that lasts at most `epochs` epochs.

    `cosine-restarts` is Loshchilov & Hutter 2017 with T_0 = `cycle` epochs and T_mult = `cycle_factor`, stepped per batch;
    warm-up comes first and shifts the rest.
    """
    warmup = round(schedule.warmup * steps_per_epoch)
    if step < warmup:
        return base * (step + 1) / warmup
    step -= warmup
    if schedule.name == "constant":
        return base
    if schedule.name == "cosine":
        length, position = max(epochs * steps_per_epoch - warmup, 1), step
    else:
        length, position = max(round(schedule.cycle * steps_per_epoch), 1), step
        if schedule.cycle_factor == 1:
            position %= length
        while position >= length:
            position -= length
            length *= schedule.cycle_factor
    share = min(position / length, 1.0)
    return schedule.min_lr + (base - schedule.min_lr) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a learning rate, which is `scale` times the optimizer's."""

    parameters: Sequence[nn.Parameter]
    weight_decay: float
    scale: float = 1.0


def make_optimizer(groups: Sequence[ParameterGroup], settings: OptimizerSection) -> torch.optim.Optimizer:
    """Return the optimizer over these groups, fused where torch can; a captured step can then take it."""
    device = groups[0].parameters[0].device
    fused = device.type in ("cpu", "cuda")

    def rate(scale: float) -> Any:
        if not fused:
            return settings.lr * scale
        # in a tensor: a CUDA graph would go on with the number that it was recorded with
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        return torch.tensor(settings.lr * scale, dtype=dtype, device=device)

    chosen = [
        {"params": list(each.parameters), "lr": rate(each.scale), "weight_decay": each.weight_decay, SCALE: each.scale}
        for each in groups
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(chosen, lr=settings.lr, momentum=settings.momentum, fused=fused)
    if settings.name == "lion":
        from timm.optim.lion import Lion  # seconds, for those who ask

        return Lion(chosen, lr=settings.lr, betas=settings.betas, foreach=False)  # only so it takes rates from tensors
    return torch.optim.AdamW(chosen, lr=settings.lr, betas=settings.betas, fused=fused, capturable=device.type == "cuda")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each by its scale, in the tensor that holds it where there is one."""
    for group in optimizer.param_groups:
        own = rate * group.get(SCALE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


@dataclass
class EarlyStopper:
    """Stops when none of the exits has improved on its own best for `patience` evaluations (paper §4.1).

    Improvement is strict and NaN is none. The state to restore is that of the last evaluation at which any exit improved.
    """

    patience: int
    higher_is_better: bool
    best: dict[int, float] = field(default_factory=dict)
    since_improvement: int = 0

    def update(self, values: Mapping[int, float]) -> bool:
        """Take one evaluation, exit number → value; returns whether any exit improved."""
        improved = {
            number: value
            for number, value in values.items()
            if not math.isnan(value) and self._beats(value, self.best.get(number))
        }
        self.best.update(improved)
        self.since_improvement = 0 if improved else self.since_improvement + 1
        return bool(improved)

    def _beats(self, value: float, best: float | None) -> bool:
        return best is None or (value > best if self.higher_is_better else value < best)

    @property
    def should_stop(self) -> bool:
        """Return whether patience has run out."""
        return self.since_improvement >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON-able data."""
        return {"best": {str(number): value for number, value in self.best.items()}, "since": self.since_improvement}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state()` gave."""
        self.best = {int(number): value for number, value in state["best"].items()}
        self.since_improvement = state["since"]
