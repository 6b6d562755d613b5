"""Multi-Scale DenseNet (Huang et al., 2018), by parameters; the default is the paper's network for CIFAR, anytime prediction.

A flat list of layers on a tuple of feature maps, one per scale, finest first, and the classifier of the last one. The classifiers
in between are exits like any other network's: this module builds none.
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
    """The sizes of an MSDNet. In brackets, the reference implementation's name (kalviny/MSDNet-PyTorch) where it differs.

    `blocks` [nBlocks]: how many groups of layers, which only count them: the first has `base` layers, each other `step` (`even`)
    or, the i-th after the first, `step`·i + 1 (`lin_grow`). `channels` [nChannels] and `growth` [growthRate] are multiplied by
    `growth_factors` [grFactor] at each scale, finest first; a 1×1 convolution before each 3×3 one leaves at most
    `bottleneck_factors` [bnFactor] times its outputs. With `prune` `max` a scale is dropped, finest first, after each
    1/scales of the layers, and then all channels shrink to the share `reduction` (0: they stay); with `min` each of the last
    layers drops one, and the channels shrink after one and two thirds. The stem `small` [CIFAR] keeps the resolution, `standard`
    [ImageNet] quarters it.
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
        """How many scales, the coarsest ones, are left after dense layer `layer` (from 1; 0 is the start)."""
        if layer == 0:
            return self.scales
        if self.prune == "min":
            return min(self.scales, self.dense_layers - layer + 1)
        return self.scales - (layer - 1) // ceil(self.dense_layers / self.scales)

    def shrinks_after(self, layer: int) -> bool:
        """Whether a transition follows dense layer `layer`."""
        if self.reduction == 0:
            return False
        if self.prune == "min":
            return layer in (self.dense_layers // 3, 2 * self.dense_layers // 3)
        return self.scales_after(layer) < self.scales_after(layer - 1)


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution → BatchNorm → ReLU; `stride` 2 halves the map, rounded up."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class FirstLayer(nn.Module):
    """An image → all scales: the stem gives the finest, a strided convolution each of the others from the one before."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.growth_factors]
        self.stem = convolution(inputs, widths[0])
        if config.stem == "standard":
            self.stem = convolution(inputs, widths[0], kernel=7, stride=2).append(nn.MaxPool2d(3, 2, padding=1))
        self.coarser = nn.ModuleList(convolution(*pair, stride=2) for pair in pairwise(widths))

    def forward(self, images: Tensor) -> Scales:
        """[row, channel, height, width] → one map per scale, each half of the one before."""
        scales = [self.stem(images)]
        for coarser in self.coarser:
            scales.append(coarser(scales[-1]))
        return tuple(scales)


class Growth(nn.Module):
    """One scale's new features, appended to its old ones; half of them come from the next finer scale where there is one."""

    def __init__(self, channels: int, scale: int, config: Config, *, has_finer: bool) -> None:
        super().__init__()
        new = config.growth * config.growth_factors[scale]
        from_finer = new // 2 if has_finer else 0
        self.finer = _dense(channels, scale - 1, from_finer, config, stride=2) if has_finer else None
        self.same = _dense(channels, scale, new - from_finer, config, stride=1)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        """[row, channel, height, width], and the map of twice the size → the map with more channels."""
        grown = [self.same(x)] if self.finer is None else [self.finer(finer), self.same(x)]
        return torch.cat([x, *grown], dim=1)


def _dense(channels: int, scale: int, outputs: int, config: Config, *, stride: int) -> nn.Sequential:
    """The path from the features of `scale` to `outputs` new ones; the bottleneck's factor is that of the scale it reads."""
    inputs = channels * config.growth_factors[scale]
    if not config.bottleneck:
        return convolution(inputs, outputs, stride=stride)
    width = min(inputs, config.bottleneck_factors[scale] * outputs)
    return nn.Sequential(convolution(inputs, width, kernel=1), convolution(width, outputs, stride=stride))


class DenseLayer(nn.Module):
    """Grows the features of each scale that it keeps, the coarsest `kept` of those that come in; at most one is dropped."""

    def __init__(self, channels: int, config: Config, *, incoming: int, kept: int) -> None:
        super().__init__()
        finest = config.scales - incoming
        self.scales = nn.ModuleList(
            Growth(channels, scale, config, has_finer=scale > finest) for scale in range(config.scales - kept, config.scales)
        )

    def forward(self, scales: Scales) -> Scales:
        """`incoming` maps → `kept` maps."""
        dropped = len(scales) - len(self.scales)
        return tuple(
            grow(scales[i], scales[i - 1] if i else None)  # the finest of all has none
            for i, grow in enumerate(self.scales, dropped)
        )


class Transition(nn.Module):
    """A 1×1 convolution at each scale that leaves fewer channels."""

    def __init__(self, inputs: int, outputs: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(convolution(inputs * factor, outputs * factor, kernel=1) for factor in factors)

    def forward(self, scales: Scales) -> Scales:
        """Maps → maps of the same sizes."""
        return tuple(shrink(x) for shrink, x in zip(self.scales, scales, strict=True))


class MSDNet(nn.Module):
    """An MSDNet without its intermediate classifiers; the last one reads the coarsest scale.

    Two strided convolutions (128 channels wide, or with the `standard` stem as wide as their input), the mean, a linear layer.
    He et al.'s normal initialisation, as in the authors' Torch code.
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
        """Logits [row, class] of images [row, channel, height, width]."""
        first, *others = self.layers
        scales: Scales = first(x)
        for layer in others:
            scales = layer(scales)
        logits: Tensor = self.classifier(scales[-1])
        return logits


class MSDNetBackbone(Backbone):
    """An MSDNet; one block = one entry of its flat list: the first layer, each dense layer, each transition (19 by default).

    The stem is empty. Exits read the coarsest scale; what a block computes at the finer ones reaches only later exits.
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
    """`msdnet`; `args` are the fields of Config. Raises EectlError for options that fit no network and for published weights."""
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
