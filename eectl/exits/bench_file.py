"""What a bench hands over, as plain data, and its JSON. Nothing is measured and nothing is printed here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KIND, SCHEMA = "bench", 1


@dataclass(frozen=True)
class Latency:
    """Percentiles of the time from a batch's start to its last answer, in ms, over all rounds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Run:
    """How fast something ran: seconds per row (the median round's), rows per second, and latency of a batch."""

    seconds: float
    rows_per_second: float
    latency_ms: Latency


@dataclass(frozen=True)
class EarlyExit(Run):
    """Early exit under a budget's policy; with `refill`, survivors of several batches are put together into full ones.

    `left[k]` counts the rows that leave at exit k+1. Two yardsticks, in seconds per row: `mac_ideal_seconds` is the plain
    backbone's time × the mean cost in MACs as a share of its own, `reachable_seconds` the mean of each row's prefix time on full
    batches. `of_mac_ideal` and `of_reachable` are the shares of those speeds that were reached. `break_even` is the share of rows
    that would have to leave early, at the same exits in the same proportion, for early exit to take the plain backbone's time:
    None where no share would do, or no row leaves early; `early_share` is the share that does.
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


@dataclass(frozen=True)
class Speed:
    """Times at one batch size, in seconds per row of full batches.

    `plain_seconds` is the backbone without exits; `prefix_seconds[k-1]` a row that leaves at exit k: segments up to it and all
    heads passed, without the decisions. `full` runs all exits and then decides.
    """

    batch_size: int
    num_rows: int
    num_rounds: int
    plain_seconds: float
    prefix_seconds: tuple[float, ...]
    plain: Run
    full: Run
    early_exit: tuple[EarlyExit, ...]


@dataclass(frozen=True)
class Bench:
    """What was measured, and on what: `checkpoint` is a weights' digest, `out_of_reach` the budgets without thresholds.

    Inputs were on the device and normalised, in float32, and `channels_last` where that is said.
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

    def to_json(self) -> Mapping[str, Any]:
        """The bench file's content: JSON-able data with its kind and schema number."""
        return {"kind": KIND, "schema": SCHEMA, **asdict(self)}
