"""What do more processes bring? torchrun with 1, 2, … of them, the same global batch, the same threads each: images per second.

Runs the program itself on the digits, enlarged; its own metrics.jsonl says how long each epoch took, and the first is left out.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from measuring import interleave, options, ratio, report, run, summary

IMAGES = 1437  # of the digits' 1,797, less validation, calibration and test


def epoch_seconds(processes: int, chosen, folder: Path) -> float:
    """Mean seconds of the epochs after the first."""
    epochs = 2 if chosen.quick else chosen.epochs
    size, limit = (8, 100) if chosen.quick else (32, IMAGES)
    changes = [f"data.image_size={size}", f"data.limit={limit}", f"batch_size={chosen.batch_size}", *(chosen.set or ())]
    words = ["train", "digits", "--regime", "joint", "--epochs", str(epochs), "--device", chosen.device, "-q", "--overwrite"]
    words += [word for change in changes for word in ("--set", change)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    start = launch if processes > 1 else [sys.executable, "-m"]
    out = folder / f"{processes}"
    run([*start, "eectl", *words, "-o", str(out)], OMP_NUM_THREADS=str(chosen.threads or 1))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / (len(rows) - 1)


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=3,
        processes={"type": int, "nargs": "*", "default": [1, 2]},
        epochs={"type": int, "default": 4}, batch_size={"type": int, "default": 128},
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipe"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        functions = {f"{each}": partial(epoch_seconds, each, chosen, Path(name)) for each in chosen.processes}
        samples = interleave(functions, repeats=chosen.repeats)
        rows = read_rows(Path(name) / str(chosen.processes[0]))
    first = samples[str(chosen.processes[0])]
    results = {
        "threads_each": chosen.threads or 1,
        "cores": os.cpu_count(),
        "seconds_per_epoch": {key: summary(each) for key, each in samples.items()},
        "images_per_second": {key: rows / summary(each)["median"] for key, each in samples.items()},
        "times_as_fast": {key: ratio(first, each) for key, each in samples.items()},
    }
    return report("distributed", chosen, results)


def read_rows(run_folder: Path) -> int:
    """Images of an epoch, as the checkpoint says."""
    from eectl.models.checkpoint import read_about

    return int(read_about(run_folder / "model.safetensors").splits["train"]["size"])


if __name__ == "__main__":
    main()
