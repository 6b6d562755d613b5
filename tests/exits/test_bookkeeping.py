"""Who goes where in fixed-shape early exit, against lists that are moved by hand; and the kernels against that."""

import random
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from running import ROOT, environment

from eectl.exits.bookkeeping import Operations


def check(books, *, seed, steps=40):
    """Rows go through two rings of random fill into the answers; lists do what the tensors should have done."""
    draw = random.Random(seed)
    size = draw.choice([1, 2, 5, 8])
    capacity = 6 * size + draw.randint(0, 3)
    counts = torch.zeros(4, dtype=torch.int64)
    begin, end, after, answered = torch.split(counts, 1)
    rings = [torch.full((capacity + 1,), -1) for _ in range(3)]  # here, next, answers
    lists = [[], [], []]
    place, number, next_taken = torch.arange(1, size + 1), 0, 0
    for _ in range(steps):
        for _ in range(draw.randint(0, min(2 * size, capacity - len(lists[0])))):
            number += 1
            end += 1
            rings[0][end % capacity] = number
            lists[0].append(number)
        order, slots, valid = books.claim(begin, end, place, capacity=capacity)
        taken, lists[0] = lists[0][:size], lists[0][size:]
        rows = rings[0][slots]
        assert valid.tolist() == [True] * len(taken) + [False] * (size - len(taken))
        assert rows[valid].tolist() == order[valid].tolist() == taken
        assert begin.item() == number - len(lists[0])
        fires = torch.tensor([draw.random() < 0.4 for _ in range(size)])
        last = draw.random() < 0.2
        to_answers, to_ring = books.settle(fires, valid, place, answered=answered, end=None if last else after, capacity=capacity)
        leave = [row for row, fired in zip(taken, fires.tolist(), strict=False) if fired]
        lists[2] += leave
        rings[2][to_answers] = rows
        assert answered.item() == len(lists[2])
        if not last:
            lists[1] += [row for row in taken if row not in leave]
            rings[1][to_ring] = rows
        assert after.item() == next_taken + len(lists[1])
        for ring, rows_there, first in ((rings[1], lists[1], next_taken), (rings[2], lists[2][-capacity:], None)):
            first = len(lists[2]) - len(rows_there) if first is None else first
            places = (torch.arange(len(rows_there)) + first + 1) % capacity
            assert ring[places].tolist() == rows_there
        keep = draw.randint(0, min(len(lists[1]), 3 * size))
        next_taken += len(lists[1]) - keep
        lists[1] = lists[1][len(lists[1]) - keep :]


@pytest.mark.parametrize("seed", range(12))
def test_rows_go_where_lists_put_them(seed):
    check(Operations(), seed=seed)


@pytest.mark.process
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_do_the_same():
    """In Triton's interpreter, which needs no GPU; it must be on before Triton is first imported."""
    code = (
        "import torch\n"
        "from exits.test_bookkeeping import check\n"
        "from eectl.exits import kernels\n"
        "assert kernels.Kernels.work_on(torch.device('cpu'))\n"
        "for seed in range(6): check(kernels.Kernels(), seed=seed, steps=12)\n"
        "kernels.MOST_ROWS = 0\n"
        "check(kernels.Kernels(), seed=0)\n"
    )
    variables = environment(TRITON_INTERPRET="1")
    variables["PYTHONPATH"] = f"{ROOT}/tests:{variables['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
