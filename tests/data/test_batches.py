"""Orders of rows: an epoch of a number of rows of its own, and shards that are read nearly in turn, against naive versions."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from eectl.core.errors import EectlError
from eectl.data import num_batches, train_batches
from eectl.data.images import MemoryImages
from eectl.data.splits import Shards, Split

CPU = torch.device("cpu")


def split_of(rows, *, epoch_rows=None, shards=None, buffer=1):
    pixels = torch.zeros(rows, 1, 2, 2, dtype=torch.uint8)
    kept = None if shards is None else Shards(torch.tensor(shards), buffer)
    labels, ids = torch.zeros(rows, dtype=torch.int64), np.arange(rows, dtype=np.uint64)
    return Split("train", MemoryImages(pixels), labels, ids, device=CPU, epoch_rows=epoch_rows, shards=kept)


def order(split, epoch=0, *, size=1, **more):
    return [row for batch in train_batches(split, batch_size=size, seed=3, epoch=epoch, **more) for row in batch.rows.tolist()]


@pytest.mark.parametrize("epoch_rows", [4, 7, 10, 25])
def test_epochs_of_their_own_length_go_through_all_rows_pass_after_pass(epoch_rows):
    split = split_of(10, epoch_rows=epoch_rows)
    assert num_batches(split, 3) == epoch_rows // 3
    epochs = [order(split, epoch) for epoch in range(20)]
    assert {len(each) for each in epochs} == {epoch_rows}
    stream = [row for each in epochs for row in each]
    passes = [tuple(stream[start : start + 10]) for start in range(0, len(stream) - 9, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes) and len(set(passes)) == len(passes)


@pytest.mark.parametrize(("epoch_rows", "repeats"), [(6, 3), (7, 3), (20, 4)])
def test_repeated_images_leave_none_out_in_epochs_of_their_own_length(epoch_rows, repeats):
    split, used = split_of(10, epoch_rows=epoch_rows), -(-epoch_rows // repeats)
    epochs = [order(split, epoch, repeats=repeats) for epoch in range(10)]
    distinct = [list(dict.fromkeys(each)) for each in epochs]
    assert all(
        each == [row for row in rows for _ in range(repeats)][:epoch_rows] for each, rows in zip(epochs, distinct, strict=True)
    )
    assert {len(rows) for rows in distinct} == {used}
    stream = [row for rows in distinct for row in rows]
    assert all(sorted(stream[start : start + 10]) == list(range(10)) for start in range(0, len(stream) - 9, 10))


def test_without_a_length_of_its_own_an_epoch_is_as_it_ever_was():
    assert order(split_of(10), epoch=0) == [4, 8, 3, 0, 9, 6, 5, 2, 7, 1]
    assert sorted(order(split_of(10), epoch=1)) == list(range(10)) != order(split_of(10), epoch=1)


def test_more_processes_than_rows_of_an_epoch_are_refused():
    with pytest.raises(EectlError, match="2 rows a batch do not go round 3 processes"):
        order(split_of(10, epoch_rows=2), size=4, world=3)


def test_a_buffer_of_one_row_reads_shard_after_shard_in_an_order_of_each_epochs_own():
    shards = [0] * 5 + [1] * 3 + [2] * 6 + [3] * 2
    read = [order(split_of(16, shards=shards), epoch) for epoch in range(6)]
    turns = set()
    for rows in read:
        assert sorted(rows) == list(range(16))
        visited = [shards[row] for row in rows]
        turns.add(tuple(dict.fromkeys(visited)))
        assert sum(a != b for a, b in pairwise(visited)) == 3  # each shard once
        assert all(a < b for a, b in pairwise(rows) if shards[a] == shards[b])  # from its start to its end
    assert len(turns) > 1


@pytest.mark.parametrize("buffer", [4, 20])
def test_a_row_is_drawn_from_the_next_so_many(buffer):
    """By a naive buffer: whatever is drawn must lie in it, and it is filled in the order of the shards."""
    shards = [row // 10 for row in range(60)]
    for epoch in range(5):
        rows = order(split_of(60, shards=shards, buffer=buffer), epoch)
        turns = [shards[row] for row in order(split_of(60, shards=shards, buffer=1), epoch)]
        coming = [row for shard in dict.fromkeys(turns) for row in range(60) if shards[row] == shard]
        ahead, coming = coming[:buffer], coming[buffer:]
        for row in rows:
            ahead.remove(row)  # a ValueError where it does not lie there
            ahead += coming[:1]
            coming = coming[1:]
        assert not ahead and not coming


def test_every_row_of_the_buffer_is_as_likely_as_any():
    shards = [0] * 8
    firsts = [order(split_of(8, shards=shards, buffer=4), epoch)[0] for epoch in range(2000)]
    counts = np.bincount(firsts, minlength=8)
    assert not counts[4:].any() and abs(counts[:4] - 500).max() < 4 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("changes", [{"epoch_rows": 23}, {"shards": [row // 7 for row in range(60)], "buffer": 9}])
def test_processes_share_each_batch_and_a_resumed_epoch_goes_on(changes):
    split = split_of(60, **changes)
    whole = [batch.rows.tolist() for batch in train_batches(split, batch_size=6, seed=1, epoch=4)]
    parts = [
        [batch.rows.tolist() for batch in train_batches(split, batch_size=6, seed=1, epoch=4, rank=r, world=4)] for r in range(4)
    ]
    for number, batch in enumerate(whole):
        assert sorted(row for part in parts for row in part[number]) == sorted(batch)
    for start in range(len(whole)):
        assert [batch.rows.tolist() for batch in train_batches(split, batch_size=6, seed=1, epoch=4, start=start)] == whole[
            start:
        ]
