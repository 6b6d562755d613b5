"""How fast is the pass over all exits, and what does it hold in memory? Beside the plain backbone's own inference.

`share_of_plain` is the throughput of eectl's pass over that of the backbone with its own head alone, scaled by multiply-adds. The
memory is that of `eectl evaluate --save-predictions` in a process of its own, which keeps 50,000 × 12 × 1,000 logits.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import EECTL, begin, interleave, options, ratio, report, run_child, summary
from synthetic import dataset, images, network, recipe_for

from eectl.core.capture import Capture, recorder_for
from eectl.core.distributed import World
from eectl.core.precision import PRECISIONS, autocast, resolve_precision, settings
from eectl.data import load_data
from eectl.evaluation.opened import Session, score_split
from eectl.exits.costs import measure_costs
from eectl.exits.criteria import CRITERIA
from eectl.models.build import model_spec
from eectl.models.checkpoint import About, Checkpoint, save_checkpoint
from eectl.recipe.reading import read_recipe

RECIPES = {"cpu": ("fashion-mnist-resnet20", "fashion-mnist-vit-t"), "cuda": ("cifar100-vit-t", "tinyimagenet-resnet50")}
BATCH_SIZES = (32, 128, 256)


def whole_pass(session: Session, batch_size: int) -> None:
    """eectl's pass over the test split, as evaluate makes it."""
    score_split(session, "test", criterion=CRITERIA["max-softmax"], batch_size=batch_size)


def plain_pass(model: torch.nn.Module, pixels: torch.Tensor, batch_size: int, precision: str) -> Callable[[], None]:
    """A pass of the library's own network over uint8 images on the device, scaled to 0..1; recorded where the device records."""
    device = pixels.device
    run = Capture(recorder_for(device), plain_calls=1).function(lambda batch: model(batch.float() / 255).argmax(dim=1))

    def go() -> None:
        with torch.inference_mode(), autocast(precision, device, keeps_casts=True):
            for batch in pixels.split(batch_size):
                run(batch)

    return go


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> dict:
    recipe = recipe_for(name, quick=chosen.quick)
    rows = 64 if chosen.quick else chosen.rows
    data = dataset(recipe, {"train": 8, "validation": 8, "calibration": 8, "test": rows}, device)
    model, recipe = network(recipe, data.info)
    model = model.to(device).eval()
    costs = measure_costs(model, data.info.input_shape)
    spec = model_spec(model, recipe.backbone, input_shape=data.info.input_shape, num_outputs=len(data.info.classes))
    about = About(
        spec, recipe.model_dump(mode="json"), {"name": "made up", "task": "classification", "classes": data.info.classes}, {}, []
    )
    precision = resolve_precision(chosen.precision, device)
    session = Session(Checkpoint(Path("none"), model, about, "made up"), data, costs, World(0, 1, device), (), precision)
    twin = network(recipe, data.info)[0].backbone.net.to(device).eval()
    pixels = images(data.info, rows).to(device)
    if model.backbone.prefers_channels_last:
        twin.to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    scale = costs.exits[-1] / costs.plain
    found: dict = {"rows": rows, "precision": precision, "exits": model.num_exits, "macs_multi_exit_over_plain": scale}
    for batch_size in BATCH_SIZES:
        plain = plain_pass(twin, pixels, batch_size, precision)
        with settings(precision, device):
            samples = interleave(
                {"eectl": partial(whole_pass, session, batch_size), "plain": plain}, repeats=chosen.repeats, wait=wait
            )
        found[f"batch size {batch_size}"] = {
            "images_per_second": {key: rows / summary(each)["median"] for key, each in samples.items()},
            "share_of_plain": scale * ratio(samples["plain"], samples["eectl"]),
        }
    return found


def made_up(folder: Path, *, rows: int, classes: int) -> tuple[Path, Path]:
    """An untrained checkpoint of 12 exits, and the folder of tiny images that it says it was made for; `rows` in test/."""
    generator = np.random.default_rng(0)
    root = folder / "images"
    for split, each in (("train", 10), ("test", -(-rows // classes))):
        for label in range(classes):
            place = root / split / f"{label:04}"
            place.mkdir(parents=True)
            for number in range(each):
                (place / f"{number}.ppm").write_bytes(b"P6 8 8 255\n" + generator.bytes(192))
    changes = ["data.name=folder", f"data.root={root}", "backbone.name=resnet32", f"exits.after={list(range(11))}"]
    recipe = read_recipe("digits", changes=changes)
    data = load_data(recipe.data, device=torch.device("cpu"))
    model, recipe = network(recipe, data.info)
    spec = model_spec(model, recipe.backbone, input_shape=data.info.input_shape, num_outputs=classes)
    splits = {name: {"size": len(split), "fingerprint": split.fingerprint} for name, split in data.splits.items()}
    path = folder / "model.safetensors"
    save_checkpoint(path, model, About(spec, recipe.model_dump(mode="json"), asdict(data.info), splits, []))
    return path, root


def memory(chosen) -> dict:
    """Peak memory of a real `eectl evaluate` that saves what 12 exits say of many rows, and of one that computes nothing."""
    rows, classes = (400, 10) if chosen.quick else (50_000, 1_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, root = made_up(folder, rows=rows, classes=classes)
        words = ["evaluate", str(checkpoint), "--data-root", str(root), "--protocol", "paper", "--device", chosen.device]
        done = run_child(EECTL, [*words, "--save-predictions", str(folder / "p.safetensors")])
        bare = run_child(EECTL, ["flops", str(checkpoint)])
        size = (folder / "p.safetensors").stat().st_size
    found = {"logits": [12, rows, classes], "file_bytes": size, "seconds": done["seconds"]}
    return found | {"peak_bytes": done["peak_bytes"], "peak_bytes_of_flops": bare["peak_bytes"]}


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=9,
        rows={"type": int, "default": 1024, "help": "images of a pass (default 1024)"},
        recipes={"nargs": "*", "help": "shipped recipes of images; none: those of the device"},
        precision={"choices": PRECISIONS, "default": "auto", "help": "of both (default: what eectl takes on the device)"},
        part={"choices": ("both", "speed", "memory"), "default": "both", "help": "what to measure"},
    )  # fmt: skip
    device, wait = begin(chosen)
    results: dict = {}
    if chosen.part != "memory":
        names = chosen.recipes or RECIPES[device.type]
        results |= {name: measure(name, chosen, device, wait) for name in names}
    if chosen.part != "speed":
        results["memory of evaluate --save-predictions"] = memory(chosen)
    return report("prediction", chosen, results)


if __name__ == "__main__":
    main()
