"""Child processes within bounds, some at a time, each of which leaves a verdict. What they do is the business of others.

A child is forked, so it imports nothing again, and whatever it does to itself ends with it.
"""

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CPU_SECONDS = 5  # beyond what is usual
MEMORY = 2**30  # beyond what is usual
GUARD = 4 * 2**30  # no child may have more than this beyond its parent
FILE_SIZE = 2**28
WALL_SECONDS = 120
MUCH_CPU = 60.0  # where nothing is known yet

Task = TypeVar("Task")


@dataclass(frozen=True)
class Usage:
    """What a child takes: seconds of CPU, and bytes of memory at its height."""

    seconds: float
    memory: int


@dataclass
class Verdict:
    """How a line ended.

    Attributes:
        code: its exit code; None: it did not end as a program does.
        answer: what it gave.
        faults: where it broke the law.
        said: the end of its stderr.
        usage: what it took.
    """

    code: int | None
    answer: Any = None
    faults: list[str] = field(default_factory=list)
    said: str = ""
    usage: Usage = Usage(0.0, 0)


@dataclass(frozen=True)
class Child:
    """A running child: its number, where its verdict will lie, and what is usual (None: not known)."""

    number: int
    report: Path
    usual: Usage | None


def start_child(work: Callable[[], Verdict], *, report: Path, usual: Usage | None = None) -> Child:
    """Start a child that runs `work` within bounds and leaves its verdict in the file `report`."""
    number = os.fork()
    if number:
        return Child(number, report, usual)
    try:
        _bound(int((usual.seconds if usual else MUCH_CPU) + CPU_SECONDS) + 1)
        verdict = asdict(work())
        report.write_text(json.dumps(verdict))
        os._exit(0)
    except BaseException:  # a child must never go on with what its parent does
        report.with_suffix(".crash").write_text(traceback.format_exc())
    finally:
        os._exit(70)


def _bound(seconds: int) -> None:
    """Bound this process, and give it nothing to read from."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + GUARD, data + GUARD))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def run_all(tasks: Iterable[Task], start: Callable[[Task], Child], *, jobs: int) -> Iterator[tuple[Task, Verdict]]:
    """Start a child for each task, `jobs` at a time; gives each task with its verdict as it ends."""
    waiting, running = list(tasks)[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            child = start(task)
            running[os.pidfd_open(child.number)] = (task, child, time.monotonic())
        ready, _, _ = select.select(list(running), [], [], 1)
        for _, child, began in (each for handle, each in running.items() if handle not in ready):
            if time.monotonic() - began > WALL_SECONDS:
                os.kill(child.number, signal.SIGKILL)
        for handle in ready:
            task, child, _ = running.pop(handle)
            os.close(handle)
            yield task, _verdict(child)


def _verdict(child: Child) -> Verdict:
    """Return the verdict of a child that has ended, with what it took."""
    _, status, used = os.wait4(child.number, 0)
    usage = Usage(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
    code, crash = os.waitstatus_to_exitcode(status), child.report.with_suffix(".crash")
    if child.report.exists():
        said = json.loads(child.report.read_text())
        verdict = Verdict(**said | {"usage": usage})
    else:
        how = (
            crash.read_text()
            if crash.exists()
            else "it ran for too long"
            if code in (-signal.SIGXCPU, -signal.SIGKILL)
            else "it died"
        )
        verdict = Verdict(None, faults=[f"ended with {code}: {how}"], usage=usage)
    child.report.unlink(missing_ok=True)
    crash.unlink(missing_ok=True)
    if child.usual is not None and usage.seconds > child.usual.seconds + CPU_SECONDS:
        verdict.faults.append(f"took {usage.seconds:.1f} s of CPU, {child.usual.seconds:.1f} s is usual")
    if child.usual is not None and usage.memory > child.usual.memory + MEMORY:
        verdict.faults.append(f"took {usage.memory / 2**20:.0f} MB, {child.usual.memory / 2**20:.0f} MB is usual")
    return verdict
