"""How fast is eectl's pass through a library's network beside that library's own forward pass?

Both run the same weights in turn, in eval mode and in training. `of_library` is the library's seconds over ours: 1 is as fast.
"""

from collections.abc import Callable

import torch
from measuring import begin, interleave, options, ratio, report, summary
from torch import Tensor

from eectl.models.backbone import Backbone
from eectl.models.build import build_backbone
from eectl.recipe.recipe import BackboneSection

SIZE, LENGTH, VOCABULARY, NUM_OUTPUTS = 64, 128, 30000, 10
WIDTHS = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TEXTS = {
    "hf/modernbert": WIDTHS | {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "hf/mpnet": WIDTHS | {"vocab_size": VOCABULARY},
    "hf/llama": WIDTHS | {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_key_value_heads": 12},
    "hf/gpt2": {"n_embd": 384, "n_layer": 6, "n_head": 12, "vocab_size": VOCABULARY, "pad_token_id": 0},
}
IMAGES = {
    **{
        f"timm/{name}": {}
        for name in ("mobilevit_xxs", "efficientformerv2_s0", "pvt_v2_b0", "eva02_tiny_patch14_224", "xception41")
    },
    "hf/dinov2": {"hidden_size": 192, "num_attention_heads": 3},
}


def build(name: str, rows: int) -> tuple[Backbone, Tensor, Callable[[Tensor], Tensor]]:
    """The network, inputs (a quarter of the texts with padding), and the library's own forward pass."""
    texts = name in TEXTS
    shape = (3, LENGTH) if texts else (3, SIZE, SIZE)
    torch.manual_seed(0)
    spec = BackboneSection(name=name, args=(TEXTS if texts else IMAGES).get(name, {}))
    backbone = build_backbone(spec, input_shape=shape, num_outputs=NUM_OUTPUTS)
    if not texts:
        own = backbone.net if name.startswith("timm/") else lambda images: backbone.net(pixel_values=images).logits
        return backbone, torch.randn(rows, *shape), own
    inputs = torch.stack([torch.randint(5, VOCABULARY, (rows, LENGTH)), torch.ones(rows, LENGTH), torch.zeros(rows, LENGTH)], 1)
    inputs[: rows // 4, :2, LENGTH // 2 :] = torch.tensor([backbone.net.config.pad_token_id, 0])[:, None]
    return backbone, inputs.long(), lambda rows: backbone.net(input_ids=rows[:, 0], attention_mask=rows[:, 1]).logits


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> dict:
    backbone, inputs, own = build(name, 4 if chosen.quick else chosen.rows)
    backbone, inputs = backbone.to(device), inputs.to(device)

    def evaluate(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def once() -> None:
            backbone.eval()
            with torch.inference_mode():
                run(inputs)

        return once

    def train(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def once() -> None:
            backbone.train()
            run(inputs).square().mean().backward()
            backbone.zero_grad()

        return once

    samples = interleave(
        {
            "library eval": evaluate(own),
            "eectl eval": evaluate(backbone),
            "library train": train(own),
            "eectl train": train(backbone),
        },
        repeats=chosen.repeats,
        wait=wait,
    )
    return {
        "blocks": backbone.depth,
        "seconds": {key: summary(each) for key, each in samples.items()},
        "of_library": {mode: ratio(samples[f"library {mode}"], samples[f"eectl {mode}"]) for mode in ("eval", "train")},
    }


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=9,
        rows={"type": int, "default": 32, "help": "images or texts of a batch (default 32)"},
        networks={"nargs": "*", "help": "timm/NAME or hf/TYPE; none: five families of each library"},
    )  # fmt: skip
    device, wait = begin(chosen)
    return report(
        "adapters", chosen, {name: measure(name, chosen, device, wait) for name in chosen.networks or [*IMAGES, *TEXTS]}
    )


if __name__ == "__main__":
    main()
