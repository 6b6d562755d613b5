"""The order in which a split's rows are seen, and each process's share of them. Pure functions of seed, epoch and rank."""

import hashlib
from collections.abc import Iterator

import torch

from eectl.data.splits import Batch, Split
from eectl.errors import EectlError


def num_batches(split: Split, batch_size: int) -> int:
    """Steps of an epoch: whole batches of `batch_size` rows over all processes, or the one short batch there is."""
    return max(len(split) // batch_size, 1)


def train_batches(
    split: Split, *, batch_size: int, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This process's part (rows `rank::world`) of every global batch of the epoch, from step `start`.

    The order is a function of (seed, epoch); an incomplete last batch is dropped unless it is the only one.
    Raises EectlError where a process would get no rows.
    """
    if min(batch_size, len(split)) < world:
        raise EectlError(
            f"batch_size: {min(batch_size, len(split))} rows a batch do not go round {world} processes; raise it or use fewer"
        )
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(key >> 1))
    steps = range(start, num_batches(split, batch_size))
    yield from split.batches([order[step * batch_size : (step + 1) * batch_size][rank::world] for step in steps], draw=key)


def eval_batches(split: Split, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This process's rows (`rank::world`, in order) in batches of `batch_size`, the last one short."""
    rows = torch.arange(rank, len(split), world)
    yield from split.batches(torch.split(rows, batch_size) if len(rows) else ())
