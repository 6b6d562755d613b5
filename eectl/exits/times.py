"""The file of times that `eectl bench` writes: what it holds, and what leaving at each exit costs in time by it.

Measures nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eectl.core.errors import EectlError, lookup
from eectl.core.json_files import read_as, sealed
from eectl.core.kinds import Natural, Text
from eectl.core.numbers import whole_number
from eectl.core.precision import FLOAT32
from eectl.exits.policy import COSTS, CostTable

EARLY, FULL = "early exit", "full pass"  # the ways to a policy's answers: rows stop, or all exits run and one is chosen
BENCH, BENCH_KIND, BENCH_SCHEMA = "bench.json", "bench", 1

_Seconds = Annotated[float, Field(gt=0, le=1e6)]  # of a row: 11 days


@dataclass(frozen=True)
class Latency:
    """Percentiles of the time from a batch's start to its last answer, in ms, over all rounds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class TimedRun:
    """The speed of a run: seconds per row (the median round's), rows per second, and latency of a batch."""

    seconds: float
    rows_per_second: float
    latency_ms: Latency


@dataclass(frozen=True)
class EarlyExit(TimedRun):
    """Early exit under a budget's policy; with `refill`, survivors of several batches are put together into full ones.

    `left[k]` counts the rows that leave at exit k+1. Two yardsticks, in seconds per row: `mac_ideal_seconds` is the plain
    backbone's time × the mean cost in MACs as a share of its own, `reachable_seconds` the mean of each row's prefix time on full
    batches. `of_mac_ideal` and `of_reachable` are the shares of those speeds that were reached. `break_even` is the share of rows
    that would have to leave early, at the same exits in the same proportion, for early exit to take the plain backbone's time:
    None where no share would do, or no row leaves early; `early_share` is the share that does. `mode` is the faster way to the
    same answers, EARLY or FULL.
    """

    budget: float
    refill: bool
    left: tuple[int, ...]
    speed_up: float
    mac_ideal_seconds: float
    reachable_seconds: float
    of_mac_ideal: float
    of_reachable: float
    early_share: float
    break_even: float | None
    mode: str = EARLY


@dataclass(frozen=True)
class Speed:
    """Times at one batch size, in seconds per row of full batches.

    `plain_seconds` is the backbone without exits; `prefix_seconds[k-1]` a row that leaves at exit k: segments up to it and all
    heads passed, without the decisions. `full` runs all exits and then decides. `channels_last` says how maps lay in memory.
    """

    batch_size: int
    num_rows: int
    num_rounds: int
    plain_seconds: float
    prefix_seconds: tuple[float, ...]
    plain: TimedRun
    full: TimedRun
    early_exit: tuple[EarlyExit, ...]
    channels_last: bool = False


@dataclass(frozen=True)
class Bench:
    """The times that were measured, and on what.

    `checkpoint` is the digest of the weights, `out_of_reach` has the budgets without thresholds. Inputs were on the device and
    normalised, and `channels_last` where that is said; the network computed in `precision`.
    """

    checkpoint: str
    device: str
    threads: int
    channels_last: bool
    task: str
    criterion: str
    split: str
    num_rows: int
    seed: int
    out_of_reach: tuple[float, ...]
    versions: Mapping[str, str]
    measured: tuple[Speed, ...]
    precision: str = FLOAT32

    def to_json(self) -> Mapping[str, Any]:
        """Return the bench file's content: JSON-able data with its kind, schema number and digest."""
        return sealed({"kind": BENCH_KIND, "schema": BENCH_SCHEMA, **asdict(self)})


@dataclass(frozen=True)
class CostRequest:
    """The cost that the user asked for: an entry of COSTS and, of latency, perhaps the batch size."""

    name: str
    batch_size: int | None = None


def parse_cost(text: str) -> CostRequest:
    """Return what `macs`, `latency` or `latency:32` asks for; raises EectlError for anything else."""
    name, colon, size = text.partition(":")
    lookup(COSTS, name, what="cost")
    if not colon:
        return CostRequest(name)
    rows = whole_number(size, least=1)
    if name != "latency" or rows is None:
        raise EectlError(
            f"--cost {text}: write macs, latency, or latency:BATCH with a batch size that was measured, as latency:32"
        )
    return CostRequest(name, rows)


@dataclass(frozen=True)
class _Measured:
    """Seconds per row in full batches: of the plain backbone, and of a row that leaves at each exit."""

    batch_size: Natural
    plain_seconds: _Seconds
    prefix_seconds: tuple[_Seconds, ...]


@dataclass(frozen=True)
class _Bench:
    """The part of a bench file that costs are made of; `checkpoint` is a weights' digest."""

    checkpoint: Text
    device: Text
    threads: Natural
    measured: Annotated[tuple[_Measured, ...], Field(max_length=10_000)]
    precision: Text = FLOAT32


def read_times(
    path: Path,
    request: CostRequest,
    *,
    batch_size: int | None,
    checkpoint: str,
    num_exits: int,
    precision: str,
    name: Path,
) -> tuple[CostTable, list[str]]:
    """Return the times in a bench file as whole nanoseconds per row, and notes on what was made of them.

    They are made to rise with the exit where noise made one fall.

    Args:
        path: The bench file.
        request: What the user asked for. Without a batch size in it, the file must have just one, or that of `batch_size`.
        batch_size: How many rows the user evaluates at once, if that was said.
        checkpoint: The digest of the network's weights.
        num_exits: How many exits it has, its own head included.
        precision: What the scores are computed in.
        name: Where it lies, for messages.

    Raises:
        EectlError: the file is missing, cut, another checkpoint's, or without that batch size.
    """
    again = f"eectl bench {name} -o {path}"
    if not path.exists():
        raise EectlError(f"{path}: there are no measured times; run {again}, or name a file with --bench")
    bench = read_as(_Bench, path, kind=BENCH_KIND, schema=BENCH_SCHEMA, again=again)
    if bench.checkpoint != checkpoint:
        raise EectlError(
            f"{path} was measured with another checkpoint ({bench.checkpoint[:12]}…, {name} is {checkpoint[:12]}…); run {again}"
        )
    found = _of_size(bench, request.batch_size, batch_size, path=path, again=again)
    if len(found.prefix_seconds) != num_exits:
        raise EectlError(f"{path}: times of {len(found.prefix_seconds)} exits, the network has {num_exits}; run {again}")
    measured = [_nanoseconds(each) for each in found.prefix_seconds]
    rising = tuple(accumulate(measured, max))
    raised = [str(number) for number, (own, made) in enumerate(zip(measured, rising, strict=True), 1) if own != made]
    notes = []
    if raised:
        exits = f"exit{'s' * (len(raised) > 1)} {', '.join(raised)}"
        notes = [f"{path}: {exits} measured faster than an exit before, which is noise; taken to cost as much as that one"]
    if bench.precision != precision:
        notes.append(
            f"{path} was measured in {bench.precision}, and scores are computed in {precision} here, which takes another time; "
            f"for its times run {again} --precision {precision}"
        )
    where = f"{bench.device}, {bench.threads} thread{'s' * (bench.threads != 1)}, batches of {found.batch_size}"
    where += "" if bench.precision == FLOAT32 else f", {bench.precision}"
    return CostTable(rising, _nanoseconds(found.plain_seconds), "latency", where), notes


def _of_size(bench: _Bench, asked: int | None, in_use: int | None, *, path: Path, again: str) -> _Measured:
    """Return the times at the batch size that was `asked` for; else the only ones there are; else those at the size `in_use`."""
    by_size = {each.batch_size: each for each in bench.measured}
    there = ", ".join(map(str, by_size)) or "none"
    if asked is None and by_size:
        if len(by_size) > 1 and in_use not in by_size:
            pick = f"--cost latency:{next(iter(by_size))}"
            raise EectlError(f"{path} has times at batch sizes {there}; pick one, as in {pick}, or with --batch-size")
        return by_size[in_use] if in_use in by_size else bench.measured[0]
    if asked not in by_size:
        wanted, size = ("", "") if asked is None else (f" at batch size {asked}", f" --batch-size {asked}")
        raise EectlError(f"{path} has no times{wanted}, it has {there}; run {again}{size}")
    return by_size[asked]


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))
