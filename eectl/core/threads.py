"""How many threads torch takes on CPUs, and how they wait: settled in the environment, before torch is imported and reads it.

What the user has set stays as it is. Of torch's own choice, the CPUs that this process may run on, only what it cannot know is
taken away: a container's quota and a job's share. Nothing here depends on how busy the machine is, as results do depend on the
number of threads, in their last bits.
"""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# A thread without work spins for so long and then sleeps. GNU's OpenMP, which torch's wheels bring, spins for milliseconds by
# default: where processes share CPUs that takes them from threads that have work. 1000 turns are some 0.05 ms, longer than most
# pauses between two operations. Intel's and LLVM's is told in ms.
SHORT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def settle_threads(environment: MutableMapping[str, str], *, root: Path = Path("/")) -> None:
    """Set what OpenMP reads at its start, where the user has not.

    Args:
        environment: the process's variables.
        root: where `proc` and `sys` are.
    """
    if not any(environment.get(name) for name in NUMBERS):
        usable, allowed = _usable_cpus(), _allowed_cpus(environment, root)
        if allowed is not None and allowed < usable:
            environment["OMP_NUM_THREADS"] = str(allowed)
    if not any(environment.get(name) for name in WAITING):
        environment.update(SHORT)


def _usable_cpus() -> int:
    """Return the number of CPUs that this process may run on; torch counts them too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allowed_cpus(environment: MutableMapping[str, str], root: Path) -> int | None:
    """Return the CPUs' worth of time that a container's quota or a SLURM job gives, rounded down to 1 or more; None: no limit."""
    limits = [int(quota) for quota in _quotas(root)]
    share = environment.get("SLURM_CPUS_PER_TASK", "")
    if share.isascii() and share.isdecimal():
        limits.append(int(share))
    return max(min(limits), 1) if limits else None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of this process's control groups and those around them, in CPUs; version 2 and version 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        base = root / "sys/fs/cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            base = next((base / name for name in (controllers, "cpu") if (base / name).is_dir()), base)
        inner = base / group.strip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            if controllers:
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:
                words = _read(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # else -1, max, or no such file
                yield int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
