"""How much of the reachable speed does early exit get? Untrained networks; thresholds spread the rows evenly over the exits.

Reachable is what the same mix of exits takes at each prefix's own time on full batches (`evaluation/timing`), in the same run,
in turn with early exit. Heads and decisions really run. Early exit regroups survivors where its warm-up says that it pays. The
authors' code and earlyon do the same with their own heads on the same backbone, in the layout that they use (NCHW), beside the
plain backbone in that layout; their share of the reachable is their speed-up over ours at best.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
from measuring import begin, interleave, keep, options, ratio, report
from torch import Tensor

from eectl.core.precision import PRECISIONS, autocast, resolve_precision, settings
from eectl.evaluation.bench import FEW_BATCHES
from eectl.evaluation.timing import measure_speed
from eectl.exits.costs import measure_costs
from eectl.exits.criteria import criterion_named
from eectl.exits.fastest import choose_layout, lay_inputs
from eectl.exits.policy import Policy
from eectl.exits.times import Speed
from eectl.models.build import attach_exits, build_backbone
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection

NUM_OUTPUTS = 100
VIT_S = {"dim": 384, "mlp_dim": 1536, "depth": 12, "heads": 6}
NETWORKS = {  # backbone, its args, input shape, exits after
    "resnet50": ("resnet50", {"stem": "small"}, (3, 32, 32), (1, 3, 5, 7, 9, 11, 13)),
    "resnet50-64px": ("resnet50", {"stem": "small"}, (3, 64, 64), (1, 3, 5, 7, 9, 11, 13)),
    "resnet18": ("resnet18", {"stem": "small"}, (3, 32, 32), (0, 2, 4, 6)),
    "vit-t": ("vit", {}, (3, 32, 32), (0, 1, 2, 3, 4, 5)),
    "vit-s": ("vit", VIT_S, (3, 32, 32), (1, 3, 5, 7, 9)),
    "bert": ("hf/bert", {}, (3, 32), (3, 7, 11, 15, 19)),
}
TOY = {"resnet18": ("resnet18", {"stem": "small"}, (3, 8, 8), (0, 2))}
DEFAULT = ("resnet50", "vit-t", "vit-s", "bert")


def make_inputs(shape: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """Random images, or texts without padding."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 3:
        return torch.randn(rows, *shape, generator=generator).to(device)
    texts = torch.zeros(rows, *shape, dtype=torch.int64)
    texts[:, 0] = torch.randint(1000, 20000, (rows, shape[1]), generator=generator)
    texts[:, 1] = 1
    return texts.to(device)


def spread(confidences: Sequence[Tensor]) -> tuple[float, ...]:
    """Thresholds of all exits but the last, at which an equal share of the rows leaves at each; `confidences` [row] by exit."""
    here = torch.ones_like(confidences[0], dtype=torch.bool)
    thresholds = []
    for each in confidences[:-1]:
        ranked = each[here].sort(descending=True).values
        wanted = max(round(len(each) / len(confidences)), 1)
        thresholds.append(float(ranked[wanted - 1 : wanted + 1].mean()) if wanted < len(ranked) else 2.0)
        here &= each <= thresholds[-1]
    return tuple(thresholds)


@torch.inference_mode()
def rig(model: MultiExitModel, inputs: Tensor) -> Policy:
    """The policy that spreads these rows evenly."""
    criterion = criterion_named("max-softmax")
    passes = [[output.logits for output in model(part)] for part in inputs.split(32)]
    return Policy(criterion, spread([criterion.score(torch.cat(each), []) for each in zip(*passes, strict=True)]))


def build(name: str, networks: dict) -> tuple[MultiExitModel, tuple[int, ...]]:
    """One of the networks with its exits in eval mode, and the shape of its inputs."""
    backbone_name, args, shape, after = networks[name]
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSection(name=backbone_name, args=args), input_shape=shape, num_outputs=NUM_OUTPUTS)
    return attach_exits(backbone, after=after, heads="auto", num_outputs=NUM_OUTPUTS, input_shape=shape).eval(), shape


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> Iterator[dict]:
    """What is found at each batch size: a Speed as a dict, with `peers`. All of them compute in one precision."""
    precision = resolve_precision(chosen.precision, device)
    for found in _measure(name, chosen, device, wait, precision):
        yield {"precision": precision, **found}


def _measure(name: str, chosen, device: torch.device, wait: Callable[[], object], precision: str) -> Iterator[dict]:
    networks = TOY if chosen.quick else NETWORKS
    sizes = [1, 4] if chosen.quick else sorted(chosen.batch_size)
    model, shape = build(name, networks)
    shares = measure_costs(model, shape).shares
    model.to(device)
    plain_layout = make_inputs(shape, max(2 * sizes[-1], 64), device)
    fast = model.backbone.prefers_channels_last
    inputs = plain_layout.contiguous(memory_format=torch.channels_last) if fast else plain_layout
    if fast:
        model.to(memory_format=torch.channels_last)
    with computing(precision, device):
        policy = rig(model, inputs)
    for size in sizes:
        batches = [part for part in inputs.split(size) if len(part) == size]
        seconds = 0.05 if chosen.quick else chosen.seconds
        with computing(precision, device):
            last = fast and choose_layout(model, batches[:FEW_BATCHES], seconds=seconds)  # as bench and predict do
            batches = [lay_inputs(batch, channels_last=last) for batch in batches] if fast else batches
            speed = measure_speed(model, batches, {100.0: policy}, cost_shares=shares, seconds=seconds)
            speed = replace(speed, channels_last=last)
        timed = speed.num_rows // size
        found = {key: value for key, value in asdict(speed).items() if key != "early_exit"}
        found["early_exit"] = {"refill" if each.refill else "exit": asdict(each) for each in speed.early_exit}
        if len(shape) == 3:
            with computing(precision, device):
                found["peers"] = beside(build(name, networks)[0].to(device), plain_layout, size, timed, speed, chosen, wait)
        yield found


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in a resolved precision within the block."""
    with settings(precision, device), autocast(precision, device, keeps_casts=True):
        yield


def beside(
    model: MultiExitModel, inputs: Tensor, size: int, timed: int, speed: Speed, chosen, wait: Callable[[], object]
) -> dict:
    """The peers on `timed` batches, beside the plain backbone in their layout: rows per second, speed-up, share of reachable."""
    rows = size * timed
    batches = inputs[:rows].split(size)
    functions: dict[str, Callable[[], object]] = {"plain": partial(_each, model.backbone, batches)}
    found: dict[str, dict] = {}
    exits: dict[str, Tensor] = {}
    if chosen.peer:
        from peer_exits import AuthorsExits

        authors = AuthorsExits(chosen.peer, deepcopy(model), NUM_OUTPUTS, inputs)
        try:
            _each(authors, batches)
            functions["authors"], exits["authors"] = partial(_each, authors, batches), authors.exits
        except Exception as error:  # theirs, and known to come
            found["authors"] = {"failed": type(error).__name__}
    if find_spec("earlyon"):
        from peer_exits import Earlyon

        earlyon = Earlyon(deepcopy(model), NUM_OUTPUTS, inputs, spread)
        functions["earlyon"], exits["earlyon"] = partial(_each, earlyon, batches), earlyon.exits
    samples = interleave(functions, repeats=speed.num_rounds, wait=wait) if exits else {}
    for key in exits:
        prefixes = torch.tensor(speed.prefix_seconds)[exits[key][:rows].cpu()]
        gain = ratio(samples["plain"], samples[key])
        of_reachable = gain * float(prefixes.mean()) / speed.plain_seconds
        found[key] = {"rows_per_second": rows / median(samples[key]), "speed_up": gain, "of_reachable": of_reachable}
    return found


@torch.inference_mode()
def _each(run: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
    for batch in batches:
        run(batch)


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=0,
        peer={"help": "a checkout of kamadforge/early-exit-benchmark"},
        networks={"nargs": "*", "default": DEFAULT, "choices": NETWORKS},
        batch_size={"type": int, "nargs": "*", "default": [1, 32, 256]},
        precision={"choices": PRECISIONS, "default": "auto", "help": "of all (default: what eectl takes on the device)"},
        seconds={"type": float, "default": 4.0, "help": "about how long the plain backbone is timed per batch size (default 4)"},
    )  # fmt: skip
    device, wait = begin(chosen)
    results: dict[str, dict] = {}
    for name in TOY if chosen.quick else chosen.networks:
        results[name] = {}
        for each in measure(name, chosen, device, wait):
            results[name][f"batch size {each['batch_size']}"] = each
            keep("early_exit", chosen, results)
    return report("early_exit", chosen, results)


if __name__ == "__main__":
    main()
