"""Stop the building of a network as soon as it grows beyond what it may have.

A name and options, in a recipe or a file, say how large a network becomes, and a mistake or malice of six digits there would fill
the memory first. What is counted is what modules register, while they do, before it is filled with numbers.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from eectl.core.errors import EectlError

MOST_TENSORS = 10_000  # of a network that is built from a recipe: the largest of timm's have some 4,000
_MODULES_PER_TENSOR = 10  # there are modules without any, such as activations
_BYTES = 4  # of a parameter in float32
_SLACK = 4  # libraries register some parts twice, as tied weights and ones that take the place of others


class TooLargeError(EectlError):
    """A network that would be larger than it may be."""


@dataclass(frozen=True)
class Limit:
    """The most numbers and the most tensors that a network may have, and how messages say why."""

    numbers: int
    tensors: int
    why: str


def limit_of_memory() -> Limit:
    """Return the limit for a network that nothing else is known of: what this machine's memory holds."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers = total // _BYTES
    why = f"allowed are {MOST_TENSORS:,} tensors and, in this machine's memory, {numbers:.2g} numbers"
    return Limit(numbers, MOST_TENSORS, why)


def limit_of_weights(tensors: "dict[str, Tensor]", *, where: object) -> Limit:
    """Return the limit for a network whose weights are in a file: what these fill, with some slack."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    why = f"{where} holds {numbers:,} numbers in {len(tensors):,} tensors, which are not of such a network"
    return Limit(_SLACK * numbers + 1_000_000, _SLACK * len(tensors) + 1_000, why)


@contextmanager
def building_within(limit: Limit, *, name: str) -> Iterator[None]:
    """Raise TooLargeError in the block as soon as the modules made there have more than `limit` allows.

    Args:
        limit: the most that they may have.
        name: the network's, for messages.

    Raises:
        TooLargeError: there, or where a single tensor is larger than memory.
    """
    found = {"numbers": 0, "tensors": 0, "modules": 0}
    most = {"numbers": limit.numbers, "tensors": limit.tensors, "modules": _MODULES_PER_TENSOR * limit.tensors}

    too_large = TooLargeError(f"{name} with these options is too large: {limit.why}; check the options that say its size")

    def count(_parent: torch.nn.Module, _name: str, made: Any) -> None:
        if isinstance(made, Tensor):
            found["numbers"] += made.numel()
            found["tensors"] += 1
        else:
            found["modules"] += 1
        if any(found[what] > most[what] for what in found):
            raise too_large

    hooks = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count),
        modules.register_module_module_registration_hook(count),
    ]
    try:
        yield
    except (RuntimeError, OverflowError) as error:  # a tensor that no memory holds is refused before it is registered
        if isinstance(error, RuntimeError) and "memory" not in str(error) and "overflow" not in str(error):
            raise
        raise too_large from error
    finally:
        for hook in hooks:
            hook.remove()


def check_size(build: Callable[[], object], limit: Limit, *, name: str) -> None:
    """Let a network be built without its numbers, on torch's meta device; raises TooLargeError where it has more than allowed.

    A build that fails otherwise is not judged: it will fail again, or was none for that device.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), building_within(limit, name=name):
            build()
    except TooLargeError:
        raise
    except Exception:  # whatever a library does not do on that device
        return
