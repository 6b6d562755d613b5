"""A network as it runs in training: its device, memory layout and precision, and DDP or torch.compile around it.

All of it is resolved before the first phase; nothing here knows what is trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.distributed import World
from eectl.core.precision import autocast, resolve_precision
from eectl.models.backbone import Backbone
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import Recipe
from eectl.recipe.regimes import Phase


@dataclass(frozen=True)
class Execution:
    """The device, precision and memory layout in which a network computes.

    `precision` is float32, tf32 or bf16; with `deterministic` only algorithms run that give the same bits each time. `recomputes`
    says that blocks run again in the backward pass, which takes less memory and more time.
    """

    device: torch.device
    channels_last: bool
    precision: str
    deterministic: bool = False
    compiled: bool = False
    recomputes: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that a forward pass runs in."""
        return autocast(self.precision, self.device)

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Return a batch of inputs in the memory layout that the network has."""
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs


@dataclass(frozen=True)
class RunningNetwork:
    """A network that is ready to train.

    `run` is `model` as training steps call it: in DDP where there are several processes, compiled where that is asked for.
    """

    model: MultiExitModel
    run: Callable[..., list[ExitOutput]]
    execution: Execution


def make_execution(recipe: Recipe, backbone: Backbone, device: torch.device) -> Execution:
    """Resolve a recipe's `precision` and `channels_last` for a network and a device."""
    return Execution(
        device,
        backbone.lies_channels_last(recipe.channels_last),
        resolve_precision(recipe.precision, device),
        deterministic=recipe.deterministic,
        compiled=recipe.compile is True,
        recomputes=recipe.checkpoint_activations,
    )


def start_network(model: MultiExitModel, phase: Phase, execution: Execution, world: World) -> RunningNetwork:
    """Move the network to its device, freeze what the phase does not train, and wrap it: in this order.

    DDP looks at what requires a gradient when it wraps a network, so frozen parts must be frozen before.
    """
    model.to(execution.device)
    if execution.channels_last:
        model.to(memory_format=torch.channels_last)
    model.set_trainable(phase.segments, phase.heads, combine=phase.combine)
    model.checkpoint_activations(execution.recomputes)
    runner: nn.Module = model
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        unused = len(phase.losses) > 1 or model.backbone.blocks_serve_later_exits
        runner = nn.parallel.DistributedDataParallel(runner, devices, find_unused_parameters=unused)
    return RunningNetwork(model, torch.compile(runner) if execution.compiled else runner, execution)
