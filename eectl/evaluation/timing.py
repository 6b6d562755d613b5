"""Wall-clock time of a network in full and with early exits, on batches that are on the device, and the best it could be.

Every variant runs on the same batches in turn, several rounds; what is given are medians over rounds. All run as they would
in use, on a GPU as recorded programs: the plain backbone too. Reads no file, prints nothing, and chooses no threshold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import Tensor

from eectl.core.capture import Capture, recorder_for
from eectl.core.console import silent
from eectl.core.stopwatch import Stopwatch
from eectl.exits.fastest import is_static, router_for
from eectl.exits.full_pass import FullPass, PlainPass
from eectl.exits.policy import Policy
from eectl.exits.router import Answerer, Answers, rows_in_order
from eectl.exits.segment_times import learn_times
from eectl.exits.times import EARLY, FULL, EarlyExit, Latency, Speed, TimedRun
from eectl.models.backbone import Hidden
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel

MOST_ROUNDS, FEWEST_ROUNDS = 5, 3
FEWEST_BATCHES, FEWEST_ROWS = 2, 32  # whatever time they take: fewer have no mix of exits to speak of


@dataclass(frozen=True)
class _Pass:
    """One variant's run over the batches: seconds in all, and of each batch."""

    total: float
    batches: tuple[float, ...]


@torch.inference_mode()
def measure_speed(
    model: MultiExitModel,
    batches: Sequence[Tensor],
    policies: Mapping[float, Policy],
    *,
    cost_shares: Sequence[float],
    seconds: float,
    say: Callable[[str], None] = silent,
) -> Speed:
    """Time the network on full batches of one size, about `seconds` for the plain backbone; early exit under each policy.

    `policies` are by budget; `cost_shares[k-1]` is the cost of leaving at exit k in MACs, as a share of the plain backbone's. Of
    the batches as many are used as the time allows, and a few at least, in even steps. The network must be in eval mode. `say`
    is called with the line that says that a GPU could not record.
    """
    assert policies and len({len(batch) for batch in batches}) == 1
    size = len(batches[0])
    capture = Capture(recorder_for(batches[0].device), plain_calls=1, say=say)
    plain_pass = PlainPass(model.backbone, capture=capture)
    one = min(_run_each(plain_pass, batches[:1]).total for _ in range(4 if is_static(model) else 2))
    num_rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / one)))
    fewest = max(FEWEST_BATCHES, -(-FEWEST_ROWS // size))
    count = min(max(fewest, int(seconds / num_rounds / one)), len(batches))
    chosen = [batches[place] for place in np.linspace(0, len(batches) - 1, count).round().astype(int)]
    variants = _variants(model, plain_pass, policies, seconds=seconds, example=chosen[0], capture=capture)
    passes: dict[tuple[str, float], list[_Pass]] = {key: [] for key in variants}
    prefixes = []
    prefix_pass = _Prefixes(model, chosen[0], capture)
    everything: list[Callable[[Sequence[Tensor]], object]] = [*variants.values(), prefix_pass]
    for run in everything:
        for _ in range(2 if is_static(model) else 1):
            run(chosen if is_static(model) else chosen[:1])  # warm-up; in recorded programs of all sizes that will come
    for _ in range(num_rounds):
        for key, run in variants.items():
            passes[key].append(run(chosen))
        prefixes.append(prefix_pass(chosen))
    capture.close()
    rows = size * count
    prefix_seconds = tuple(median(each) / rows for each in zip(*prefixes, strict=True))
    runs = {key: _summary(each, rows) for key, each in passes.items()}
    plain = runs.pop(("plain", 0.0))
    full = runs.pop(("full", 0.0))
    left = {budget: _count(model, chosen, policy) for budget, policy in policies.items()}
    early = tuple(
        _early_exit(
            run,
            budget,
            refill=kind == "refill",
            left=left[budget],
            plain=plain.seconds,
            full=full.seconds,
            prefixes=prefix_seconds,
            cost_shares=cost_shares,
        )
        for (kind, budget), run in runs.items()
    )
    return Speed(size, rows, num_rounds, plain.seconds, prefix_seconds, plain, full, early)


def _variants(
    model: MultiExitModel,
    plain_pass: PlainPass,
    policies: Mapping[float, Policy],
    *,
    seconds: float,
    example: Tensor,
    capture: Capture,
) -> dict[tuple[str, float], Callable[[Sequence[Tensor]], _Pass]]:
    """Return the functions to time, by kind and budget."""
    full_pass = FullPass(model, next(iter(policies.values())), capture=capture)
    variants: dict[tuple[str, float], Callable[[Sequence[Tensor]], _Pass]] = {
        ("plain", 0.0): partial(_run_each, plain_pass),
        ("full", 0.0): partial(_run_each, full_pass),
    }
    several = len(example) > 1
    times = learn_times(model, example, seconds=seconds) if several and not is_static(model) else None
    for budget, policy in policies.items():
        router = router_for(model, policy, capture=capture, times=times)
        variants["exit", budget] = partial(_run_each, router)
        if several:
            variants["refill", budget] = partial(_run_refilling, router)
    return variants


def _run_each(run: Callable[[Tensor], object], batches: Sequence[Tensor]) -> _Pass:
    watch = Stopwatch(batches[0].device)
    for batch in batches:
        run(batch)
        watch.lap()
    ends = watch.laps()
    return _Pass(ends[-1], tuple(after - before for before, after in pairwise([0.0, *ends])))


def _run_refilling(router: Answerer, batches: Sequence[Tensor]) -> _Pass:
    """Time the stream; a batch's latency is the time from when it is taken to the last of its answers."""
    watch = Stopwatch(batches[0].device)
    events: list[int | Answers] = []

    def handing_in() -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            watch.lap()
            events.append(number)
            yield batch

    size = len(batches[0])
    for answers in router.stream(handing_in(), batch_size=size):
        watch.lap()
        events.append(answers)
    rows_in_order([each for each in events if isinstance(each, Answers)])
    watch.lap()
    *laps, end = watch.laps()
    started, ended = [0.0] * len(batches), [0.0] * len(batches)
    for lap, event in zip(laps, events, strict=True):
        if isinstance(event, int):
            started[event] = lap
        else:
            for number in set((event.rows // size).tolist()):
                ended[number] = lap
    return _Pass(end, tuple(after - before for before, after in zip(started, ended, strict=True)))


class _Prefixes:
    """Times the way to each exit, all segments and heads before it included and no decisions, on batches of one shape.

    Each segment with its exit is a program of its own, which reads what the one before left.
    """

    def __init__(self, model: MultiExitModel, example: Tensor, capture: Capture) -> None:
        self._model = model
        self._capture = capture
        self._inputs: Hidden | Tensor = torch.empty_like(example)
        self._hidden: list[Hidden] = []
        self._outputs: list[ExitOutput | None] = []
        self._programs = [self._capture.program(partial(self._run, number)) for number in range(1, model.num_exits + 1)]

    def __call__(self, batches: Sequence[Tensor]) -> list[float]:
        """Return the seconds from a batch's start to the end of each exit, summed over batches."""
        total = [0.0] * self._model.num_exits
        for batch in batches:
            watch = Stopwatch(batch.device)
            if self._capture.recorder is None:
                self._inputs = batch
            elif isinstance(self._inputs, Tensor):
                self._inputs.copy_(batch)
            self._hidden, self._outputs = [], []
            for program in self._programs:
                hidden, output = program()
                self._hidden.append(hidden)
                self._outputs.append(output)
                watch.lap()
            total = [so_far + lap for so_far, lap in zip(total, watch.laps(), strict=True)]
        return total

    def _run(self, number: int) -> tuple[Hidden, ExitOutput]:
        hidden = self._model.advance(self._hidden[-1] if self._hidden else self._inputs, number)
        return hidden, self._model.leave(hidden, number, tuple(self._outputs))


def _count(model: MultiExitModel, batches: Sequence[Tensor], policy: Policy) -> tuple[int, ...]:
    full_pass = FullPass(model, policy, capture=Capture(None))
    exits = torch.cat([full_pass(batch)[1] for batch in batches])
    return tuple(torch.bincount(exits, minlength=model.num_exits).tolist())


def _summary(passes: Sequence[_Pass], rows: int) -> TimedRun:
    seconds = median(each.total for each in passes) / rows
    pooled = [1000 * batch for each in passes for batch in each.batches]
    return TimedRun(seconds, 1 / seconds, Latency(*(float(each) for each in np.percentile(pooled, [50, 95, 99]))))


def _early_exit(
    run: TimedRun,
    budget: float,
    *,
    refill: bool,
    left: tuple[int, ...],
    plain: float,
    full: float,
    prefixes: Sequence[float],
    cost_shares: Sequence[float],
) -> EarlyExit:
    shares = [count / sum(left) for count in left]
    mac_ideal = plain * sum(share * cost for share, cost in zip(shares, cost_shares, strict=True))
    reachable = sum(share * prefix for share, prefix in zip(shares, prefixes, strict=True))
    return EarlyExit(
        run.seconds,
        run.rows_per_second,
        run.latency_ms,
        budget,
        refill,
        left,
        speed_up=plain / run.seconds,
        mac_ideal_seconds=mac_ideal,
        reachable_seconds=reachable,
        of_mac_ideal=mac_ideal / run.seconds,
        of_reachable=reachable / run.seconds,
        early_share=1 - shares[-1],
        break_even=break_even(shares, prefixes, plain=plain, overhead=run.seconds - reachable),
        mode=FULL if full < run.seconds else EARLY,
    )


def break_even(shares: Sequence[float], prefixes: Sequence[float], *, plain: float, overhead: float) -> float | None:
    """Return the share e of rows that must leave early for early exit to take the plain backbone's time; None: none would do.

    Solves e · (mean prefix of the early leavers) + (1 − e) · (last prefix) + overhead = plain, all in seconds per row, for the
    mix of early leavers that `shares` has; 0 where even without them it is no slower. None too where no row leaves early.
    """
    early = sum(shares[:-1])
    if not early:
        return None
    mean = sum(share * prefix for share, prefix in zip(shares[:-1], prefixes[:-1], strict=True)) / early
    to_gain = prefixes[-1] + overhead - plain
    if to_gain <= 0:
        return 0.0
    if to_gain > prefixes[-1] - mean:
        return None
    return to_gain / (prefixes[-1] - mean)
