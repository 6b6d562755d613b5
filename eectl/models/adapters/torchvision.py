"""Build torchvision's ResNets and Vision Transformers, and their adapters.

Beyond what torchvision offers: a small stem for small images, ViTs of any size, and images of any number of channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ResNet, VisionTransformer

from eectl.core.errors import EectlError
from eectl.models.adapters.args_and_weights import Option, load_weights, read_args
from eectl.models.backbone import Backbone, Feature, Hidden, StagedBackbone, TokenFeature

RESNET_OPTIONS: dict[str, Option] = {"stem": ("standard", "small")}
VIT_DROPOUT: dict[str, Option] = {"dropout": 0.0, "attention_dropout": 0.0}


class TorchvisionResNet(StagedBackbone):
    """The adapter of torchvision's ResNet: one block is one residual block (ResNet-18 has 8, ResNet-34 and -50 have 16)."""

    net: ResNet

    def __init__(self, net: ResNet) -> None:
        super().__init__(net, head_names=("avgpool", "fc"), classifiers=("fc",))

    def stem(self, inputs: Tensor) -> Hidden:
        net = self.net
        return Hidden(net.maxpool(net.relu(net.bn1(net.conv1(inputs)))))

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.fc(torch.flatten(self.net.avgpool(hidden.x), 1))
        return logits


class TorchvisionViT(Backbone):
    """The adapter of torchvision's ViT: one block is one encoder layer, the head is the last LayerNorm and the classifier."""

    net: VisionTransformer

    def __init__(self, net: VisionTransformer) -> None:
        blocks = [(f"encoder.layers.encoder_layer_{i}",) for i in range(len(net.encoder.layers))]
        super().__init__(net, block_names=blocks, head_names=("encoder.ln", "heads"), classifiers=("heads.head",))

    def stem(self, inputs: Tensor) -> Hidden:
        net = self.net
        x = net._process_input(inputs)
        x = torch.cat([net.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return Hidden(net.encoder.dropout(x + net.encoder.pos_embedding))

    def block(self, index: int, hidden: Hidden) -> Hidden:
        return Hidden(self.net.encoder.layers[index](hidden.x))

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.heads(self.net.encoder.ln(hidden.x)[:, 0])
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        side = self.net.image_size // self.net.patch_size
        return TokenFeature(hidden.x, grid=(side, side))


def build(
    name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> TorchvisionResNet | TorchvisionViT:
    """Build one of torchvision's networks by its name, or `vit`, whose size the options give.

    Args:
        name: such as resnet18 or vit_b_16.
        args: the recipe's `backbone.args`.
        input_shape: (channels, height, width).
        num_outputs: the number of logits.
        pretrained: whether torchvision's default weights are loaded, from its cache or by a download.

    Raises:
        EectlError: for options or images that the network does not take, and for weights that there are not or that fail to load.
    """
    backbone: TorchvisionResNet | TorchvisionViT
    if name in VITS:
        backbone = TorchvisionViT(_vit(name, args, input_shape, num_outputs))
    else:
        backbone = TorchvisionResNet(_resnet(name, args, input_shape, num_outputs))
    backbone.name = name
    if pretrained:
        load_weights(backbone, published_weights(name, input_shape), where=f"torchvision's weights of {name}")
    return backbone


def option_names(name: str) -> tuple[str, ...]:
    """Return the names of the options that a network takes."""
    return (*VITS[name], *VIT_DROPOUT) if name in VITS else tuple(RESNET_OPTIONS)


def _resnet(name: str, args: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int) -> ResNet:
    options = read_args(name, args, RESNET_OPTIONS)
    net: ResNet = models.get_model(name, weights=None, num_classes=num_outputs)
    if options["stem"] == "small":
        net.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif input_shape[0] != 3:
        net.conv1 = nn.Conv2d(input_shape[0], 64, 7, stride=2, padding=3, bias=False)
    else:
        return net
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def _vit(name: str, args: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int) -> VisionTransformer:
    options = read_args(name, args, VITS[name] | VIT_DROPOUT)
    channels, height, width = input_shape
    patch, dim, heads = options["patch_size"], options["dim"], options["heads"]
    if dim % heads:
        raise EectlError(f"backbone.args: dim is {dim} and heads {heads}; dim must be a multiple of heads")
    if height != width:
        raise EectlError(f"{name} takes square images, these are {height}×{width}; set data.image_size")
    if height % patch:
        near = max(patch, round(height / patch) * patch)
        fault = f"{name} cuts images into patches of {patch}, which images of {height}×{width} are no multiple of"
        raise EectlError(f"{fault}; set data.image_size={near}, or another backbone.args.patch_size")
    net = VisionTransformer(
        image_size=height,
        patch_size=patch,
        num_layers=options["depth"],
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=options["mlp_dim"],
        dropout=options["dropout"],
        attention_dropout=options["attention_dropout"],
        num_classes=num_outputs,
    )
    if channels != 3:  # initialised as the library's own
        net.conv_proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        nn.init.trunc_normal_(net.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))
        assert net.conv_proj.bias is not None
        nn.init.zeros_(net.conv_proj.bias)
    return net


def published_weights(name: str, input_shape: Sequence[int]) -> dict[str, Tensor]:
    """Return torchvision's default weights, from its cache or by a download; raises EectlError where none fit these images."""
    if name == "vit":
        raise EectlError(
            "backbone.pretrained: vit of any size has no published weights; name a file in backbone.weights, or take vit_b_16"
        )
    weights = models.get_model_weights(name).DEFAULT
    size = weights.meta["min_size"]
    if name in VITS and tuple(input_shape[1:]) != tuple(size):
        raise EectlError(f"torchvision's weights of {name} are for images of {size[0]}×{size[1]}; set data.image_size={size[0]}")
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a file cut short that fails its check sum
        raise EectlError(
            f"torchvision's weights of {name} cannot be downloaded ({error}); name a file with them in backbone.weights"
        ) from error
    return state


def _size(patch_size: int, dim: int, mlp_dim: int, depth: int, heads: int) -> dict[str, Option]:
    return {"patch_size": patch_size, "dim": dim, "mlp_dim": mlp_dim, "depth": depth, "heads": heads}


VITS: dict[str, dict[str, Option]] = {
    "vit": _size(4, 256, 256, 7, 8),  # the ViT-T of "How to Train Your Multi-Exit Model?" for CIFAR-100
    "vit_b_16": _size(16, 768, 3072, 12, 12),
    "vit_b_32": _size(32, 768, 3072, 12, 12),
    "vit_l_16": _size(16, 1024, 4096, 24, 16),
    "vit_l_32": _size(32, 1024, 4096, 24, 16),
    "vit_h_14": _size(14, 1280, 5120, 32, 16),
}
