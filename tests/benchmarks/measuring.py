"""What the benchmarks share: interleaved timing, a child process's time and memory, arguments, the JSON file.

No torch at import, so that a benchmark of start-up or memory stays small itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine

ROOT = Path(__file__).parents[2]
SCHEMA = 1
Samples = dict[str, list[float]]

# Runs eectl as its entry point does and writes, at exit, what only the process itself knows.
CHILD = """import atexit, json, resource, sys
def note(path=sys.argv.pop(1)):
    try:
        lines = open("/proc/self/status").read().splitlines()
        peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"peak_bytes": peak, "modules": sorted({name.split(".")[0] for name in sys.modules})}
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        found["gpu_peak_bytes"] = sys.modules["torch"].cuda.max_memory_allocated()
    json.dump(found, open(path, "w"))
atexit.register(note)
"""
EECTL = CHILD + "from eectl.cli.app import main\nmain()\n"


def interleave(functions: Mapping[str, Callable[[], Any]], *, repeats: int, wait: Callable[[], object] = lambda: None) -> Samples:
    """Seconds of each function, a warm-up of each first and then A B A B …; `wait` lets the device finish.

    A function may return its own seconds (a float), where not all that it does is to be timed.
    """
    samples: Samples = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            wait()
            started = time.perf_counter()
            own = function()
            wait()
            seconds = own if isinstance(own, float) else time.perf_counter() - started
            if turn:
                samples[name].append(seconds)
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    return {"median": median(samples), "min": min(samples), "max": max(samples), "n": len(samples)}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of samples that were taken side by side."""
    return median(a / b for a, b in zip(above, below, strict=True))


def run_child(code: str, words: Sequence[str], *, cwd: Path | None = None, **variables: str) -> dict[str, Any]:
    """Run Python `code` that begins with CHILD in a process of its own: seconds, peak memory and top-level modules.

    `peak_bytes` is the largest resident set of that process alone, not of processes that it starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        started = time.perf_counter()
        done = run([sys.executable, "-c", code, str(notes), *words], cwd=cwd, **variables)
        return {"seconds": time.perf_counter() - started, "stdout": done.stdout, **json.loads(notes.read_text())}


def run(line: Sequence[str], *, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds this checkout's eectl; ends the benchmark with its last words where it fails."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **variables})
    if done.returncode:
        sys.exit(f"{' '.join(line[-6:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def options(about: str, arguments: Sequence[str] | None, *, repeats: int, **more: dict[str, Any]) -> argparse.Namespace:
    """The options that all benchmarks have, and `more` of one's own (name=keywords of add_argument)."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; the numbers mean nothing")
    parser.add_argument("--repeats", type=int, help=f"interleaved repeats (default {repeats})")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    chosen = parser.parse_args(arguments)
    chosen.repeats = chosen.repeats or (1 if chosen.quick else repeats)
    return chosen


def begin(chosen: argparse.Namespace) -> Any:
    """The torch device of a benchmark that computes in this process, threads set; and what waits for it."""
    import torch

    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    return device, (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def report(name: str, chosen: argparse.Namespace, results: Mapping[str, Any]) -> dict[str, Any]:
    """Print, and write where asked, what was measured; returns it."""
    whole = keep(name, chosen, results)
    print(json.dumps(whole, indent=2) if chosen.json else "\n".join(_lines(results)))
    return whole


def keep(name: str, chosen: argparse.Namespace, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write, where asked, what was measured so far; returns it."""
    settings = {"device": chosen.device, "quick": chosen.quick, "repeats": chosen.repeats}
    whole = {"benchmark": name, "schema": SCHEMA, "settings": settings, "machine": machine(), "results": results}
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(whole, indent=2) + "\n")
    return whole


def _lines(value: Mapping[str, Any], before: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += _lines(item, f"{before}{key} / ")
        else:
            lines.append(f"{before}{key}: {f'{item:.4g}' if isinstance(item, float) else item}")
    return lines
