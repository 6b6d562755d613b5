"""Where rows of fixed-shape early exit go: which leave their ring, and to what places the next and the answers take them.

Rows are counted from 1, and row n of a ring of C places is at n % C; place C takes what nobody reads. All counts are tensors [1]
on the device, which change in place.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from eectl.core.console import silent


class Bookkeeping(Protocol):
    """A way to keep these books."""

    def claim(self, begin: Tensor, end: Tensor, place: Tensor, *, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next rows of a ring, and move `begin` past them.

        Args:
            begin: how many rows were taken so far.
            end: how many were put into the ring so far.
            place: 1, 2, … [size].

        Returns:
            The numbers of the next rows, their places in the ring, and whether they are there, all [size].
        """

    def settle(
        self, fires: Tensor, valid: Tensor, place: Tensor, *, answered: Tensor, end: Tensor | None, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """Count who leaves and who stays, and say where they go.

        Args:
            fires: which rows leave if they are there [size].
            valid: which are there [size]: those come first.
            place: 1, 2, … [size].
            answered: how many rows were answered so far.
            end: how many were put into the next ring so far; None: all leave, as there is none.

        Returns:
            Their places among the answers and in the next ring, both [size].
        """


class Operations:
    """Bookkeeping in PyTorch's own operations."""

    def claim(self, begin: Tensor, end: Tensor, place: Tensor, *, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        order = begin + place
        valid = order <= end
        torch.minimum(order[-1:], end, out=begin)
        return order, order % capacity, valid

    def settle(
        self, fires: Tensor, valid: Tensor, place: Tensor, *, answered: Tensor, end: Tensor | None, capacity: int
    ) -> tuple[Tensor, Tensor]:
        fires = fires & valid
        count = fires.cumsum(0)
        to_answers = torch.where(fires, (answered + count) % capacity, capacity)
        answered.add_(count[-1:])
        if end is None:
            return to_answers, to_answers
        stays = valid ^ fires  # rows that are there come first, so one that stays moves up by as many as left before it
        to_ring = torch.where(stays, (end + place - count) % capacity, capacity)
        end.add_(stays.sum())
        return to_answers, to_ring


def bookkeeping_for(device: torch.device, *, say: Callable[[str], None] = silent) -> Bookkeeping:
    """Return the fastest way on a device: on a GPU one kernel for each step, where Triton is there, in place of some twenty.

    Where Triton cannot build them, which `say` is told, PyTorch's operations give the same.
    """
    if device.type == "cuda" and find_spec("triton"):
        from eectl.exits.kernels import Kernels

        if Kernels.work_on(device):
            return Kernels()
        say("early exit moves rows without Triton, whose kernels cannot be built here (is there a C compiler?), which is slower")
    return Operations()
