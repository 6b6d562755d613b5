"""Run the benchmarks one after the other, each in a process of its own; results go to results/NAME-DEVICE.json as they come.

python tests/benchmarks/everything.py --device cuda [--minutes 6] [--quick] [--peer PATH] [--only NAME…] [--results FOLDER]

With --minutes it runs parts of them instead, what is worth most first, and skips what no longer fits: for a GPU that is lent.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SUPPORT = {"counting", "measuring", "machine", "synthetic", "peer", "peer_exits", "everything"}
CPU_ONLY = {"startup", "sweep"}


@dataclass(frozen=True)
class Part:
    """A benchmark with its options: it is begun where `seconds`, about what it takes, are left, and ended at twice that."""

    name: str
    script: str
    words: tuple[str, ...]
    seconds: float


# In order of worth. Seconds are estimates for one fast GPU; a CPU takes longer.
PARTS = (
    Part("training-vit-t", "training", ("--recipes", "cifar100-vit-t", "--steps", "64"), 70),
    Part("early_exit-vit-t", "early_exit", ("--networks", "vit-t", "--seconds", "1.5"), 40),
    Part("same_bits", "same_bits", (), 60),
    Part("training-resnet50", "training", ("--recipes", "tinyimagenet-resnet50", "--steps", "21", "--repeats", "2"), 80),
    Part("early_exit-resnet50", "early_exit", ("--networks", "resnet50-64px", "--batch-size", "32", "256", "--seconds", "1"), 40),
    Part("launches", "launches", ("--steps", "2"), 40),
    Part("synchronisation", "synchronisation", ("--recipes", "cifar100-vit-t"), 40),
    Part("prediction", "prediction", ("--part", "speed", "--recipes", "cifar100-vit-t", "--rows", "4096"), 30),
    Part("augmentation", "augmentation", ("--recipes", "cifar100-vit-t", "--steps", "64"), 30),
    Part("training-deterministic", "training", ("--recipes", "cifar100-vit-t", "--set", "deterministic=true"), 70),
)


def fitting(parts: Sequence[Part], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[Part, float]]:
    """Those parts for which there is time when their turn comes, and how long each may take; the rest are said."""
    end = clock() + seconds
    for part in parts:
        left = end - clock()
        if left < part.seconds:
            print(f"{part.name}: skipped, about {part.seconds:.0f} s and {max(left, 0):.0f} s left", flush=True)
        else:
            yield part, min(2 * part.seconds, left)


def main(arguments: list[str] | None = None) -> None:
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SUPPORT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--peer", help="a checkout of kamadforge/early-exit-benchmark")
    parser.add_argument("--minutes", type=float, help="what is worth most in so many; default: everything, without limits")
    parser.add_argument("--only", nargs="*", choices=[*names, *(part.name for part in PARTS)])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    chosen = parser.parse_args(arguments)
    if chosen.minutes is None:
        whole = [Part(name, name, (), 0) for name in names]
        turns = ((part, None) for part in whole if part.name in (chosen.only or names))
    else:
        wanted = [part for part in PARTS if not chosen.only or part.name in chosen.only]
        turns = fitting(wanted, 60 * chosen.minutes)
    failed = [part.name for part, limit in turns if not _run(part, chosen, limit)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _run(part: Part, chosen: argparse.Namespace, limit: float | None) -> bool:
    device = "cpu" if part.script in CPU_ONLY else chosen.device
    line = [sys.executable, str(HERE / f"{part.script}.py"), "--device", device, *part.words]
    line += ["--out", str(chosen.results / f"{part.name}-{device}.json"), *(["--quick"] if chosen.quick else [])]
    line += ["--peer", chosen.peer] if chosen.peer and "peer={" in (HERE / f"{part.script}.py").read_text() else []
    started = time.perf_counter()
    try:
        code = subprocess.run(line, stdout=subprocess.DEVNULL, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.perf_counter() - started
    how = "done" if code == 0 else "failed" if code is not None else "ended at its limit; what it wrote by then stays"
    print(f"{part.name}: {how} after {seconds:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    main()
