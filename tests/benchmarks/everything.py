"""Run every benchmark, one after the other, each in a process of its own; results go to results/NAME-DEVICE.json.

python tests/benchmarks/everything.py --device cuda [--quick] [--peer PATH] [--only NAME…] [--results FOLDER]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SUPPORT = {"counting", "measuring", "machine", "synthetic", "peer", "peer_exits", "everything"}
CPU_ONLY = {"startup", "sweep"}


def main() -> None:
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SUPPORT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--peer", help="a checkout of kamadforge/early-exit-benchmark")
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    failed = []
    for name in chosen.only:
        device = "cpu" if name in CPU_ONLY else chosen.device
        line = [sys.executable, str(HERE / f"{name}.py"), "--device", device]
        line += ["--out", str(chosen.results / f"{name}-{device}.json"), *(["--quick"] if chosen.quick else [])]
        line += ["--peer", chosen.peer] if chosen.peer and "--peer" in _help(name) else []
        started = time.perf_counter()
        done = subprocess.run(line, stdout=subprocess.DEVNULL)
        print(f"{name}: {'failed' if done.returncode else 'done'} after {time.perf_counter() - started:.0f} s", flush=True)
        failed += [name] if done.returncode else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _help(name: str) -> str:
    return subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--help"], capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
