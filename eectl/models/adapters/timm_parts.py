"""The adapters of timm's networks: one for ViTs, and one for all networks that run their modules one after another.

A table says for each of timm's modules (families) which adapter takes it, and names its parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from timm.models.byobnet import ByobNet
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nfnet import NormFreeNet
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from eectl.models.backbone import Backbone, Feature, Hidden, MapFeature, TokenFeature


@dataclass(frozen=True)
class Parts:
    """The names of a network's modules, in the order in which its forward pass runs them; `a.*` means each child of `a`.

    Attributes:
        stem: the modules before the first block.
        stages: the modules that hold the blocks. The blocks are the children of a stage, or of its child `blocks` if it has one;
            its child `downsample`, which runs before them, then belongs to the first of them.
        head: the modules after the last block.
        classifier: the head's linear layer.
        drops: whether the network drops features before the classifier in its own code, at the rate `net.drop_rate`, and not in
            a module.
    """

    stem: tuple[str, ...]
    stages: tuple[str, ...]
    head: tuple[str, ...]
    classifier: str
    drops: bool = field(default=False, kw_only=True)

    def blocks(self, net: nn.Module) -> Iterator[tuple[str, ...]]:
        """Yield the names of each block's modules."""
        for pattern in self.stages:
            for name in _children(net, pattern.removesuffix(".*")) if pattern.endswith(".*") else [pattern]:
                if not hasattr(net.get_submodule(name), "blocks"):
                    yield from ((child,) for child in _children(net, name))
                    continue
                before = [f"{name}.downsample"] if hasattr(net.get_submodule(name), "downsample") else []
                blocks = _children(net, f"{name}.blocks")
                yield (*before, *blocks[:1])  # a stage of no blocks still runs what comes before them
                yield from ((block,) for block in blocks[1:])


def _children(net: nn.Module, name: str) -> list[str]:
    return [f"{name}.{child}" for child, _ in net.get_submodule(name).named_children()]


class TimmMaps(Backbone):
    """The adapter of CNNs that run their modules one after another; a block is a residual block in most of them."""

    default_head = "sdn"
    prefers_channels_last = True
    net: Any

    def __init__(self, net: nn.Module, _input_shape: Sequence[int], *, parts: Parts) -> None:
        super().__init__(net, block_names=list(parts.blocks(net)), head_names=parts.head, classifiers=(parts.classifier,))
        self.parts = parts

    def _run(self, names: Sequence[str], x: Any) -> Any:
        for name in names:
            x = self.net.get_submodule(name)(x)
        return x

    def stem(self, inputs: Tensor) -> Hidden:
        return Hidden(self._run(self.parts.stem, inputs))

    def block(self, index: int, hidden: Hidden) -> Hidden:
        return Hidden(self._run(self.block_names[index], hidden.x))

    def head(self, hidden: Hidden) -> Tensor:
        """Run timm's `forward_head`, but with dropout where the classifier trains: the network's own flag is the stem's."""
        *before, last = self.parts.head
        x = self._run(before, hidden.x)
        if self.parts.drops and self.net.drop_rate:
            x = functional.dropout(x, p=float(self.net.drop_rate), training=self.net.get_submodule(last).training)
        logits: Tensor = self._run([last], x)
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        return MapFeature(hidden.x)


class TimmWindows(TimmMaps):
    """The adapter of Swin Transformers (1 and 2), whose maps are [row, height, width, channel]."""

    default_head = "linear"
    prefers_channels_last = False

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        return MapFeature(hidden.x.permute(0, 3, 1, 2))


class TimmMixer(TimmMaps):
    """The adapter of MLP-Mixer, ResMLP and gMLP, whose features are patches [row, patch, channel] with no class token."""

    default_head = "linear"
    prefers_channels_last = False

    def head(self, hidden: Hidden) -> Tensor:
        """Run the last norm, take the mean over patches, and classify."""
        logits: Tensor = self.net.forward_head(self.net.norm(hidden.x))
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        return TokenFeature(hidden.x, self.net.stem.grid_size, prefix=0, has_cls=False)


class TimmViT(Backbone):
    """The adapter of timm's VisionTransformer: ViT, DeiT and hybrids, with whatever class, distillation and register tokens."""

    net: VisionTransformer

    def __init__(self, net: VisionTransformer, input_shape: Sequence[int]) -> None:
        own = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")
        super().__init__(
            net,
            block_names=[(f"blocks.{i}",) for i in range(len(net.blocks))],
            head_names=own,
            classifiers=[name for name in ("head", "head_dist") if hasattr(net, name)],
        )
        height, width = net.patch_embed.dynamic_feat_size(tuple(input_shape[1:]))
        self.grid = (int(height), int(width))

    def stem(self, inputs: Tensor) -> Hidden:
        net = self.net
        return Hidden(net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(inputs)))))

    def block(self, index: int, hidden: Hidden) -> Hidden:
        return Hidden(self.net.blocks[index](hidden.x))

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.forward_head(self.net.norm(hidden.x))
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        return TokenFeature(hidden.x, self.grid, prefix=self.net.num_prefix_tokens, has_cls=self.net.has_class_token)


Adapter = tuple[type[nn.Module], Callable[[Any, Sequence[int]], Backbone]]

_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_RESNET = Parts(("conv1", "bn1", "act1", "maxpool"), _LAYERS, ("global_pool", "fc"), "fc", drops=True)
_POOL_LAST = ("conv_head", "bn2", "global_pool", "classifier")
_POOL_FIRST = ("global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier")
_EFFICIENT = Parts(("conv_stem", "bn1"), ("blocks.*",), _POOL_LAST, "classifier", drops=True)
_MOBILE = Parts(("conv_stem", "bn1"), ("blocks.*",), _POOL_FIRST, "classifier", drops=True)
_REGNET = Parts(("stem",), ("s1", "s2", "s3", "s4"), ("final_conv", "head"), "head.fc")
_CONVNEXT = Parts(("stem",), ("stages.*",), ("norm_pre", "head"), "head.fc")
_RESNETV2 = Parts(("stem",), ("stages.*",), ("norm", "head"), "head.fc")
_BYOB = Parts(("stem",), ("stages.*",), ("final_conv", "head"), "head.fc")
_NFNET = Parts(("stem",), ("stages.*",), ("final_conv", "final_act", "head"), "head.fc")
_SWIN = Parts(("patch_embed",), ("layers.*",), ("norm", "head"), "head.fc")
_MIXER = Parts(("stem",), ("blocks",), ("norm", "head_drop", "head"), "head")

ADAPTERS: dict[str, Adapter] = {  # timm's module → its class, our adapter
    **dict.fromkeys(("vision_transformer", "vision_transformer_hybrid", "deit"), (VisionTransformer, TimmViT)),
    **dict.fromkeys(("resnet", "res2net", "resnest", "sknet"), (ResNet, partial(TimmMaps, parts=_RESNET))),
    "resnetv2": (ResNetV2, partial(TimmMaps, parts=_RESNETV2)),
    "convnext": (ConvNeXt, partial(TimmMaps, parts=_CONVNEXT)),
    "regnet": (RegNet, partial(TimmMaps, parts=_REGNET)),
    "efficientnet": (EfficientNet, partial(TimmMaps, parts=_EFFICIENT)),
    **dict.fromkeys(("mobilenetv3", "hardcorenas"), (MobileNetV3, partial(TimmMaps, parts=_MOBILE))),
    "byobnet": (ByobNet, partial(TimmMaps, parts=_BYOB)),
    "nfnet": (NormFreeNet, partial(TimmMaps, parts=_NFNET)),
    "swin_transformer": (SwinTransformer, partial(TimmWindows, parts=_SWIN)),
    "swin_transformer_v2": (SwinTransformerV2, partial(TimmWindows, parts=_SWIN)),
    "mlp_mixer": (MlpMixer, partial(TimmMixer, parts=_MIXER)),
}
