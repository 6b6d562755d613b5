"""Bookkeeping as two Triton kernels, one for each step. It is imported only where a GPU and Triton are there."""

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from eectl.exits.bookkeeping import Operations

MOST_ROWS = 4096  # that one block of threads goes through; more are left to PyTorch's operations


class Kernels:
    """Bookkeeping that launches one kernel for each step."""

    def __init__(self) -> None:
        self._operations = Operations()

    def claim(self, begin: Tensor, end: Tensor, place: Tensor, *, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        size = len(place)
        if size > MOST_ROWS:
            return self._operations.claim(begin, end, place, capacity=capacity)
        order, slots = torch.empty_like(place), torch.empty_like(place)
        valid = torch.empty(size, dtype=torch.uint8, device=place.device)
        _claim[(1,)](begin, end, order, slots, valid, size, capacity, block=triton.next_power_of_2(size))
        return order, slots, valid.view(torch.bool)

    def settle(
        self, fires: Tensor, valid: Tensor, place: Tensor, *, answered: Tensor, end: Tensor | None, capacity: int
    ) -> tuple[Tensor, Tensor]:
        size = len(place)
        if size > MOST_ROWS:
            return self._operations.settle(fires, valid, place, answered=answered, end=end, capacity=capacity)
        to_answers = torch.empty_like(place)
        to_ring = to_answers if end is None else torch.empty_like(place)
        _settle[(1,)](
            fires.view(torch.uint8),
            valid.view(torch.uint8),
            answered,
            answered if end is None else end,
            to_answers,
            to_ring,
            size,
            capacity,
            all_leave=end is None,
            block=triton.next_power_of_2(size),
        )
        return to_answers, to_ring

    @staticmethod
    def work_on(device: torch.device) -> bool:
        """Return whether the kernels can be built here and give what PyTorch's operations give; Triton needs a C compiler."""
        fires = torch.tensor([True, False, True, False, True], device=device)
        found = []
        try:
            for way in (Operations(), Kernels()):
                place = torch.arange(1, 6, device=device)
                counts = torch.tensor([5, 9, 7, 8], device=device)
                begin, end, answered, after = torch.split(counts, 1)
                claimed = way.claim(begin, end, place, capacity=10)
                settled = way.settle(fires, claimed[2], place, answered=answered, end=after, capacity=10)
                last = way.settle(fires, claimed[2], place, answered=answered, end=None, capacity=10)
                found.append([each.tolist() for each in (*claimed, *settled, *last, counts)])
        except Exception:  # whatever its compiler raises: the operations give the same, a little slower
            return False
        return found[0] == found[1]


@triton.jit(do_not_specialize=["size", "capacity"])  # type: ignore[untyped-decorator, unused-ignore]
def _claim(begin, end, order, slots, valid, size, capacity, block: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, block)
    inside = lane < size
    first, last = tl.load(begin), tl.load(end)
    number = first + 1 + lane
    tl.store(order + lane, number, mask=inside)
    tl.store(slots + lane, number % capacity, mask=inside)
    tl.store(valid + lane, (number <= last).to(tl.uint8), mask=inside)
    tl.store(begin, tl.minimum(first + size, last))


@triton.jit(do_not_specialize=["size", "capacity"])  # type: ignore[untyped-decorator, unused-ignore]
def _settle(fires, valid, answered, end, to_answers, to_ring, size, capacity, all_leave: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, block)
    inside = lane < size
    there = tl.load(valid + lane, mask=inside, other=0) != 0
    leaves = there & (tl.load(fires + lane, mask=inside, other=0) != 0)
    count = tl.cumsum(leaves.to(tl.int64), 0)
    before = tl.load(answered)
    tl.store(to_answers + lane, tl.where(leaves, (before + count) % capacity, capacity), mask=inside)
    tl.store(answered, before + tl.sum(leaves.to(tl.int64), 0))
    if not all_leave:
        stays = there & (leaves == 0)
        put = tl.load(end)
        tl.store(to_ring + lane, tl.where(stays, (put + 1 + lane - count) % capacity, capacity), mask=inside)
        tl.store(end, put + tl.sum(stays.to(tl.int64), 0))
