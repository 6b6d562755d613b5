"""Compute once, and keep, what the exits of a frozen backbone read of a split's rows: steps then run the heads alone.

Whether a phase always reads the same is decided in `phase`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.core.distributed import World, gather_rows
from eectl.data import Split, eval_batches
from eectl.data.splits import send_all
from eectl.models.multi_exit import MultiExitModel, Reads

Read = Callable[[Tensor], Reads]


class _Numbers:
    """Inputs that are the row numbers themselves, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(
        self,
        batches: Sequence[Tensor],
        *,
        draw: int | None = None,  # noqa: ARG002 (nothing is drawn)
        visits: Sequence[Tensor] | None = None,  # noqa: ARG002
    ) -> Iterator[Tensor]:
        """Return each tensor of rows."""
        return iter(send_all(batches, self._device))


@dataclass(frozen=True)
class CachedSplit:
    """A split whose batches hold row numbers as inputs, and what each exit reads of its rows, [row of the split, …]."""

    split: Split
    reads: Reads

    def take(self, rows: Tensor) -> Reads:
        """Return what the exits read of the rows with these numbers, both on the device."""
        return tuple(each.index_select(0, rows) for each in self.reads)


def cache_splits(
    model: MultiExitModel, splits: Mapping[str, Split], read: Read, *, limit: float, batch_size: int, world: World
) -> tuple[dict[str, CachedSplit], str]:
    """Return what all exits of `model` read of all rows of these splits, and how much that is in words.

    Nothing is kept where it takes more than `limit` bytes in a process. The network is left in eval mode.

    Args:
        read: gives what the exits read of a batch's inputs, [row, …] for each exit.
    """
    model.eval()
    example = read(next(iter(splits.values())).rows(torch.arange(1)))
    rows = sum(map(len, splits.values()))
    size = rows * sum(each.numel() * each.element_size() for each in example)
    amount = f"{rows:,} rows takes {size / 1e6:,.1f} MB"
    if size > limit:
        return {}, f"{amount}, and cache_features allows {limit / 1e6:,.1f} MB"
    cached = {name: _cache(split, read, example, batch_size, world) for name, split in splits.items()}
    return cached, f"{amount} and is kept"


def _cache(split: Split, read: Read, example: Reads, batch_size: int, world: World) -> CachedSplit:
    """Run each process's share of the rows (`rank::world`) and give it all of them: every epoch deals them out anew."""
    own = len(range(world.rank, len(split), world.size))
    kept = [torch.empty(own, *each.shape[1:], dtype=each.dtype, device=each.device) for each in example]
    for batch in eval_batches(split, batch_size=batch_size, rank=world.rank, world=world.size):
        places = (batch.rows // world.size).to(world.device)
        for rows, found in zip(kept, read(batch.inputs), strict=True):
            rows.index_copy_(0, places, found)
    whole = tuple(gather_rows(kept.pop(0), num_rows=len(split)) for _ in example)
    return CachedSplit(split.reading(_Numbers(world.device)), whole)
