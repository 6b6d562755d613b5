"""What the exits of a frozen backbone read of a split's rows, computed once and kept: steps then run the heads alone.

Whether a phase may do so, and what of it is said, is `loop`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.data import Split, eval_batches
from eectl.data.splits import send_all
from eectl.distributed import World, gather_rows
from eectl.models.multi_exit import MultiExitModel, Reads

Read = Callable[[Tensor], Reads]


class _Numbers:
    """Inputs that are the row numbers themselves, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self, batches: Sequence[Tensor], *, draw: int | None = None) -> Iterator[Tensor]:  # noqa: ARG002 (nothing is drawn)
        """Each tensor of rows."""
        return iter(send_all(batches, self._device))


@dataclass(frozen=True)
class CachedSplit:
    """A split whose batches hold row numbers as inputs, and what each exit reads of its rows, [row of the split, …]."""

    split: Split
    reads: Reads

    def take(self, rows: Tensor) -> Reads:
        """What the exits read of the rows with these numbers, both on the device."""
        return tuple(each.index_select(0, rows) for each in self.reads)


def bytes_per_row(read: Reads) -> int:
    """What one row of this takes."""
    return sum(each[0].numel() * each.element_size() for each in read)


def cache_split(model: MultiExitModel, split: Split, read: Read, *, like: Reads, batch_size: int, world: World) -> CachedSplit:
    """What all exits of `model`, in eval mode, read of all rows of a split, on this process's device.

    `read` gives it for a batch's inputs, `like` is an example of any length. Each process runs its share of the rows
    (`rank::world`) and then holds them all, since every epoch deals them out anew.
    """
    assert not any(module.training for module in model.modules())
    own = len(range(world.rank, len(split), world.size))
    kept = [torch.empty(own, *each.shape[1:], dtype=each.dtype, device=each.device) for each in like]
    for batch in eval_batches(split, batch_size=batch_size, rank=world.rank, world=world.size):
        places = (batch.rows // world.size).to(world.device)
        for rows, found in zip(kept, read(batch.inputs), strict=True):
            rows.index_copy_(0, places, found)
    whole = tuple(gather_rows(kept.pop(0), num_rows=len(split)) for _ in like)
    return CachedSplit(split.reading(_Numbers(world.device)), whole)
