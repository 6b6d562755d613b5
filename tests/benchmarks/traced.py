"""How fast is a traced network beside the library's own forward pass?

Both run the same weights in turn, in eval mode and in training. `of_library` is the library's seconds over ours: 1 is as fast.
"""

from collections.abc import Callable

import torch
from measuring import begin, interleave, options, ratio, report, summary

from eectl.models.build import build_backbone
from eectl.recipe.recipe import BackboneSection

NETWORKS = ("mobilevit_xxs", "efficientformerv2_s0", "pvt_v2_b0", "eva02_tiny_patch14_224", "xception41")
SIZE, NUM_OUTPUTS = 64, 10


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> dict:
    torch.manual_seed(0)
    spec = BackboneSection(name=f"timm/{name}")
    backbone = build_backbone(spec, input_shape=(3, SIZE, SIZE), num_outputs=NUM_OUTPUTS).to(device)
    images = torch.randn(2 if chosen.quick else chosen.rows, 3, SIZE, SIZE, device=device)

    def evaluate(run: torch.nn.Module) -> Callable[[], None]:
        def once() -> None:
            backbone.eval()
            with torch.inference_mode():
                run(images)

        return once

    def train(run: torch.nn.Module) -> Callable[[], None]:
        def once() -> None:
            backbone.train()
            run(images).square().mean().backward()
            backbone.zero_grad()

        return once

    samples = interleave(
        {
            "library eval": evaluate(backbone.net),
            "traced eval": evaluate(backbone),
            "library train": train(backbone.net),
            "traced train": train(backbone),
        },
        repeats=chosen.repeats,
        wait=wait,
    )
    return {
        "blocks": backbone.depth,
        "seconds": {key: summary(each) for key, each in samples.items()},
        "of_library": {mode: ratio(samples[f"library {mode}"], samples[f"traced {mode}"]) for mode in ("eval", "train")},
    }


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=9,
        rows={"type": int, "default": 32, "help": "images of a batch (default 32)"},
        networks={"nargs": "*", "help": "of timm's; none: five families"},
    )  # fmt: skip
    device, wait = begin(chosen)
    names = chosen.networks or NETWORKS
    return report("traced", chosen, {name: measure(name, chosen, device, wait) for name in names})


if __name__ == "__main__":
    main()
