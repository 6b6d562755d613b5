"""Which way is fastest here: the router for a device, early exit or the full pass, and the memory layout of maps.

All ways give the same answers, up to rounding, so that only speed depends on what is measured. What users see is measured in
evaluation.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from eectl.core.capture import Capture
from eectl.core.stopwatch import Stopwatch
from eectl.exits.full_pass import FullPass, PlainPass
from eectl.exits.policy import Policy
from eectl.exits.router import Answerer, Router
from eectl.exits.segment_times import SegmentTimes, learn_times
from eectl.exits.static_router import StaticRouter
from eectl.exits.times import EARLY, FULL
from eectl.models.multi_exit import MultiExitModel

Name = TypeVar("Name", bound=Hashable)

ENOUGH = 0.95  # of the first way's time: what another must beat to be taken
MOST_ROUNDS = 20


def router_for(
    model: MultiExitModel, policy: Policy, *, capture: Capture | None = None, times: SegmentTimes | None = None
) -> Answerer:
    """Return early exit as it suits the network's device: programs of fixed shape on a GPU, else exact sizes.

    `capture` records the programs; `times` are for exact sizes only, see Router.
    """
    if is_static(model):
        return StaticRouter(model, policy, capture=capture)
    return Router(model, policy, times=times)


def is_static(model: MultiExitModel) -> bool:
    """Return whether the network lies on a device for which early exit runs in programs of fixed shape."""
    return next(model.parameters()).device.type == "cuda"


@torch.inference_mode()
def choose_mode(
    model: MultiExitModel, policy: Policy, batches: Sequence[Tensor], *, seconds: float, capture: Capture | None = None
) -> tuple[str, Answerer]:
    """Return the faster of EARLY and FULL on these batches of one size, and what answers in this mode.

    It takes about three times `seconds`; `capture` records programs.
    """
    times = None
    if not is_static(model) and len(batches[0]) > 1:
        times = learn_times(model, batches[0], seconds=seconds)
    ways: dict[str, Answerer] = {
        EARLY: router_for(model, policy, capture=capture, times=times),
        FULL: FullPass(model, policy, capture=capture),
    }
    mode = quickest({name: _on_all(way, batches) for name, way in ways.items()}, seconds=seconds, device=batches[0].device)
    return mode, ways[mode]


@torch.inference_mode()
def choose_layout(model: MultiExitModel, batches: Sequence[Tensor], *, seconds: float) -> bool:
    """Return whether batches like these are faster channels last, where small maps of few rows may be slower for it.

    The weights of the network, which lies so, lie as it says afterwards. Off a CPU nothing is measured: it is True.
    """
    if batches[0].device.type != "cpu":
        return True
    plain = PlainPass(model.backbone)

    def run(last: bool) -> None:
        for batch in batches:
            plain(lay_inputs(batch, channels_last=last))

    shortest = {True: float("inf"), False: float("inf")}
    started = time.perf_counter()
    for _ in range(MOST_ROUNDS):
        for last in shortest:
            lay_weights(model, channels_last=last)
            run(last)
            shortest[last] = min(shortest[last], _time(partial(run, last), batches[0].device))
        if time.perf_counter() - started > seconds:
            break
    found = shortest[False] >= ENOUGH * shortest[True]
    lay_weights(model, channels_last=found)
    return found


def lay_weights(model: MultiExitModel, *, channels_last: bool) -> None:
    """Lay the weights of convolutions in memory as their inputs lie."""
    with torch.inference_mode(mode=False):  # else they could not be trained any more
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.clear_autocast_cache()  # which has copies in the other layout


def lay_inputs(inputs: Tensor, *, channels_last: bool) -> Tensor:
    """Return images so that they lie channels last, or not."""
    return inputs.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def quickest(ways: Mapping[Name, Callable[[], object]], *, seconds: float, device: torch.device) -> Name:
    """Return the name of the way that takes the shortest time; the first one unless another is clearly faster.

    All run in turn, twice unmeasured and then until `seconds` are over.
    """
    shortest = dict.fromkeys(ways, float("inf"))
    for _ in range(2):  # the first call sets up, the second records
        for run in ways.values():
            run()
    started = time.perf_counter()
    for _ in range(MOST_ROUNDS):
        for name, run in ways.items():
            shortest[name] = min(shortest[name], _time(run, device))
        if time.perf_counter() - started > seconds:
            break
    first, best = next(iter(ways)), min(shortest, key=lambda name: shortest[name])
    return best if shortest[best] < ENOUGH * shortest[first] else first


def _on_all(way: Answerer, batches: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: [way(batch) for batch in batches]


def _time(run: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device)
    run()
    watch.lap()
    return watch.laps()[-1]
