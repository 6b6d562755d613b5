"""Multi-Scale DenseNets (Huang et al., 2018) of any size, and their adapter; by default the paper's anytime network for CIFAR.

The network is a flat list of layers on a tuple of feature maps, one for each scale, finest first, and the classifier after the
last layer. The classifiers in between are exits like those of any other network, and are not built here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.adapters.args_and_weights import Option, check_names, read_args
from eectl.models.backbone import Backbone, Feature, Hidden, MapFeature

Scales = tuple[Tensor, ...]


@dataclass(frozen=True)
class Config:
    """The sizes of an MSDNet. In brackets: the reference implementation's name (kalviny/MSDNet-PyTorch), where it differs.

    Attributes:
        blocks: [nBlocks] the number of groups of layers; groups only say how many layers there are.
        base: the number of layers in the first group.
        step: the number of layers in each other group (stepmode `even`); in the i-th after the first it is `step`·i + 1
            (`lin_grow`).
        stepmode: `even` or `lin_grow`.
        channels: [nChannels] the channels that layers start with, times the scale's growth factor.
        growth: [growthRate] the channels that each layer adds, times the scale's growth factor.
        growth_factors: [grFactor] one for each scale, finest first.
        bottleneck: whether a 1×1 convolution comes before each 3×3 one.
        bottleneck_factors: [bnFactor] one for each scale: the 1×1 convolution leaves at most so many times the outputs.
        reduction: the share of channels that a transition leaves; 0: there are no transitions.
        prune: `max`: after each 1/scales of the layers the finest scale is dropped and a transition follows; `min`: each of the
            last layers drops one, and transitions follow a third and two thirds of the layers.
        stem: `small` [CIFAR] keeps the resolution of images, `standard` [ImageNet] quarters it.
    """

    blocks: int = 7
    base: int = 4
    step: int = 2
    stepmode: str = "even"
    channels: int = 16
    growth: int = 6
    growth_factors: tuple[int, ...] = (1, 2, 4)
    bottleneck: bool = True
    bottleneck_factors: tuple[int, ...] = (1, 2, 4)
    reduction: float = 0.5
    prune: str = "max"
    stem: str = "small"

    @property
    def scales(self) -> int:
        """The number of scales the network starts with."""
        return len(self.growth_factors)

    @property
    def dense_layers(self) -> int:
        """The number of layers that grow features; the first layer and the transitions are not among them."""
        if self.stepmode == "even":
            return self.base + self.step * (self.blocks - 1)
        return self.base + sum(self.step * i + 1 for i in range(1, self.blocks))

    def scales_after(self, layer: int) -> int:
        """Return how many scales, the coarsest ones, are left after dense layer `layer` (from 1; 0 is the start)."""
        if layer == 0:
            return self.scales
        if self.prune == "min":
            return min(self.scales, self.dense_layers - layer + 1)
        return self.scales - (layer - 1) // ceil(self.dense_layers / self.scales)

    def shrinks_after(self, layer: int) -> bool:
        """Return whether a transition follows dense layer `layer`."""
        if self.reduction == 0:
            return False
        if self.prune == "min":
            return layer in (self.dense_layers // 3, 2 * self.dense_layers // 3)
        return self.scales_after(layer) < self.scales_after(layer - 1)


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return convolution → BatchNorm → ReLU; `stride` 2 halves the map, rounded up."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class FirstLayer(nn.Module):
    """Makes all scales of an image: the stem the finest, a strided convolution each of the others from the one before."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.growth_factors]
        self.stem = convolution(inputs, widths[0])
        if config.stem == "standard":
            self.stem = convolution(inputs, widths[0], kernel=7, stride=2).append(nn.MaxPool2d(3, 2, padding=1))
        self.coarser = nn.ModuleList(convolution(*pair, stride=2) for pair in pairwise(widths))

    def forward(self, images: Tensor) -> Scales:
        """Return one map for each scale, each half the size of the one before, of images [row, channel, height, width]."""
        scales = [self.stem(images)]
        for coarser in self.coarser:
            scales.append(coarser(scales[-1]))
        return tuple(scales)


class Growth(nn.Module):
    """Adds new features to those of one scale; half of them come from the next finer scale where there is one."""

    def __init__(self, channels: int, scale: int, config: Config, *, has_finer: bool) -> None:
        super().__init__()
        new = config.growth * config.growth_factors[scale]
        from_finer = new // 2 if has_finer else 0
        self.finer = _dense(channels, scale - 1, from_finer, config, stride=2) if has_finer else None
        self.same = _dense(channels, scale, new - from_finer, config, stride=1)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        """Return `x` [row, channel, height, width] with more channels; `finer` is the next finer scale's map."""
        grown = [self.same(x)] if self.finer is None else [self.finer(finer), self.same(x)]
        return torch.cat([x, *grown], dim=1)


def _dense(channels: int, scale: int, outputs: int, config: Config, *, stride: int) -> nn.Sequential:
    """Return what computes `outputs` new features from those of `scale`, whose bottleneck factor it has."""
    inputs = channels * config.growth_factors[scale]
    if not config.bottleneck:
        return convolution(inputs, outputs, stride=stride)
    width = min(inputs, config.bottleneck_factors[scale] * outputs)
    return nn.Sequential(convolution(inputs, width, kernel=1), convolution(width, outputs, stride=stride))


class DenseLayer(nn.Module):
    """Adds features to each of the coarsest `kept` of its `incoming` scales; it drops at most one scale."""

    def __init__(self, channels: int, config: Config, *, incoming: int, kept: int) -> None:
        super().__init__()
        finest = config.scales - incoming
        self.scales = nn.ModuleList(
            Growth(channels, scale, config, has_finer=scale > finest) for scale in range(config.scales - kept, config.scales)
        )

    def forward(self, scales: Scales) -> Scales:
        """Return the maps of the scales that are kept, from those of all incoming ones."""
        dropped = len(scales) - len(self.scales)
        return tuple(
            grow(scales[i], scales[i - 1] if i else None)  # the finest of all has none
            for i, grow in enumerate(self.scales, dropped)
        )


class Transition(nn.Module):
    """Leaves fewer channels at each scale, by a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(convolution(inputs * factor, outputs * factor, kernel=1) for factor in factors)

    def forward(self, scales: Scales) -> Scales:
        """Return maps of the same sizes with fewer channels."""
        return tuple(shrink(x) for shrink, x in zip(self.scales, scales, strict=True))


class MSDNet(nn.Module):
    """An MSDNet without the classifiers in between.

    The last classifier reads the coarsest scale: two strided convolutions (128 channels wide; with the `standard` stem as wide as
    their input), the mean, a linear layer. Weights start in He et al.'s normal distribution, as in the authors' Torch code.
    """

    def __init__(self, config: Config, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FirstLayer(channels, config)])
        width = config.channels  # at a scale of factor 1
        for number in range(1, config.dense_layers + 1):
            incoming, kept = config.scales_after(number - 1), config.scales_after(number)
            self.layers.append(DenseLayer(width, config, incoming=incoming, kept=kept))
            width += config.growth
            if config.shrinks_after(number):
                shrunk = int(config.reduction * width)
                self.layers.append(Transition(width, shrunk, config.growth_factors[-kept:]))
                width = shrunk
        coarsest = width * config.growth_factors[-1]
        inner = 128 if config.stem == "small" else coarsest
        self.classifier = nn.Sequential(
            convolution(coarsest, inner, stride=2),
            convolution(inner, inner, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inner, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [row, class] of images [row, channel, height, width]."""
        first, *others = self.layers
        scales: Scales = first(x)
        for layer in others:
            scales = layer(scales)
        logits: Tensor = self.classifier(scales[-1])
        return logits


class MSDNetBackbone(Backbone):
    """The adapter of MSDNet: a block is the first layer, a dense layer or a transition (19 by default), and the stem is empty.

    Exits read the coarsest scale; what a block computes at finer scales reaches only later exits.
    """

    net: MSDNet
    blocks_serve_later_exits = True
    default_head = "sdn"
    prefers_channels_last = True

    def __init__(self, net: MSDNet) -> None:
        names = [(f"layers.{i}",) for i in range(len(net.layers))]
        super().__init__(net, block_names=names, head_names=("classifier",), classifiers=("classifier.4",))

    def stem(self, inputs: Tensor) -> Hidden:
        return Hidden(inputs)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        return Hidden(self.net.layers[index](hidden.x))

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(hidden.x[-1])
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        return MapFeature(hidden.x[-1])


def build(
    name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> MSDNetBackbone:
    """Build an MSDNet; `args` are the fields of Config. Raises EectlError for sizes that cannot be and for published weights."""
    config = _read_config(name, args)
    if pretrained:
        raise EectlError(f"backbone.pretrained: {name} has no published weights; name a file in backbone.weights")
    return MSDNetBackbone(MSDNet(config, channels=input_shape[0], num_classes=num_outputs))


def _read_config(name: str, args: Mapping[str, Any]) -> Config:
    default = Config()
    check_names(name, args, vars(default))
    bottleneck = args.get("bottleneck", default.bottleneck)
    if not isinstance(bottleneck, bool):
        raise EectlError(f"backbone.args.bottleneck is {bottleneck!r}; it must be true or false")
    simple = {key: value for key, value in args.items() if key in OPTIONS}
    config = Config(
        **read_args(name, simple, OPTIONS),
        growth_factors=_read_factors("growth_factors", args.get("growth_factors", default.growth_factors)),
        bottleneck=bottleneck,
        bottleneck_factors=_read_factors("bottleneck_factors", args.get("bottleneck_factors", default.bottleneck_factors)),
    )
    if len(config.bottleneck_factors) != config.scales:
        raise EectlError(
            f"backbone.args: {config.scales} growth_factors and {len(config.bottleneck_factors)} bottleneck_factors; "
            f"{name} takes one of each for each scale"
        )
    _check_layers(name, config)
    return config


def _read_factors(key: str, value: Any) -> tuple[int, ...]:
    if not (isinstance(value, (list, tuple)) and value and all(type(factor) is int and factor > 0 for factor in value)):
        raise EectlError(f"backbone.args.{key} is {value!r}; it must be a list of whole numbers from 1, one for each scale")
    return tuple(value)


def _check_layers(name: str, config: Config) -> None:
    """Raise EectlError where the layers are too few to drop scales one at a time, or a transition leaves no channel."""
    left = [config.scales_after(layer) for layer in range(config.dense_layers + 1)]
    if left[-1] != 1 or any(before - after > 1 for before, after in pairwise(left)):
        raise EectlError(
            f"backbone.args: with {config.dense_layers} layers and prune {config.prune}, {name} cannot drop its {config.scales} "
            f"scales one by one until the coarsest is left; set more base layers, another prune, or fewer growth_factors"
        )
    width = config.channels
    for layer in range(1, config.dense_layers + 1):
        width += config.growth
        width = int(config.reduction * width) if config.shrinks_after(layer) else width
        if width == 0:
            raise EectlError(f"backbone.args.reduction is {config.reduction}; no channel is left after layer {layer} of {name}")


OPTIONS: dict[str, Option] = {
    **{key: getattr(Config(), key) for key in ("blocks", "base", "step", "channels", "growth", "reduction")},
    "stepmode": ("even", "lin_grow"),
    "prune": ("max", "min"),
    "stem": ("small", "standard"),
}
