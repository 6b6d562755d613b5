"""What the exits of a frozen backbone read of a split's rows, computed once and kept: steps then run the heads alone.

In which phases nothing else changes what they read is `loop`'s business.
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


def cache_splits(
    model: MultiExitModel, splits: Mapping[str, Split], read: Read, *, limit: float, batch_size: int, world: World
) -> tuple[dict[str, CachedSplit], str]:
    """What all exits of `model` read of all rows of these splits, unless it takes more than `limit` bytes in a process: then
    nothing; and how much it is, in words.

    `read` gives it for a batch's inputs. The network is left in eval mode.
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
    """Each process runs its share of the rows (`rank::world`) and then holds them all: every epoch deals them out anew."""
    own = len(range(world.rank, len(split), world.size))
    kept = [torch.empty(own, *each.shape[1:], dtype=each.dtype, device=each.device) for each in example]
    for batch in eval_batches(split, batch_size=batch_size, rank=world.rank, world=world.size):
        places = (batch.rows // world.size).to(world.device)
        for rows, found in zip(kept, read(batch.inputs), strict=True):
            rows.index_copy_(0, places, found)
    whole = tuple(gather_rows(kept.pop(0), num_rows=len(split)) for _ in example)
    return CachedSplit(split.reading(_Numbers(world.device)), whole)
