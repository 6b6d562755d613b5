"""What the segments of a network cost in time on this device, by rows in the batch, learned from a short warm-up.

The router asks it whether dropping rows that have left saves more than it costs. What users see is measured elsewhere.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from eectl.models.backbone import Hidden
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel
from eectl.stopwatch import Stopwatch

_MOST_ROUNDS = 5


@dataclass(frozen=True)
class StageTimes:
    """Seconds by number of rows n, from 0.

    `segments[k-1][n]` is segment k with its exit, `regroups[k-1][n]` keeping n rows after it.
    """

    segments: tuple[tuple[float, ...], ...]
    regroups: tuple[tuple[float, ...], ...]

    def saved(self, number: int, *, rows: int, staying: int) -> float:
        """What segment `number` (from 1) takes less for `staying` rows than for `rows`."""
        table = self.segments[number - 1]
        return _read(table, rows) - _read(table, staying)

    def regroup(self, number: int, *, staying: int) -> float:
        """What it takes to keep `staying` rows after exit `number` (from 1) and drop the others."""
        return _read(self.regroups[number - 1], staying)


def _read(table: Sequence[float], rows: int) -> float:
    """The entry for `rows`; more than were measured cost in proportion."""
    last = len(table) - 1
    return table[rows] if rows <= last else table[last] * rows / last


@torch.inference_mode()
def learn_times(model: MultiExitModel, inputs: Tensor, *, seconds: float = 2.0) -> StageTimes:
    """Run parts of a batch through all exits, twice at least and then until `seconds` are over, and keep the shortest times.

    `inputs` is a batch of the size that the router will see. The network must be in eval mode.
    """
    counts = sorted({1, *(max(len(inputs) // part, 1) for part in (1, 2, 4, 16))})
    best = [[[np.inf] * len(counts) for _ in range(model.num_exits)] for _ in range(2)]  # [segments, regroups][exit][count]
    started = time.perf_counter()
    for round_number in range(_MOST_ROUNDS):
        for place, count in enumerate(counts):
            for kind, laps in enumerate(_one_pass(model, inputs[:count])):
                for row, lap in zip(best[kind], laps, strict=False):
                    row[place] = min(row[place], lap)
        if round_number and time.perf_counter() - started > seconds:
            break
    segments, regroups = ([_fill(counts, row) for row in table if np.isfinite(row).all()] for table in best)
    return StageTimes(tuple(segments), tuple(regroups))


def _one_pass(model: MultiExitModel, inputs: Tensor) -> tuple[list[float], list[float]]:
    """Seconds of each segment with its exit, and of regrouping all rows after each but the last."""
    watch = Stopwatch(inputs.device)
    hidden: Hidden | Tensor = inputs
    earlier: list[ExitOutput | None] = []
    here = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    for number in range(1, model.num_exits + 1):
        hidden = model.advance(hidden, number)
        earlier.append(model.leave(hidden, number, earlier))
        watch.lap()
        hidden = hidden.take(here.nonzero()[:, 0]) if number < model.num_exits else hidden
        watch.lap()
    times = watch.laps()
    laps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    return laps[::2], laps[1:-1:2]


def _fill(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Seconds for 0..max(counts) rows on straight lines between those measured; more rows never take less."""
    rising = list(accumulate(seconds, max))
    return tuple(np.interp(np.arange(counts[-1] + 1), counts, rising).tolist())
