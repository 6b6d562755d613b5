"""Times of the segments of a network on this device, by rows in the batch, learned from a short warm-up.

The router of exact sizes asks it whether dropping rows that have left saves more than it costs. What users see is measured
elsewhere.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from eectl.core.stopwatch import Stopwatch
from eectl.models.backbone import Hidden
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel

_MOST_ROUNDS = 5


@dataclass(frozen=True)
class SegmentTimes:
    """Times of the parts of a network, in seconds by number of rows n, from 0.

    `segments[k-1][n]` is segment k with its exit, `regroups[k-1][n]` moving n rows after it to where others left.
    """

    segments: tuple[tuple[float, ...], ...]
    regroups: tuple[tuple[float, ...], ...]

    def saved(self, number: int, *, rows: int, staying: int) -> float:
        """Return how much less time segment `number` (from 1) takes for `staying` rows than for `rows`."""
        table = self.segments[number - 1]
        return _read(table, rows) - _read(table, staying)

    def crowd(self, number: int, *, rows: int, among: int) -> float:
        """Return how much less time segment `number` (from 1) takes for `rows` rows as their share of a batch of `among`."""
        table = self.segments[number - 1]
        return _read(table, rows) - _read(table, among) * rows / among

    def regroup(self, number: int, *, moved: int) -> float:
        """Return how long it takes to drop rows after exit `number` (from 1) where `moved` others take their places."""
        return _read(self.regroups[number - 1], moved)


def _read(table: Sequence[float], rows: int) -> float:
    """Return the entry for `rows`; more than were measured cost in proportion."""
    last = len(table) - 1
    return table[rows] if rows <= last else table[last] * rows / max(last, 1)


@torch.inference_mode()
def learn_times(model: MultiExitModel, inputs: Tensor, *, seconds: float = 2.0) -> SegmentTimes:
    """Run parts of a batch through all exits, twice at least and then until `seconds` are over, and keep the shortest times.

    `inputs` is a batch of the size that the router will see. The network must be in eval mode.
    """
    counts = sorted({1, *(max(len(inputs) // part, 1) for part in (1, 2, 4, 16))})
    shortest: dict[tuple[str, int, int], float] = {}  # (what, exit, rows)
    started = time.perf_counter()
    for round_number in range(_MOST_ROUNDS):
        for count in counts:
            for key, lap in _one_pass(model, inputs[:count]).items():
                shortest[key] = min(shortest.get(key, np.inf), lap)
        if round_number and time.perf_counter() - started > seconds:
            break

    def table(what: str, number: int) -> tuple[float, ...]:
        return _fill({rows: lap for (kind, exit_number, rows), lap in shortest.items() if (kind, exit_number) == (what, number)})

    segments = [table("segment", number) for number in range(1, model.num_exits + 1)]
    return SegmentTimes(tuple(segments), tuple(table("regroup", number) for number in range(1, model.num_exits)))


def _one_pass(model: MultiExitModel, inputs: Tensor) -> dict[tuple[str, int, int], float]:
    """Return the seconds of each segment with its exit, and of half of the rows taking the places of the others after it."""
    hidden: Hidden | Tensor = inputs.clone()  # rows are moved in place
    earlier: list[ExitOutput | None] = []
    count, half = len(inputs), len(inputs) // 2
    gone = torch.arange(count, device=inputs.device) < half
    keys = []
    watch = Stopwatch(inputs.device)
    for number in range(1, model.num_exits + 1):
        hidden = model.advance(hidden, number)
        earlier.append(model.leave(hidden, number, earlier))
        watch.lap()
        gaps, order = gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]
        hidden.close_gaps(gaps, torch.cat([order[len(order) - half :], order[: len(order) - half]]))
        watch.lap()
        keys += [("segment", number, count), ("regroup", number, half)]
    times = watch.laps()
    return {key: after - before for key, before, after in zip(keys, [0.0, *times], times, strict=False)}


def _fill(points: Mapping[int, float]) -> tuple[float, ...]:
    """Return seconds for 0..the most rows, on straight lines between those measured; more rows never take less."""
    counts = sorted(points)
    rising = list(accumulate((points[count] for count in counts), max))
    return tuple(np.interp(np.arange(counts[-1] + 1), counts, rising).tolist())
