"""MSDNet: the paper's network, the layer rule by hand, and options that fit no network."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.models.adapters.msdnet import Config, DenseLayer, MSDNet, MSDNetBackbone, Transition
from eectl.models.backbone import dry_run
from eectl.models.build import attach_exits, build_backbone
from eectl.recipe.recipe import BackboneSection

IMAGENET = {
    **{"blocks": 5, "base": 4, "step": 4, "channels": 32, "growth": 16, "stem": "standard"},
    **{"growth_factors": [1, 2, 4, 4], "bottleneck_factors": [1, 2, 4, 4]},
}


def build(shape: tuple[int, int, int] = (3, 32, 32), num_outputs: int = 100, **args: Any) -> MSDNetBackbone:
    backbone = build_backbone(BackboneSection(name="msdnet", args=args), input_shape=shape, num_outputs=num_outputs)
    assert isinstance(backbone, MSDNetBackbone)
    return backbone


def transitions(net: MSDNet) -> list[int]:
    return [i for i, layer in enumerate(net.layers) if isinstance(layer, Transition)]


def test_the_papers_cifar_network() -> None:
    """Its 19 flat modules, their widths at the coarsest scale, and where scales are dropped."""
    backbone = build()
    hidden = dry_run(backbone, (3, 32, 32))
    assert (backbone.depth, transitions(backbone.net)) == (19, [8, 15])
    widths = [64, 88, 112, 136, 160, 184, 208, 232, 116, 140, 164, 188, 212, 236, 260, 128, 152, 176, 200]
    assert [backbone.feature(h).map().shape[1:] for h in hidden] == [(width, 8, 8) for width in widths]
    assert [len(h.x) for h in hidden] == [3] * 7 + [2] * 7 + [1] * 5
    assert [x.shape[1:] for x in hidden[6].x] == [(52, 32, 32), (104, 16, 16), (208, 8, 8)]


def test_the_papers_costs() -> None:
    """The trunk's 48.46 M hold 2 operations per element of its BatchNorms (427,776 elements); the heads' 4.73 M hold none."""
    backbone = build()
    model = attach_exits(backbone, after=range(18), heads="auto", num_outputs=100, input_shape=(3, 32, 32))
    elements: list[int] = []
    for module in backbone.net.layers.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _module, _inputs, output: elements.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        dry_run(backbone, (3, 32, 32))
    assert counter.get_total_flops() == 2 * 47_602_688
    assert 47_602_688 + 2 * sum(elements) == 48_458_240
    costs = measure_costs(model, (3, 32, 32))
    assert costs.plain == 47_602_688 + 4_289_024
    assert sum(costs.heads) == 4_729_600


@pytest.mark.parametrize(
    ("args", "depth", "shrinks", "parameters"),
    [
        ({}, 19, [8, 15], 853_984),
        ({"blocks": 5, "stepmode": "lin_grow", "step": 1, "base": 1}, 18, [7, 13], 827_196),
        ({"prune": "min"}, 19, [6, 12], 822_462),
        ({"bottleneck": False, "reduction": 0.3, "growth": 4}, 19, [8, 15], 521_608),
        ({"reduction": 0}, 17, [], None),
        (IMAGENET, 24, [7, 13, 19], 13_322_536),
    ],
    ids=["anytime", "batch", "min", "no-bottleneck", "no-reduction", "imagenet"],
)
def test_sizes(args: dict[str, Any], depth: int, shrinks: list[int], parameters: int | None) -> None:
    """Parameters (100 classes, ImageNet 1,000) as in the reference implementation without its intermediate classifiers,
    less the bias of its ImageNet stem, which a BatchNorm takes out again."""
    with torch.device("meta"):
        backbone = build(num_outputs=1000 if args is IMAGENET else 100, **args)
    assert (backbone.depth, transitions(backbone.net)) == (depth, shrinks)
    assert parameters in (None, sum(p.numel() for p in backbone.net.parameters()))


def test_scales_are_dropped_finest_first() -> None:
    assert [Config(prune="min").scales_after(i) for i in (0, 13, 14, 15, 16)] == [3, 3, 3, 2, 1]
    assert [Config().scales_after(i) for i in (0, 6, 7, 12, 13, 16)] == [3, 3, 2, 2, 1, 1]
    assert Config(blocks=3, stepmode="lin_grow", base=1, step=2).dense_layers == 1 + 3 + 5


def test_a_dense_layer_by_hand() -> None:
    """Old features, then half of the new ones from the next finer scale at stride 2, then half from the same scale."""
    config = Config(channels=2, growth=2, growth_factors=(1, 2), bottleneck=False, bottleneck_factors=(1, 1))
    layer = DenseLayer(2, config, incoming=2, kept=2).eval()
    fine, coarse = torch.randn(3, 2, 6, 6), torch.randn(3, 4, 3, 3)

    def relu_conv(path: nn.Sequential, x: torch.Tensor, stride: int) -> torch.Tensor:
        scale = (1 + 1e-5) ** -0.5  # a fresh BatchNorm's
        return functional.relu(functional.conv2d(x, path[0].weight, stride=stride, padding=1) * scale)

    first, second = layer.scales
    found = layer((fine, coarse))
    torch.testing.assert_close(found[0], torch.cat([fine, relu_conv(first.same, fine, 1)], dim=1))
    parts = [coarse, relu_conv(second.finer, fine, 2), relu_conv(second.same, coarse, 1)]
    torch.testing.assert_close(found[1], torch.cat(parts, dim=1))
    assert [x.shape[1] for x in found] == [4, 8]

    dropping = DenseLayer(2, config, incoming=2, kept=1).eval()
    (only,) = dropping((fine, coarse))
    parts = [coarse, relu_conv(dropping.scales[0].finer, fine, 2), relu_conv(dropping.scales[0].same, coarse, 1)]
    torch.testing.assert_close(only, torch.cat(parts, dim=1))


def test_the_bottleneck_is_as_wide_as_the_factor_of_the_scale_it_reads() -> None:
    layer = DenseLayer(16, Config(bottleneck_factors=(1, 3, 4)), incoming=3, kept=3)
    middle, coarsest = layer.scales[1], layer.scales[2]
    assert [path[0][0].out_channels for path in (middle.finer, middle.same)] == [1 * 6, 3 * 6]
    assert [path[0][0].out_channels for path in (coarsest.finer, coarsest.same)] == [min(32, 3 * 12), 4 * 12]


def test_an_exit_does_not_train_what_its_block_computes_for_later_ones() -> None:
    model = attach_exits(build((3, 8, 8)), after=[2], heads="auto", num_outputs=100, input_shape=(3, 8, 8))
    names = [name for name, _ in model.backbone.net.named_parameters() if model.backbone.locate(name) <= 2]
    model(torch.randn(2, 3, 8, 8), exits={1})[0].logits.sum().backward()
    unread = ("layers.1.scales.0.", "layers.2.scales.0.", "layers.2.scales.1.")
    assert [name for name in names if model.backbone.net.get_parameter(name).grad is None] == [
        name for name in names if name.startswith(unread)
    ]
    model(torch.randn(2, 3, 8, 8))[1].logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"step_mode": "even"}, r"args.step_mode: .*'stepmode'.*blocks, base"),
        ({"stepmode": "odd"}, "args.stepmode is 'odd'.*even.*lin_grow"),
        ({"blocks": 0}, "args.blocks is 0.*from 1"),
        ({"bottleneck": "no"}, "args.bottleneck is 'no'.*true.*false"),
        ({"growth_factors": "1-2-4"}, "args.growth_factors is '1-2-4'.*list"),
        ({"growth_factors": [1, 0]}, r"args.growth_factors is \[1, 0\].*list"),
        ({"bottleneck_factors": []}, r"args.bottleneck_factors is \[\].*list"),
        ({"growth_factors": [1, 2]}, "2 growth_factors .*3 bottleneck_factors"),
        ({"blocks": 1, "base": 4}, "4 layers .*prune max.*3 scales"),
        ({"blocks": 1, "base": 1, "prune": "min"}, "1 layers .*prune min"),
        ({"reduction": 0.01}, "args.reduction is 0.01.*layer 7"),
        ({"reduction": 1}, "args.reduction is 1;.*0.*1"),
    ],
)
def test_options_that_fit_no_network(args: dict[str, Any], says: str) -> None:
    with pytest.raises(EectlError, match=says):
        build(**args)


def test_there_are_no_published_weights() -> None:
    with pytest.raises(EectlError, match=r"backbone\.pretrained: msdnet .*backbone\.weights"):
        build_backbone(BackboneSection(name="msdnet", pretrained=True), input_shape=(3, 32, 32), num_outputs=10)


def test_the_start_is_he_et_als() -> None:
    """Convolutions in N(0, 2 / (kernel² · outputs)), the classifier's bias at 0."""
    net = build().net
    weight = net.classifier[0][0].weight
    assert abs(weight.std() / (2 / (9 * 128)) ** 0.5 - 1) < 0.02
    assert not net.classifier[-1].bias.any()
