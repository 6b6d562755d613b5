"""The objective of a training step: how the exits' losses are weighted, and what exits learn from each other.

The weights are a function of the epoch and constant within it; weights that are learned for each row are `l2w`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.exits.costs import measure_costs
from eectl.models.losses import Task, balanced_weights, task_of
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import DistillationSection, L2wSection, Recipe
from eectl.recipe.regimes import Phase
from eectl.recipe.weighting import exit_weights


@dataclass(frozen=True)
class LossSet:
    """The exits of one loss (numbers from 1), their indices from 0 and their weights, both on the device."""

    exits: list[int]
    index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Objective:
    """A phase's objective.

    `weighting` is the recipe's scheme with `auto` resolved, or one number per exit. `slope`, `shares` (each attached exit's
    share of the backbone's cost) and `ramp_epochs` are what some schemes read. `equilibrium` says that gradients are rescaled in
    the backward pass. `learned` are the settings of weights learned for each row, `lesson` what exits learn from later ones;
    both are None where there is no such thing. `class_weights` say how much a row of each class counts, None: all rows alike.
    """

    task: Task
    num_exits: int
    weighting: str | tuple[float, ...]
    slope: float
    shares: tuple[float, ...]
    ramp_epochs: int
    label_smoothing: float
    equilibrium: bool
    learned: L2wSection | None
    lesson: DistillationSection | None
    class_weights: tuple[float, ...] | None = None

    def loss_sets(self, phase: Phase, epoch: int, *, device: torch.device) -> list[LossSet]:
        """Return the exits of each of the phase's losses and their weights in epoch `epoch`, counted from 0."""
        sets = []
        for exits in map(sorted, phase.losses):
            weights = exit_weights(
                self.weighting,
                num_exits=self.num_exits,
                taking_part=exits,
                slope=self.slope,
                shares=self.shares,
                progress=(epoch + 1) / self.ramp_epochs,
            )
            sets.append(LossSet(exits, torch.tensor(exits, device=device) - 1, torch.tensor(weights, device=device)))
        return sets


def make_objective(
    recipe: Recipe,
    model: MultiExitModel,
    phase: Phase,
    *,
    task: Task,
    epochs: int,
    input_shape: Sequence[int],
    labels: Tensor,
) -> Objective:
    """Resolve what a recipe says of the loss for one phase, which lasts at most `epochs` epochs, and the network it trains.

    `labels` are those of the training rows.
    """
    weighting = recipe.loss_weights if model.num_exits > 1 else "uniform"  # no exits are attached yet
    weighting = model.default_weights if weighting == "auto" else weighting
    weighs_exits = phase.scored != {model.num_exits}
    return Objective(
        task=task_of(task.name, {"loss": recipe.loss, "bce_target_threshold": recipe.bce_target_threshold}),
        num_exits=model.num_exits,
        weighting=weighting,
        slope=recipe.weight_slope,
        shares=measure_costs(model, input_shape).backbone_shares if weighting == "sdn-ramp" else (),
        ramp_epochs=recipe.ramp_epochs or epochs,
        label_smoothing=recipe.label_smoothing,
        equilibrium=weighting == "equilibrium",
        learned=recipe.l2w if weighting == "l2w" and weighs_exits else None,
        lesson=None if recipe.distillation.teacher == "none" else recipe.distillation,
        class_weights=tuple(balanced_weights(labels).tolist()) if recipe.class_weights == "balanced" else None,
    )
