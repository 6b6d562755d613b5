"""The probe's activations against hooks on the libraries' own modules, for every shape that flows between blocks."""

import pytest
import torch
from torch import nn

from eectl.analyses.probe import VIEWS, probe, resolve_view
from eectl.core.errors import EectlError
from eectl.data import Batch
from eectl.models.build import attach_exits, build_backbone
from eectl.recipe.recipe import BackboneSection

TINY_VIT = {"patch_size": 4, "dim": 16, "mlp_dim": 16, "depth": 3, "heads": 2}
TINY_BERT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class Keep:
    """Keeps what it is given."""

    def __init__(self, view):
        self.view, self.seen, self.targets = view, {}, []

    def take(self, block, activations, targets):
        self.seen.setdefault(block, []).append(activations.clone())
        self.targets.append((block, targets.clone()))


def network(name, shape, **args):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSection(name=name, args=args), input_shape=shape, num_outputs=3)
    return attach_exits(backbone, after=[0], heads="auto", num_outputs=3, input_shape=shape).eval()


def seen_by_hooks(model, modules, inputs):
    """What the named modules of the library's network give, in one forward of its own."""
    found = {}
    handles = [
        model.backbone.net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
        for name in modules
    ]
    with torch.no_grad():
        model.backbone(inputs)
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


def run(model, inputs, view, *, size=4, blocks=None):
    reader = Keep(view)
    batches = [Batch(part, torch.arange(len(part)), torch.arange(len(part))) for part in inputs.split(size)]
    probe(model, batches, [reader], prepare=lambda each: each, blocks=blocks)
    return {block: torch.cat(parts) for block, parts in reader.seen.items()}, reader


def test_maps_of_a_resnet():
    model = network("resnet20", (1, 8, 8))
    inputs = torch.randn(6, 1, 8, 8)
    hooked = seen_by_hooks(model, ["layer1.0", "layer2.0", "layer3.2"], inputs)
    flat, _ = run(model, inputs, "flattened")
    pooled, _ = run(model, inputs, "pooled")
    assert sorted(flat) == list(range(9))
    for block, own in zip((0, 3, 8), hooked, strict=True):
        torch.testing.assert_close(flat[block], own.flatten(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled[block], own.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)


def test_tokens_of_a_vit():
    model = network("vit", (1, 8, 8), **TINY_VIT)
    inputs = torch.randn(5, 1, 8, 8)
    names = [f"encoder.layers.encoder_layer_{index}" for index in range(3)]
    hooked = seen_by_hooks(model, names, inputs)
    views = {view: run(model, inputs, view)[0] for view in VIEWS}
    for block, own in enumerate(hooked):
        torch.testing.assert_close(views["flattened"][block], own.flatten(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(views["class-token"][block], own[:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(views["pooled"][block], own[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-6)


def test_all_scales_of_msdnet():
    model = network("msdnet", (3, 32, 32), blocks=3, base=3, step=1)
    inputs = torch.randn(3, 3, 32, 32)
    flat, _ = run(model, inputs, "flattened", blocks=[1])
    pooled, _ = run(model, inputs, "pooled", blocks=[1])
    with torch.no_grad():
        hidden = model.backbone.block(1, model.backbone.block(0, model.backbone.stem(inputs)))
    assert len(hidden.x) > 1 and list(flat) == [1]
    torch.testing.assert_close(flat[1], torch.cat([scale.reshape(3, -1) for scale in hidden.x], dim=1))
    torch.testing.assert_close(pooled[1], torch.cat([scale.flatten(2).mean(2) for scale in hidden.x], dim=1))


def test_padding_of_texts_does_not_count():
    model = network("hf/bert", (3, 8), **TINY_BERT)
    short = torch.stack([torch.tensor([2, 5, 6, 3]), torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])[None]
    padded = torch.cat([short, torch.zeros(1, 3, 4, dtype=torch.int64)], dim=2)
    for view in ("class-token", "pooled"):
        alone, _ = run(model, short, view)
        with_padding, _ = run(model, padded, view)
        for block in alone:
            torch.testing.assert_close(with_padding[block], alone[block], rtol=1e-4, atol=1e-5)


def test_several_readers_share_one_pass():
    model = network("resnet20", (1, 8, 8))
    passes = []
    model.backbone.net.conv1.register_forward_hook(lambda *_: passes.append(1))
    inputs = torch.randn(6, 1, 8, 8)
    batch = Batch(inputs, torch.arange(6), torch.arange(6))
    readers = [Keep("flattened"), Keep("pooled"), Keep("pooled")]
    probe(model, [batch, batch], readers, prepare=lambda each: each)
    assert len(passes) == 2
    assert readers[0].seen[0][0].shape == (6, 16 * 64) and torch.equal(readers[1].seen[4][1], readers[2].seen[4][1])
    assert [block for block, _ in readers[0].targets] == list(range(9)) * 2


def test_views_that_are_not_there():
    assert resolve_view("auto", is_text=False, default="flattened") == "flattened"
    assert resolve_view("auto", is_text=True, default="flattened") == "class-token"
    with pytest.raises(EectlError, match=r"--view flattened: texts differ in length; take class-token or pooled"):
        resolve_view("flattened", is_text=True, default="pooled")
    with pytest.raises(EectlError, match=r"unknown --view 'poled'.*did you mean 'pooled'"):
        resolve_view("poled", is_text=False, default="pooled")
    model = network("resnet20", (1, 8, 8))
    with pytest.raises(EectlError, match="--view class-token: resnet20 has no class token; take pooled"):
        run(model, torch.randn(2, 1, 8, 8), "class-token")
    assert not any(isinstance(module, nn.Module) and module.training for module in model.modules())
