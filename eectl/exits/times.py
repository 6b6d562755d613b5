"""What leaving at each exit costs in time, from the file that `eectl bench` writes: read and checked. Measures nothing."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eectl.core.errors import EectlError, lookup
from eectl.core.files import read_as
from eectl.exits.bench_file import KIND, SCHEMA
from eectl.exits.policy import COSTS

BENCH = "bench.json"

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class CostTable:
    """What a row costs that leaves at each exit, and the plain backbone: MACs, or nanoseconds that were `measured` somewhere."""

    exits: tuple[int, ...]
    plain: int
    measured: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostRequest:
    """The cost that the user asked for, an entry of COSTS; for latency perhaps the batch size."""

    name: str
    batch_size: int | None = None


def parse_cost(text: str) -> CostRequest:
    """`macs`, `latency` or `latency:32`; raises EectlError for anything else."""
    name, colon, size = text.partition(":")
    lookup(COSTS, name, what="cost")
    if not colon:
        return CostRequest(name)
    if name != "latency" or not (size.isascii() and size.isdecimal() and int(size)):
        raise EectlError(
            f"--cost {text}: write macs, latency, or latency:BATCH with a batch size that was measured, as latency:32"
        )
    return CostRequest(name, int(size))


@dataclass(frozen=True)
class _Measured:
    """Seconds per row in full batches: of the plain backbone, and of a row that leaves at each exit."""

    batch_size: int
    plain_seconds: _Seconds
    prefix_seconds: tuple[_Seconds, ...]


@dataclass(frozen=True)
class _Bench:
    """What is needed of a bench file; `checkpoint` is a weights' digest."""

    checkpoint: str
    device: str
    threads: int
    measured: tuple[_Measured, ...]


def read_times(path: Path, *, batch_size: int | None, checkpoint: str, num_exits: int, name: Path) -> CostTable:
    """The times in a bench file as whole nanoseconds per row, made to rise with the exit where noise made one fall.

    `checkpoint` is the digest of the network at `name`; without a batch size the file must have just one. Raises EectlError for
    a file that is missing, cut, another checkpoint's, or without that batch size.
    """
    again = f"eectl bench {name} -o {path}"
    if not path.exists():
        raise EectlError(f"{path}: there are no measured times; run {again}, or name a file with --bench")
    bench = read_as(_Bench, path, kind=KIND, schema=SCHEMA, again=again)
    if bench.checkpoint != checkpoint:
        raise EectlError(
            f"{path} was measured with another checkpoint ({bench.checkpoint[:12]}…, {name} is {checkpoint[:12]}…); run {again}"
        )
    found = _of_size(bench, batch_size, path=path, again=again)
    if len(found.prefix_seconds) != num_exits:
        raise EectlError(f"{path}: times of {len(found.prefix_seconds)} exits, the network has {num_exits}; run {again}")
    measured = [_nanoseconds(each) for each in found.prefix_seconds]
    rising = tuple(accumulate(measured, max))
    raised = [str(number) for number, (own, made) in enumerate(zip(measured, rising, strict=True), 1) if own != made]
    notes: tuple[str, ...] = ()
    if raised:
        exits = f"exit{'s' * (len(raised) > 1)} {', '.join(raised)}"
        notes = (f"{path}: {exits} measured faster than an exit before, which is noise; taken to cost as much as that one",)
    where = f"{bench.device}, {bench.threads} thread{'s' * (bench.threads != 1)}, batches of {found.batch_size}"
    return CostTable(rising, _nanoseconds(found.plain_seconds), where, notes)


def _of_size(bench: _Bench, batch_size: int | None, *, path: Path, again: str) -> _Measured:
    sizes = [each.batch_size for each in bench.measured]
    there = ", ".join(map(str, sizes)) or "none"
    if batch_size is None and len(sizes) == 1:
        return bench.measured[0]
    if batch_size is None and sizes:
        raise EectlError(f"{path} has times at batch sizes {there}; pick one, as in --cost latency:{sizes[0]}")
    if batch_size not in sizes:
        wanted = "" if batch_size is None else f" at batch size {batch_size}"
        size = "" if batch_size is None else f" --batch-size {batch_size}"
        raise EectlError(f"{path} has no times{wanted}, it has {there}; run {again}{size}")
    return bench.measured[sizes.index(batch_size)]


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))
