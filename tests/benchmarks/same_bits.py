"""Does the same seed give the same bits? Two runs with `deterministic: true`, and one that is killed and resumed.

The program itself trains the digits, each run in a process of its own. The last is killed (signal 9) whenever it has saved its
state anew, and started again with --resume until it is done. The weights are compared bit by bit.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import options, report, run

QUICK = ["data.limit=100", "data.image_size=8"]


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=1,
        recipe={"default": "digits", "help": "what is trained (default digits)"},
        regime={"default": "mixed", "help": "how (default mixed)"}, epochs={"type": int, "default": 4},
        kills={"type": int, "default": 2, "help": "how often the last run is killed at most (default 2)"},
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipe, such as deterministic=false"},
    )  # fmt: skip
    changes = ["deterministic=true", *(QUICK if chosen.quick else []), *(chosen.set or ())]
    words = ["train", chosen.recipe, "--regime", chosen.regime, "--epochs", str(chosen.epochs), "--seed", "3", "-q"]
    words += ["--device", chosen.device, *(word for change in changes for word in ("--set", change))]
    line = [sys.executable, "-m", "eectl", *words]
    with tempfile.TemporaryDirectory() as name:
        first, again, killed = (Path(name) / each for each in ("first", "again", "killed"))
        started = time.perf_counter()
        for folder in (first, again):
            run([*line, "-o", str(folder)])
        seconds = (time.perf_counter() - started) / 2
        kills = sum(run_and_kill([*line, "--resume", "-o", str(killed)], killed) for _ in range(chosen.kills))
        run([*line, "--resume", "-o", str(killed)])
        results = {
            "changes": changes,
            "tensors": len(load(first)),
            "differ": {"again": differ(first, again), "killed and resumed": differ(first, killed)},
            "kills": kills,
            "seconds_of_a_run": seconds,
        }
    return report("same_bits", chosen, results)


def run_and_kill(line: list[str], folder: Path) -> bool:
    """Run until a state is saved that was not there, and kill; whether there was something left to kill."""
    state = folder / "resume" / "state.safetensors"
    before = _written(state)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _written(state) == before:
        time.sleep(0.005)
    process.kill()
    return process.wait() == -9


def _written(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def load(folder: Path) -> dict:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def differ(one: Path, other: Path) -> int:
    """How many tensors of two checkpoints are not the same, bit by bit."""
    ours, theirs = load(one), load(other)
    return sum(ours[name].tobytes() != theirs[name].tobytes() for name in ours)


if __name__ == "__main__":
    main()
