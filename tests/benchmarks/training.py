"""How fast is training? The whole epoch of `eectl train` beside the floor, plain PyTorch loops and the authors' code.

The floor is the plain backbone's compiled bf16 step on data that lies on the device, on a GPU in a CUDA graph, scaled by the
multiply-adds of the multi-exit network; where a CPU has no fast bf16 the fastest of the plain steps is the harder limit, and is
given too. An epoch of eectl has everything in it: order, augmentation, all exits, losses kept, and validation; only saving is
left out, which a run bounds by a small share of its time.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from measuring import begin, interleave, keep, options, ratio, report, summary
from synthetic import Training, dataset, images, network, recipe_for
from torch.nn import functional as F

from eectl.core.precision import settings
from eectl.exits.costs import measure_costs
from eectl.recipe.recipe import Recipe

RECIPES = {"cpu": ("fashion-mnist-resnet20", "fashion-mnist-vit-t"), "cuda": ("cifar100-vit-t", "tinyimagenet-resnet50")}
MATRIX = {
    "eectl": ("precision=float32", "compile=false"),
    "eectl, compile": ("precision=float32", "compile=true"),
    "eectl, bf16": ("precision=bf16", "compile=false"),
    "eectl, bf16, compile": ("precision=bf16", "compile=true"),
}
FLOOR = "floor: plain, bf16, compile"
ON_GPU = ("eectl, bf16", "eectl, bf16, compile")


def plain_steps(recipe: Recipe, steps: int, device: torch.device, *, bf16: bool, compiled: bool) -> Callable[[], None]:
    """Steps of the backbone with its own head alone, on one batch that is ready: forward, backward, fused AdamW.

    On a GPU what is compiled is also recorded as a CUDA graph, which leaves the host one launch a step.
    """
    data = dataset(recipe, {"train": recipe.batch_size}, device)
    model = network(recipe, data.info)[0].backbone.to(device).train()
    layout = torch.channels_last if model.prefers_channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    inputs = (images(data.info, recipe.batch_size).to(device).float() / 255).contiguous(memory_format=layout)
    targets = data.splits["train"].labels.to(device)
    graph = compiled and device.type == "cuda"
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=1e-3, fused=True, capturable=graph)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        hidden = model.stem(batch)
        for index in range(model.depth):
            hidden = model.block(index, hidden)
        return model.head(hidden)

    run = torch.compile(forward) if compiled else forward

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=not graph):
            logits = run(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    precision = "bf16" if bf16 else "float32"
    if graph:
        with settings(precision, device, training=True):
            step = _recorded(step)

    def go() -> None:
        with settings(precision, device, training=True):
            for _ in range(steps):
                step()

    return go


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a step's CUDA graph, after three real ones."""
    own, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(own)
    with torch.cuda.graph(graph, stream=own):
        step()
    return graph.replay


def clean_steps(recipe: Recipe, steps: int, device: torch.device) -> Callable[[], None]:
    """Steps of all exits in the plainest PyTorch: float32, NCHW, Adam as it comes, one batch that is ready."""
    data = dataset(recipe, {"train": recipe.batch_size}, device)
    model = network(recipe, data.info)[0].to(device).train()
    inputs = images(data.info, recipe.batch_size).to(device).float() / 255
    targets = data.splits["train"].labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def go() -> None:
        for _ in range(steps):
            losses = [F.cross_entropy(output.logits, targets) for output in model(inputs)]
            (sum(losses) / len(losses)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return go


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> dict:
    """One recipe: images per second of everything, and eectl's as shares of the floor."""
    base = recipe_for(name, quick=chosen.quick)
    steps = 2 if chosen.quick else chosen.steps
    rows = steps * base.batch_size
    held = 1 - base.data.validation - base.data.calibration
    sizes = {"train": rows, "validation": max(round(rows * base.data.validation / held), 1)}
    data = dataset(base, sizes, device)
    model, _ = network(base, data.info)
    costs = measure_costs(model, data.info.input_shape)

    variants = {key: MATRIX[key] for key in MATRIX if device.type == "cpu" or key in ON_GPU}
    if chosen.quick:  # compiling takes longer than a toy may
        variants = {key: changes for key, changes in variants.items() if "compile" not in key}
    functions: dict[str, Callable[[], object]] = {}
    for key, changes in variants.items():
        recipe = recipe_for(name, *changes, *(chosen.set or ()), quick=chosen.quick)
        functions[key] = Training(*network(recipe, data.info), data, device).epoch
    functions[FLOOR] = plain_steps(base, steps, device, bf16=True, compiled=not chosen.quick)
    functions["plain, float32"] = plain_steps(base, steps, device, bf16=False, compiled=False)
    functions["plain, float32, compile"] = plain_steps(base, steps, device, bf16=False, compiled=not chosen.quick)
    functions["clean float32 loop of all exits"] = clean_steps(base, steps, device)
    if chosen.peer:
        from peer import Authors

        authors = Authors(chosen.peer, network(base, data.info)[0], data, device)
        functions["authors: steps"] = partial(authors.train, steps, base)
        workers = min(8, os.cpu_count() or 1)
        functions["authors: epoch"] = partial(authors.train_epoch, steps, base, workers=workers)
    samples = interleave(functions, repeats=chosen.repeats, wait=wait)

    scale = costs.exits[-1] / costs.plain
    plain = [key for key in samples if key.startswith(("plain", "floor"))]
    fastest = min(plain, key=lambda key: summary(samples[key])["median"])
    found = {
        "rows": rows,
        "batch_size": base.batch_size,
        "exits": model.num_exits,
        "macs_multi_exit_over_plain": scale,
        "seconds": {key: summary(each) for key, each in samples.items()},
        "images_per_second": {key: rows / summary(each)["median"] for key, each in samples.items()},
        "share_of_floor": {key: scale * ratio(samples[FLOOR], samples[key]) for key in samples if key not in plain},
        "fastest_plain": fastest,
        "share_of_fastest_plain": {key: scale * ratio(samples[fastest], samples[key]) for key in samples if key not in plain},
    }
    for other in ("clean float32 loop of all exits", "authors: steps", "authors: epoch"):
        if other in samples:
            found[f"times as fast as {other}"] = {key: ratio(samples[other], samples[key]) for key in variants}
    return found


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=3,
        peer={"help": "a checkout of kamadforge/early-exit-benchmark"},
        steps={"type": int, "default": 20, "help": "steps of an epoch (default 20)"},
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipes, such as deterministic=true"},
        recipes={"nargs": "*", "help": "shipped recipes of images; none: those of the device"},
    )  # fmt: skip
    device, wait = begin(chosen)
    results: dict[str, dict] = {}
    for name in chosen.recipes or RECIPES[device.type]:
        results[name] = measure(name, chosen, device, wait)
        keep("training", chosen, results)
    return report("training", chosen, results)


if __name__ == "__main__":
    main()
