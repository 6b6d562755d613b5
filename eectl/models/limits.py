"""Stop the building of a network as soon as it grows beyond what it may have.

A name and options, in a recipe or a file, say how large a network becomes, and a mistake or malice of six digits there would fill
the memory first. What is counted is what modules register, while they do, before it is filled with numbers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from eectl.core.errors import EectlError

MOST_TENSORS = 20_000  # of a network that is built from a recipe: the largest of timm's have some 2,000
_BYTES = 4  # of a parameter in float32
_SLACK = 4  # libraries register some parts twice, as tied weights and ones that take the place of others


@dataclass(frozen=True)
class Limit:
    """The most numbers and the most tensors that a network may have, and how messages say why."""

    numbers: int
    tensors: int
    why: str


def limit_of_memory() -> Limit:
    """Return the limit for a network that nothing else is known of: what this machine's memory holds."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Limit(total // _BYTES, MOST_TENSORS, f"this machine has memory for {total // _BYTES:.2g} numbers")


def limit_of_weights(tensors: "dict[str, Tensor]", *, where: object) -> Limit:
    """Return the limit for a network whose weights are in a file: what these fill, with some slack."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    why = f"{where} holds {numbers:,} numbers in {len(tensors):,} tensors, which are not of such a network"
    return Limit(_SLACK * numbers + 1_000_000, _SLACK * len(tensors) + 1_000, why)


@contextmanager
def building_within(limit: Limit, *, name: str) -> Iterator[None]:
    """Raise EectlError in the block as soon as the modules made there have more than `limit` allows.

    Args:
        limit: the most that they may have.
        name: the network's, for messages.

    Raises:
        EectlError: there, or where a single tensor is larger than memory.
    """
    numbers = tensors = 0

    def count(_module: torch.nn.Module, _name: str, made: Any) -> None:
        nonlocal numbers, tensors
        tensors += 1
        numbers += made.numel() if isinstance(made, Tensor) else 0
        if numbers > limit.numbers or tensors > 10 * limit.tensors:  # modules are counted too, and there are more of these
            raise EectlError(f"{name} with these options is too large: {limit.why}; check the options that say its size")

    hooks = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count),
        modules.register_module_module_registration_hook(count),
    ]
    try:
        yield
    except (RuntimeError, OverflowError) as error:  # a tensor that no memory holds is refused before it is registered
        if not isinstance(error, OverflowError) and "memory" not in str(error) and "overflow" not in str(error):
            raise
        raise EectlError(f"{name} with these options is too large: {limit.why}; check the options that say its size") from error
    finally:
        for hook in hooks:
            hook.remove()
