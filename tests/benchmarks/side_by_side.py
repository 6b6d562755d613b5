"""What do several trainings on one machine take from each other? Alone and side by side, by how many threads and how they wait.

Each is `eectl train` on the digits in a process of its own. A thread without work that spins uses CPU time that nobody has
anything from: `cpu_seconds_each` shows it on a busy machine too, where the clock shows little.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, interleave, options, report, summary

VARIANTS = {
    "as eectl sets it": {},
    "as OpenMP has it": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},  # GNU's and LLVM's defaults
    "sleeps at once": {"OMP_WAIT_POLICY": "passive"},
    "one thread each": {"OMP_NUM_THREADS": "1"},
}
NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def train(count: int, chosen, variables: dict[str, str]) -> float:
    """Start so many trainings at once and wait for all; the CPU seconds of one."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment = {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **variables}
    changes = [f"data.limit={100 if chosen.quick else 600}", *(["data.image_size=8"] if chosen.quick else [])]
    words = ["train", "digits", "--regime", "joint", "--epochs", "1", "--device", chosen.device, "-q"]
    words += [word for change in changes for word in ("--set", change)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as name:
        lines = [[sys.executable, "-m", "eectl", *words, "-o", str(Path(name) / f"{number}")] for number in range(count)]
        running = [
            subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for line in lines
        ]
        for process in running:
            _, error = process.communicate()
            if process.returncode:
                sys.exit(f"eectl train ended with {process.returncode}: {error[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=2,
        processes={"type": int, "default": 6, "help": "side by side (default 6)"},
        variants={"nargs": "*", "choices": list(VARIANTS), "default": list(VARIANTS)},
    )  # fmt: skip
    cpu: dict[str, list[float]] = {}

    def timed(name: str, count: int) -> float:
        started = time.perf_counter()
        cpu.setdefault(name, []).append(train(count, chosen, VARIANTS[name.split(", ")[1]]))
        return time.perf_counter() - started

    names = {f"{count}, {variant}": count for count in (1, chosen.processes) for variant in chosen.variants}
    functions = {name: (lambda name=name, count=count: timed(name, count)) for name, count in names.items()}
    samples = interleave(functions, repeats=chosen.repeats)
    results = {
        "seconds": {name: summary(each) for name, each in samples.items()},
        "cpu_seconds_each": {name: summary(each[1:]) for name, each in cpu.items()},
    }
    return report("side_by_side", chosen, results)


if __name__ == "__main__":
    main()
