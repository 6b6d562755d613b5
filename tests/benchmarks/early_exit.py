"""How much of the reachable speed early exit gets, on networks that are not trained: thresholds are rigged so that rows spread
evenly over the exits.

    python tests/benchmarks/early_exit.py --networks resnet50,vit-t,bert --batch-size 1,32,256 --json > early_exit.json

Reachable is what the same mix of exits takes at each prefix's own time on full batches (`eectl.speed`), measured in the same run,
in turn with early exit. Heads and decisions really run. Early exit regroups survivors where its warm-up says that it pays.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict

import torch

from eectl.costs import measure_costs
from eectl.exiting import Policy, criterion_named
from eectl.models import attach_exits, build_backbone
from eectl.recipe import Backbone
from eectl.speed import measure_speed
from eectl.stopwatch import device_name

NUM_OUTPUTS = 100
VIT_S = {"dim": 384, "mlp_dim": 1536, "depth": 12, "heads": 6}
NETWORKS = {  # backbone, its args, input shape, exits after
    "resnet18": ("resnet18", {"stem": "small"}, (3, 32, 32), (0, 2, 4, 6)),
    "resnet50": ("resnet50", {"stem": "small"}, (3, 64, 64), (1, 3, 5, 7, 9, 11, 13)),
    "resnet50-32px": ("resnet50", {"stem": "small"}, (3, 32, 32), (1, 3, 5, 7, 9, 11, 13)),
    "vit-t": ("vit", {}, (3, 32, 32), (0, 1, 2, 3, 4, 5)),
    "vit-s": ("vit", VIT_S, (3, 32, 32), (1, 3, 5, 7, 9)),
    "bert": ("hf/bert", {}, (3, 64), (3, 7, 11, 15, 19)),
}


def make_inputs(shape, rows, device):
    """Random images, or texts without padding."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 3:
        return torch.randn(rows, *shape, generator=generator).to(device)
    texts = torch.zeros(rows, *shape, dtype=torch.int64)
    texts[:, 0] = torch.randint(1000, 20000, (rows, shape[1]), generator=generator)
    texts[:, 1] = 1
    return texts.to(device)


@torch.inference_mode()
def rig(model, inputs):
    """Thresholds at which an equal share of these rows leaves at each exit."""
    score = criterion_named("max-softmax").score
    passes = [[output.logits for output in model(part)] for part in inputs.split(32)]
    scores = [score(torch.cat(each), []) for each in zip(*passes, strict=True)]
    here = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    thresholds = []
    for exit_scores in scores[:-1]:
        ranked = exit_scores[here].sort(descending=True).values
        wanted = max(round(len(inputs) / len(scores)), 1)
        thresholds.append(float(ranked[wanted - 1 : wanted + 1].mean()) if wanted < len(ranked) else 2.0)
        here &= exit_scores <= thresholds[-1]
    return Policy("max-softmax", tuple(thresholds))


def measure(name, sizes, *, seconds, rows, device):
    """One Speed per batch size."""
    backbone_name, args, shape, after = NETWORKS[name]
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name=backbone_name, args=args), input_shape=shape, num_outputs=NUM_OUTPUTS)
    model = attach_exits(backbone, after=after, heads="auto", num_outputs=NUM_OUTPUTS, input_shape=shape).eval()
    shares = measure_costs(model, shape).shares
    model.to(device)
    inputs = make_inputs(shape, rows or max(2 * sizes[-1], 64), device)
    if backbone.prefers_channels_last:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    policy = rig(model, inputs)
    for size in sizes:
        batches = [part for part in inputs.split(size) if len(part) == size]
        yield measure_speed(model, batches, {100.0: policy}, cost_shares=shares, seconds=seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50,vit-t,vit-s,bert", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--batch-size", default="1,32,256")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long the plain backbone is timed per batch size")
    parser.add_argument("--rows", type=int, help="none: twice the largest batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = {"device": device_name(device), "threads": options.threads, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    machine |= {"torch": torch.__version__, "python": platform.python_version()}
    results = {}
    out = sys.stderr if options.json else sys.stdout
    print("network        batch  run      rows/s  x plain  of reachable  of MAC-ideal   p50 ms   p99 ms", file=out)
    for name in options.networks.split(","):
        sizes = sorted(map(int, options.batch_size.split(",")))
        for speed in measure(name, sizes, seconds=options.seconds, rows=options.rows, device=device):
            results.setdefault(name, []).append(asdict(speed))
            for kind, run in [("plain", speed.plain), ("full", speed.full), *((None, each) for each in speed.early_exit)]:
                what = kind or ("refill" if run.refill else "exit")
                head = f"{name:14} {speed.batch_size:5}  {what:6} {run.rows_per_second:8.1f}"
                ratios = f"{speed.plain_seconds / run.seconds:8.2f}"
                ratios += " " * 28 if kind else f"{run.of_reachable:14.2f}{run.of_mac_ideal:14.2f}"
                print(f"{head} {ratios} {run.latency_ms.p50:8.1f} {run.latency_ms.p99:8.1f}", file=out, flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
