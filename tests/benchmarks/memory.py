"""How much memory does each verb take at most? On a fixed small job, each in a process of its own; and activation checkpointing.

`peak_bytes` is the largest resident set of the process, of which `import torch` and the libraries are a large part; on a GPU
`gpu_peak_bytes` is what torch held there at most.
"""

import tempfile
from pathlib import Path

from measuring import CHILD, EECTL, options, report, run_child

CHAIN = {  # in order: what one writes another reads
    "train --phase 1": "train digits --regime disjoint --phase 1 -o backbone {small}",
    "attach-heads": "attach-heads backbone/model.safetensors --after 2,4,6 -o heads.safetensors",
    "train --phase 3": "train --phase 3 --from heads.safetensors -o run {small}",
    "train": "train digits --regime disjoint --set exits.after=[2,4,6] --seed 1 -o other {small}",
    "calibrate-thresholds": "calibrate-thresholds run/model.safetensors -o policy.json --device {device}",
    "evaluate": "evaluate run/model.safetensors --policy policy.json --device {device}",
    "bench": "bench run/model.safetensors --device {device}",
    "flops": "flops run/model.safetensors",
    "info": "info run/model.safetensors",
    "analyze gradient-dominance": "analyze gradient-dominance run/model.safetensors -o a1 --device {device}",
    "analyze mode-connectivity": "analyze mode-connectivity run/model.safetensors other/model.safetensors -o a5",
    "analyze numerical-rank": "analyze numerical-rank run/model.safetensors -o a2 --device {device}",
    "analyze mutual-information": "analyze mutual-information run/model.safetensors -o a3 --device {device}",
    "analyze loss-landscape": "analyze loss-landscape run/model.safetensors -o a4 --device {device}",
}
KEPT = ("peak_bytes", "gpu_peak_bytes", "seconds")
QUICK = ("train --phase 1", "attach-heads")
# A deep, narrow network on large images, so that activations outweigh weights.
LARGE = (
    "train digits --regime joint --set backbone.name=vit --set backbone.args.patch_size=4 --set backbone.args.dim=192 "
    "--set backbone.args.mlp_dim=768 --set backbone.args.depth=12 --set backbone.args.heads=3 --set exits.after=[3,7] "
    "--set data.image_size=64 --set data.limit=256 --set batch_size=64 --epochs 1 --device {device} -q"
)


def main(arguments: list[str] | None = None) -> dict:
    from eectl.cli.app import app

    chosen = options(__doc__.splitlines()[0], arguments, repeats=1)
    small = f"--epochs 2 --device {chosen.device} -q --set data.limit=500"
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands} | {"analyze"}
    lines = {key: line for key, line in CHAIN.items() if line.split()[0] in verbs and (key in QUICK or not chosen.quick)}
    results: dict = {"import torch": run_child(CHILD + "import torch", [])["peak_bytes"]}
    with tempfile.TemporaryDirectory() as name:
        for key, line in lines.items():
            done = run_child(EECTL, line.format(small=small, device=chosen.device).split(), cwd=Path(name))
            results[key] = {each: done[each] for each in KEPT if each in done}
        if not chosen.quick:
            results["a 12-block ViT, batch 64"] = checkpointing(chosen.device, Path(name))
    return report("memory", chosen, results)


def checkpointing(device: str, folder: Path) -> dict:
    """Training with and without `checkpoint_activations`; only without, where this eectl has no such key."""
    from eectl.recipe.recipe import Recipe

    jobs: dict[str, list[str]] = {"without": []}
    if "checkpoint_activations" in Recipe.model_fields:
        jobs["with checkpoint_activations"] = ["--set", "checkpoint_activations=true"]
    found = {}
    for name, change in jobs.items():
        done = run_child(EECTL, [*LARGE.format(device=device).split(), *change, "-o", name.split()[0]], cwd=folder)
        found[name] = {each: done[each] for each in KEPT if each in done}
    return found


if __name__ == "__main__":
    main()
