"""A run's resume state: its form, and whether its tensors are those of the network and the optimizer that take them up.

A state that does not fit in every name, shape and count is refused, as it would train other weights in silence. Where the file
lies is `run_folder`'s. Every random draw is a function of the seed and the step, so no generator's state is in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from eectl.core.kinds import NonNegative
from eectl.recipe.recipe import ModelSpec

Whole = Annotated[int, Field(ge=0, le=2**53)]


class StateError(Exception):
    """A resume state, or what must lie beside it, cannot be taken up. Whoever runs the phases says how to go on without it."""


@dataclass(frozen=True)
class State:
    """A resume state to be written: tensors by name, what it says of the run, and of the phase that has begun; JSON-able."""

    tensors: Mapping[str, Tensor]
    run: Mapping[str, Any]
    phase: Mapping[str, Any] | None = None


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitFacts(_Form):
    """A split's size and fingerprint."""

    size: Whole
    fingerprint: str


class RunValues(_Form):
    """Where a run stands: how many of its phases are done, its data, and the network with its history."""

    done: Whole
    splits: dict[str, SplitFacts]
    spec: ModelSpec
    history: list[dict[str, Any]]
    parent: str | None


class StopperValues(_Form):
    """An early stopper's state; null is the worst value there is, infinity."""

    best: dict[str, float | None]
    since: Whole


class PhaseValues(_Form):
    """Where a phase stands that has begun: as `PhaseProgress` has it."""

    epoch: Whole
    batch: Whole
    best_epoch: Whole
    best_validation: dict[Literal["loss", "score", "balanced"], list[float | None]]
    stopper: StopperValues
    seconds: NonNegative


class StateValues(_Form):
    """All that a resume state says beside its tensors; `phase` is none between two phases."""

    run: RunValues
    phase: PhaseValues | None


@dataclass(frozen=True)
class SavedState:
    """A resume state as it was read: tensors by name, and what it says."""

    tensors: Mapping[str, Tensor]
    run: RunValues
    phase: PhaseValues | None


def checked_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SavedState:
    """Return a state whose values have the form that they must have; raises StateError for the first that has not."""
    try:
        found = StateValues.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StateError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    return SavedState(tensors, found.run, found.phase)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix.` in front of every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def tensors_like(prefix: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under `prefix`, which must have the names, shapes and types of `like`; raises StateError else."""
    found = under_prefix(prefix, tensors)
    for name in [*like, *found]:
        if name not in found or name not in like:
            raise StateError(f"{prefix}.{name} is {'missing' if name in like else 'not part of this run'}")
        if (found[name].shape, found[name].dtype) != (like[name].shape, like[name].dtype):
            has, needs = (f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (found[name], like[name]))
            raise StateError(f"{prefix}.{name} is {has}, this run has {needs}")
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors: `index.key`; numbers become float64 scalars."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Take up what `optimizer_tensors` gave, each state laid out in memory as its parameter is.

    Fused optimizers on the CPU walk parameter and state side by side in memory: a channels-last parameter with a state that was
    read back contiguous would be updated with other elements' moments, in silence.

    Args:
        optimizer: one that has made no step.
        prefix: what the names begin with.
        tensors: those of the resume state.

    Raises:
        StateError: a parameter's state is not whole, or not of this parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = tensors_like(prefix, tensors, _like(optimizer, parameters, under_prefix(prefix, tensors)))
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, tensor in found.items():
        index, key = name.split(".")
        whole["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(whole)
    for parameter in parameters:
        state = optimizer.state[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _like(optimizer: torch.optim.Optimizer, parameters: list[Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors such as the optimizer has for the parameters that have a state in `found`: those that a step has moved.

    A parameter that no loss has reached yet has none.
    """
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    is_adam = isinstance(optimizer, torch.optim.Adam)  # as AdamW is
    plain: tuple[str, ...] = ("exp_avg", "exp_avg_sq") if is_adam else ("exp_avg",)  # Lion's
    if isinstance(optimizer, torch.optim.SGD):
        plain = ("momentum_buffer",) * momentum
    begun = {name.split(".")[0] for name in found}
    like: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        if str(index) in begun:
            like |= {f"{index}.{key}": parameter for key in plain}
            if is_adam:
                like[f"{index}.step"] = torch.tensor(0.0)
    return like


def worst_or(value: float | None, *, higher_is_better: bool) -> float:
    """Return a value that a state holds; null, which JSON has in place of infinities, is the worst there is."""
    return (-math.inf if higher_is_better else math.inf) if value is None else value
