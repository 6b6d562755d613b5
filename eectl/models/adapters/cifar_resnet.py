"""The ResNets for CIFAR of He et al. (2016), which no library has, and their adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.adapters.args_and_weights import read_args
from eectl.models.backbone import Hidden, StagedBackbone


class CifarBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut; a 1×1 convolution (option B) where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return [row, outputs, height / stride, width / stride] of a map [row, inputs, height, width]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return y


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44 or -56 for small images: a 3×3 stem, then three stages, 16, 32 and 64 channels wide.

    Each stage has (depth − 2) / 6 blocks. He et al. (2016), §4.2, with projection shortcuts and their initialisation.
    """

    def __init__(self, depth: int, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks=(depth - 2) // 6, stride=1)
        self.layer2 = _stage(16, 32, blocks=(depth - 2) // 6, stride=2)
        self.layer3 = _stage(32, 64, blocks=(depth - 2) // 6, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [row, class] of images [row, channel, height, width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class CifarResNetBackbone(StagedBackbone):
    """The adapter of CifarResNet: one block is one residual block (ResNet-20 has 9)."""

    net: CifarResNet

    def __init__(self, net: CifarResNet) -> None:
        super().__init__(net, head_names=("avgpool", "fc"), classifiers=("fc",))

    def stem(self, inputs: Tensor) -> Hidden:
        return Hidden(self.net.relu(self.net.bn1(self.net.conv1(inputs))))

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.fc(torch.flatten(self.net.avgpool(hidden.x), 1))
        return logits


def build(
    name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> CifarResNetBackbone:
    """Build `resnet20`, `resnet32`, `resnet44` or `resnet56`; raises EectlError for options and for published weights."""
    read_args(name, args, {})
    if pretrained:
        raise EectlError(f"backbone.pretrained: {name} has no published weights; name a file in backbone.weights")
    return CifarResNetBackbone(CifarResNet(int(name.removeprefix("resnet")), channels=input_shape[0], num_classes=num_outputs))
