"""Does an optimisation change what is learned? The same seeds with and without it: weights bit by bit, accuracy beside the seeds.

Trains both phases of the disjoint regime on the digits without augmentation, so that phase 3 may keep its features; each
switch alone is turned on over a baseline that has none.
"""

import hashlib
import tempfile
from pathlib import Path
from statistics import mean, stdev

from measuring import options, report

import eectl

BASELINE = {
    "channels_last": "false",
    "precision": "float32",
    "compile": "false",
    "cache_features": "0",
    "checkpoint_activations": "false",
}
SWITCHES = {
    "none, again": {},
    "features kept in phase 3": {"cache_features": "2e9"},
    "activation checkpointing": {"checkpoint_activations": "true"},
    "channels last": {"channels_last": "true"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": "true"},
}


def train(changes: dict[str, str], seed: int, chosen, folder: Path) -> tuple[str, list[float]]:
    """A hash of all trained weights, and the test accuracy of each exit in %."""
    settings = {**BASELINE, **changes, "data.augment": "{}", "patience": "1000"}
    words = [f"{key}={value}" for key, value in settings.items()] + (["data.limit=100"] if chosen.quick else [])
    done = eectl.train(
        "digits", regime="disjoint", epochs=chosen.epochs, seed=seed, changes=words, device=chosen.device, out=folder,
        overwrite=True,
    )  # fmt: skip
    found = eectl.evaluate(done.path, protocol="paper", device=chosen.device, batch_size=1000)
    return _hash(done.path), [each.value for each in found.exits]


def _hash(path: Path) -> str:
    from safetensors.numpy import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(name.encode() + tensor.tobytes())
    return found.hexdigest()


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=1,
        seeds={"type": int, "nargs": "*", "default": [0, 1, 2]}, epochs={"type": int, "default": 6},
    )  # fmt: skip
    seeds = chosen.seeds[:1] if chosen.quick else chosen.seeds
    switches = {key: change for key, change in SWITCHES.items() if not (chosen.quick and key in ("compile", "bf16"))}
    with tempfile.TemporaryDirectory() as name:
        plain = [train({}, seed, chosen, Path(name)) for seed in seeds]
        found = {key: [train(change, seed, chosen, Path(name)) for seed in seeds] for key, change in switches.items()}
    accuracies = {"none": [mean(each) for _, each in plain]} | {
        key: [mean(each) for _, each in runs] for key, runs in found.items()
    }
    results = {
        "same_weights": {key: [h for h, _ in runs] == [h for h, _ in plain] for key, runs in found.items()},
        "accuracy_mean_of_exits": accuracies,
        "mean_difference": {key: mean(each) - mean(accuracies["none"]) for key, each in accuracies.items() if key != "none"},
        "std_over_seeds": stdev(accuracies["none"]) if len(seeds) > 1 else None,
    }
    return report("same_results", chosen, results)


if __name__ == "__main__":
    main()
