"""Does a training step wait for the GPU? Steps of eectl's own loop with synchronisation forbidden, and a profile of them.

On a GPU torch raises where any of these steps would wait (torch.cuda.set_sync_debug_mode). The loop's own looks at the device,
every 50 steps and at an epoch's end, lie outside. On a CPU there is nothing to wait for: only the profile is made.
"""

import time

import torch
from measuring import begin, options, report
from synthetic import Training, dataset, network, recipe_for
from torch.profiler import ProfilerActivity, profile

RECIPES = {"cpu": ("fashion-mnist-vit-t",), "cuda": ("cifar100-vit-t", "tinyimagenet-resnet50")}
FIRST, LAST, STEPS = 5, 25, 30  # of 30 steps these are watched: after warm-up, before the loop looks
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def watch(name: str, chosen, device: torch.device, *, forbid: bool) -> dict:
    """An epoch of 30 steps, of which 20 are profiled, or run with waiting forbidden."""
    compiled = ["compile=true"] if device.type == "cuda" else []
    recipe = recipe_for(name, *compiled, *(chosen.set or ()), quick=chosen.quick)
    data = dataset(recipe, {"train": STEPS * recipe.batch_size, "validation": recipe.batch_size}, device)
    recorder = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])
    seconds = {}

    def after_step(done: int) -> None:
        if done == FIRST:
            if forbid:
                torch.cuda.set_sync_debug_mode("error")
            else:
                _wait(device)
                recorder.start()
            seconds["start"] = time.perf_counter()
        elif done == LAST:
            seconds["queued"] = time.perf_counter() - seconds["start"]
            if forbid:
                torch.cuda.set_sync_debug_mode("default")
            _wait(device)
            seconds["done"] = time.perf_counter() - seconds["start"]
            if not forbid:
                recorder.stop()

    training = Training(*network(recipe, data.info), data, device)
    training.epoch()  # on a GPU: compiled and recorded
    training.epoch(after_step)
    found = {"steps": LAST - FIRST, "seconds_until_queued": seconds["queued"], "seconds_until_done": seconds["done"]}
    return found if forbid else found | _profile(recorder, device, seconds["done"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(recorder: profile, device: torch.device, wall: float) -> dict:
    """How busy the device was, which calls waited for it, and what took longest."""
    events = recorder.key_averages()
    on_gpu = device.type == "cuda"

    def own(event) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    top = sorted(events, key=own, reverse=True)[:15]
    return {
        "busy_share": sum(map(own, events)) / wall if on_gpu else None,
        "waits": {event.key: event.count for event in events if event.key in WAITS},
        "copies_to_host": sum(event.count for event in events if "Memcpy DtoH" in event.key),
        "longest": {event.key[:80]: {"seconds": own(event), "calls": event.count} for event in top},
    }


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=1,
        set={"action": "append", "metavar": "KEY=VALUE", "help": "change the recipes"},
        recipes={"nargs": "*", "help": "shipped recipes of images; none: those of the device"},
    )  # fmt: skip
    device, _ = begin(chosen)
    results: dict = {}
    for name in chosen.recipes or RECIPES[device.type]:
        results[name] = {"profile": watch(name, chosen, device, forbid=False)}
        if device.type == "cuda":  # raises where a step waits
            results[name]["waiting forbidden"] = watch(name, chosen, device, forbid=True)
    return report("synchronisation", chosen, results)


if __name__ == "__main__":
    main()
