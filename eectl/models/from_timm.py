"""timm's Vision Transformer and ResNet families as Backbones. Any other family needs an adapter here and a row in ADAPTERS."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from eectl.errors import EectlError
from eectl.models.backbone import Backbone, Feature, Hidden, StagedBackbone, TokenFeature, dry_run
from eectl.models.building import check_names


class TimmResNet(StagedBackbone):
    """A timm ResNet (any stem, plain or with attention in its blocks); one block = one residual block."""

    net: ResNet

    def __init__(self, net: ResNet, _input_shape: Sequence[int]) -> None:
        super().__init__(net, head_names=("global_pool", "fc"), classifiers=("fc",))

    def stem(self, inputs: Tensor) -> Hidden:
        net = self.net
        return Hidden(net.maxpool(net.act1(net.bn1(net.conv1(inputs)))))

    def head(self, hidden: Hidden) -> Tensor:
        """As `forward_head`, but its dropout follows the classifier's mode: the net's own flag belongs to the stem."""
        x = self.net.global_pool(hidden.x)
        if self.net.drop_rate:
            x = functional.dropout(x, p=float(self.net.drop_rate), training=self.net.fc.training)
        logits: Tensor = self.net.fc(x)
        return logits


class TimmViT(Backbone):
    """A timm VisionTransformer (ViT, DeiT, hybrids; with or without class, distillation and register tokens)."""

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


def build(
    name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> TimmResNet | TimmViT:
    """The timm network `name` (without `timm/`; a pretrained tag is allowed); `args` are timm's own constructor arguments.

    Raises EectlError for an unknown name, a family without an adapter, options or images that the network does not take,
    and for a failed download.
    """
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), n=3))
        raise EectlError(f"timm has no '{name}'{f' (nearest: {near})' if near else ''}; timm.list_models() lists what it has")
    module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if module not in ADAPTERS:
        raise _no_adapter(name, module)
    library_class, adapter = ADAPTERS[module]
    _check_args(name, args, library_class)
    net: Any = _create(name, args, library_class, input_shape, num_outputs, pretrained)
    if type(net).forward_features is not vars(library_class)["forward_features"]:  # another order of its parts
        raise _no_adapter(name, type(net).__name__)
    backbone: TimmResNet | TimmViT = adapter(net, input_shape)
    backbone.name = f"timm/{name}"
    _check_images(backbone, input_shape)
    if pretrained and net.pretrained_cfg["num_classes"] != num_outputs:
        names = tuple(f"{own}." for own in backbone.classifiers)
        backbone.fresh = tuple(key for key in net.state_dict() if key.startswith(names))
    return backbone


def _create(
    name: str, args: Mapping[str, Any], library_class: type, input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> Any:
    shape: dict[str, Any] = {"in_chans": input_shape[0]}
    if issubclass(library_class, VisionTransformer):
        shape["img_size"] = tuple(input_shape[1:])
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_outputs, **shape, **args)
    except OSError as error:
        reason = str(error).partition(". ")[0]
        raise EectlError(
            f"timm's weights of {name} cannot be downloaded ({reason}); name a file with them in backbone.weights"
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not args and not isinstance(error, (ArithmeticError, AssertionError, RuntimeError)):
            raise
        given = f" with {dict(args)}" if args else ""
        height, width = input_shape[1:]
        raise EectlError(
            f"timm/{name} cannot be built{given} for images of {height}×{width}: {str(error) or 'its constructor refuses them'}"
        ) from error


def _check_images(backbone: TimmResNet | TimmViT, input_shape: Sequence[int]) -> None:
    """Raise EectlError where images are smaller than a patch, or than a blurring ResNet's padding takes."""
    size = "×".join(map(str, input_shape[1:]))
    if isinstance(backbone, TimmViT):
        if 0 in backbone.grid:
            raise EectlError(f"{backbone.name} cuts images into patches, {size} is too small for one; set data.image_size")
        return
    try:
        dry_run(backbone, input_shape)
    except RuntimeError as error:
        raise EectlError(f"{backbone.name} does not run on images of {size}; set data.image_size, 64 is enough") from error


def _check_args(name: str, args: Mapping[str, Any], library_class: type) -> None:
    """The options are the constructor's, less what the data decide, classes, and patch dropping, which leaves exits no grid."""
    ours = ["self", "img_size", "in_chans", "num_classes", "device", "dtype", "patch_drop_rate"]
    ours += ["embed_layer", "block_fn", "mlp_layer", "attn_layer", "block", "aa_layer", "block_args", "weight_init"]
    check_names(f"timm/{name}", args, {key: None for key in inspect.signature(library_class).parameters if key not in ours})


def _no_adapter(name: str, family: str) -> EectlError:
    return EectlError(
        f"timm/{name} is of the family {family}; eectl takes timm's {', '.join(ADAPTERS)}. "
        "Another needs an adapter in eectl/models/from_timm.py: its stem, blocks, head and feature"
    )


ADAPTERS: dict[str, tuple[type, Any]] = {  # timm's module → its class, our adapter
    "vision_transformer": (VisionTransformer, TimmViT),
    "vision_transformer_hybrid": (VisionTransformer, TimmViT),
    "deit": (VisionTransformer, TimmViT),
    "resnet": (ResNet, TimmResNet),
}
