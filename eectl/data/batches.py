"""The order in which a split's rows are seen, and each process's share of them. Pure functions of seed, epoch and rank."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.splits import Batch, Split


def num_batches(split: Split, batch_size: int) -> int:
    """Return the steps of an epoch: whole batches of `batch_size` rows over all processes, or the one short batch there is."""
    return max(_num_rows(split) // batch_size, 1)


def _num_rows(split: Split) -> int:
    """Return the rows of an epoch."""
    return split.epoch_rows or len(split)


WINDOW = 50  # batches of texts among which rows are sorted by length


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    window: int | None = None,
    repeats: int = 1,
) -> Iterator[Batch]:
    """Yield this process's part (rows `rank::world`) of every global batch of the epoch, from step `start`.

    The order is a function of (seed, epoch); an incomplete last batch is dropped unless it is the only one. An epoch with its own
    number of rows goes on where the one before it ended. Texts are batched with others of about their length, in batches
    that come in random order. Raises EectlError where a process would get no rows.

    With a `window`, images come that many batches at a time, the last ones fewer: as one Batch with rows [batch, row].

    With `repeats`, each image comes that often in a row, so in one batch or two and in different processes, and the epoch ends
    after as many rows as without (repeated augmentation, arXiv 1901.09335, in the order of timm's RepeatAugSampler).
    """
    rows_at_most = min(batch_size, _num_rows(split))
    if rows_at_most < world:
        raise EectlError(f"batch_size: {rows_at_most} rows a batch do not go round {world} processes; raise it or use fewer")
    key, generator = _drawing(f"{seed} {epoch}")
    own = None if split.epoch_rows is None else -(-split.epoch_rows // repeats)  # rows of the order that the epoch uses up
    order = _shuffled(split, generator) if own is None else _next_rows(split, own, seed, epoch)
    if split.lengths is not None:
        order = _by_length(order[: num_batches(split, batch_size) * batch_size], split.lengths, batch_size, generator)

    def parts(places: Tensor) -> list[Tensor]:
        """Cut what stands in the places of the epoch's order into this process's parts of batches, or of windows of them."""
        steps = range(start, num_batches(split, batch_size))
        batches = [places[step * batch_size : (step + 1) * batch_size][rank::world] for step in steps]
        if window is None:
            return batches
        return [torch.stack(batches[first : first + window]) for first in range(0, len(batches), window)]

    if repeats == 1:
        yield from split.batches(parts(order), draw=key)
        return
    places = torch.arange(_num_rows(split))
    yield from split.batches(parts(order[places // repeats]), draw=key, visits=parts(places % repeats))


def _drawing(name: str) -> tuple[int, torch.Generator]:
    """Return a number that a name stands for, and a generator that starts from it."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return key, torch.Generator().manual_seed(key >> 1)


def _next_rows(split: Split, count: int, seed: int, epoch: int) -> Tensor:
    """Return the rows of an epoch of `count` rows, which goes on where the one before it ended, pass after pass over all rows."""
    total, first = len(split), epoch * count
    passes = range(first // total, -(-(first + count) // total))
    orders = [_shuffled(split, _drawing(f"{seed} pass {number}")[1]) for number in passes]
    return torch.cat(orders)[first - passes[0] * total :][:count]


def _shuffled(split: Split, generator: torch.Generator) -> Tensor:
    """Return all rows in a random order: any, or where they are kept in shards, one that reads these nearly in turn."""
    total, shards = len(split), split.shards
    if shards is None or shards.buffer >= total:
        return torch.randperm(total, generator=generator)
    turns = torch.randperm(int(shards.numbers.max()) + 1, generator=generator)
    rows = turns[shards.numbers].argsort(stable=True).tolist()
    sizes = (total - torch.arange(total)).clamp(max=shards.buffer)
    places = (torch.rand(total, generator=generator, dtype=torch.float64) * sizes).long().tolist()
    ahead = rows[: shards.buffer]
    coming = iter(rows[shards.buffer :])
    order = []
    for place in places:
        order.append(ahead[place])
        last = ahead.pop()
        if place < len(ahead):
            ahead[place] = last
        if (row := next(coming, None)) is not None:
            ahead.append(row)
    return torch.tensor(order)


def _by_length(order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Sort rows by length within windows of WINDOW batches, and shuffle the batches.

    Windows are cut from a random order, so a row's neighbours differ from epoch to epoch.
    """
    windows = torch.split(order, WINDOW * batch_size)
    rows = torch.cat([window[lengths[window].argsort(stable=True)] for window in windows])
    batches = torch.split(rows, batch_size)
    return torch.cat([batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()])


def longest_first(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the same rows, texts by their `lengths` [N] with the longest first; images, which have none, as they are."""
    return rows if lengths is None else rows[lengths[rows].argsort(descending=True, stable=True)]


def eval_order(split: Split, *, rank: int = 0, world: int = 1) -> Tensor:
    """Return this process's rows (`rank::world`) in the order of `eval_batches`: images in order, texts longest first."""
    return longest_first(torch.arange(rank, len(split), world), split.lengths)


def eval_batches(split: Split, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield this process's rows (`rank::world`) in batches of `batch_size`, the last one short; texts come longest first."""
    rows = eval_order(split, rank=rank, world=world)
    yield from split.batches(torch.split(rows, batch_size) if len(rows) else ())
