"""Wall-clock time of a network in full and with early exits, on batches that are on the device, and the best it could be.

Every variant runs on the same batches in turn, several rounds; what is given are medians over rounds. Reads no file, prints
nothing, and chooses no threshold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import Tensor

from eectl.core.stopwatch import Stopwatch
from eectl.exits.policy import Policy, choose
from eectl.exits.router import Answers, Router, rows_in_order
from eectl.exits.segment_times import learn_times
from eectl.exits.times import EarlyExit, Latency, Speed, TimedRun
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
) -> Speed:
    """Time the network on full batches of one size, about `seconds` for the plain backbone; early exit under each policy.

    `policies` are by budget; `cost_shares[k-1]` is the cost of leaving at exit k in MACs, as a share of the plain backbone's. Of
    the batches as many are used as the time allows, and a few at least, in even steps. The network must be in eval mode.
    """
    assert policies and len({len(batch) for batch in batches}) == 1
    size = len(batches[0])
    first, second = (_run_each(model.backbone, batches[:1]) for _ in range(2))
    one = min(first.total, second.total)
    num_rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / one)))
    fewest = max(FEWEST_BATCHES, -(-FEWEST_ROWS // size))
    count = min(max(fewest, int(seconds / num_rounds / one)), len(batches))
    chosen = [batches[place] for place in np.linspace(0, len(batches) - 1, count).round().astype(int)]
    variants = _variants(model, policies, batch_size=size, seconds=seconds, example=chosen[0])
    passes: dict[tuple[str, float], list[_Pass]] = {key: [] for key in variants}
    prefixes = []
    for run in variants.values():
        run(chosen[:1])  # warm-up
    for _ in range(num_rounds):
        for key, run in variants.items():
            passes[key].append(run(chosen))
        prefixes.append(_time_prefixes(model, chosen))
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
            prefixes=prefix_seconds,
            cost_shares=cost_shares,
        )
        for (kind, budget), run in runs.items()
    )
    return Speed(size, rows, num_rounds, plain.seconds, prefix_seconds, plain, full, early)


def _variants(
    model: MultiExitModel, policies: Mapping[float, Policy], *, batch_size: int, seconds: float, example: Tensor
) -> dict[tuple[str, float], Callable[[Sequence[Tensor]], _Pass]]:
    """Return the functions to time, by kind and budget."""
    some = next(iter(policies.values()))
    criterion = some.criterion

    def in_full(inputs: Tensor) -> Tensor:
        logits = [output.logits for output in model(inputs) if output is not None]
        scores = [criterion.score(each, logits[:index]) for index, each in enumerate(logits)]
        return choose(torch.stack(scores), some.thresholds)

    variants: dict[tuple[str, float], Callable[[Sequence[Tensor]], _Pass]] = {
        ("plain", 0.0): lambda batches: _run_each(model.backbone, batches),
        ("full", 0.0): lambda batches: _run_each(in_full, batches),
    }
    times = learn_times(model, example, seconds=seconds) if batch_size > 1 else None
    for budget, policy in policies.items():
        router = Router(model, policy, times=times)
        variants["exit", budget] = lambda batches, router=router: _run_each(router, batches)  # type: ignore[misc]
        if batch_size > 1:
            variants["refill", budget] = lambda batches, router=router: _run_refilling(router, batches)  # type: ignore[misc]
    return variants


def _run_each(run: Callable[[Tensor], object], batches: Sequence[Tensor]) -> _Pass:
    watch = Stopwatch(batches[0].device)
    for batch in batches:
        run(batch)
        watch.lap()
    ends = watch.laps()
    return _Pass(ends[-1], tuple(after - before for before, after in pairwise([0.0, *ends])))


def _run_refilling(router: Router, batches: Sequence[Tensor]) -> _Pass:
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


def _time_prefixes(model: MultiExitModel, batches: Sequence[Tensor]) -> list[float]:
    """Return the seconds from a batch's start to the end of each exit, all segments and heads before it included.

    They are summed over batches.
    """
    total = [0.0] * model.num_exits
    for batch in batches:
        watch = Stopwatch(batch.device)
        hidden: Hidden | Tensor = batch
        earlier: list[ExitOutput | None] = []
        for number in range(1, model.num_exits + 1):
            hidden = model.advance(hidden, number)
            earlier.append(model.leave(hidden, number, earlier))
            watch.lap()
        total = [so_far + lap for so_far, lap in zip(total, watch.laps(), strict=True)]
    return total


def _count(model: MultiExitModel, batches: Sequence[Tensor], policy: Policy) -> tuple[int, ...]:
    router = Router(model, policy)
    exits = torch.cat([router(batch)[1] for batch in batches])
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
