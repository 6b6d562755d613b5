"""The doors to networks: build a backbone, attach exits, rebuild a model from its spec.

A library is imported when a name needs it. Importing this package, and `known_backbones()`, imports no torch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from eectl.core.errors import EectlError, closest
from eectl.recipe.recipe import BackboneSection, ModelSpec

if TYPE_CHECKING:
    from eectl.models.backbone import Backbone
    from eectl.models.multi_exit import MultiExitModel

TIMM = "timm/"
TRANSFORMERS = "hf/"


def known_backbones() -> list[str]:
    """The names in BACKBONES; `timm/NAME` and `hf/NAME` reach those libraries' besides."""
    return sorted(BACKBONES)


def build_backbone(spec: BackboneSection, *, input_shape: Sequence[int], num_outputs: int) -> "Backbone":
    """The network that `spec` names, with `num_outputs` logits, for images of `input_shape` (channels, height, width) or texts of
    (3, tokens at most).

    Weights come from the library (`pretrained`) or a file (`weights`); what they leave freshly initialised is in
    `backbone.fresh`. Draws from torch's global generator. Raises EectlError for an unknown name, options or inputs that the
    network does not take, weights that do not fit and downloads that fail.
    """
    check_kind(spec.name, input_shape)
    if spec.name.startswith(TRANSFORMERS):
        name, build = spec.name.removeprefix(TRANSFORMERS), _transformers()
    elif spec.name.startswith(TIMM):
        name, build = spec.name.removeprefix(TIMM), _timm()
    elif spec.name in BACKBONES:
        name, build = spec.name, BACKBONES[spec.name]()
    else:
        raise EectlError(
            f"unknown backbone '{spec.name}'{closest(spec.name, BACKBONES)}; known: {', '.join(BACKBONES)}; "
            "timm/NAME reaches timm's, such as timm/vit_tiny_patch16_224, hf/NAME transformers' text encoders, such as hf/bert"
        )
    backbone = build(name, spec.args, input_shape=tuple(input_shape), num_outputs=num_outputs, pretrained=spec.pretrained)
    backbone.name = spec.name
    if not backbone.depth:
        raise EectlError(f"backbone.args: {dict(spec.args)} leave {spec.name} no block")
    if spec.weights is not None:
        from eectl.core.files import read_any_tensors
        from eectl.models.adapters.args_and_weights import load_weights

        load_weights(backbone, read_any_tensors(spec.weights)[0], where=f"backbone.weights {spec.weights}")
    return backbone


def check_kind(name: str, input_shape: Sequence[int]) -> None:
    """Raise EectlError where the backbone called `name` is known to take images and the inputs are texts, or the reverse."""
    known = name.startswith(TRANSFORMERS) or name.startswith(TIMM) or BACKBONES.get(name) in (_nets, _msdnet, _torchvision)
    for_text, is_text = name.startswith(TRANSFORMERS), len(input_shape) == 2
    if known and for_text != is_text:
        kinds, advice = ("images", "texts"), "texts need hf/NAME" if is_text else "images need another, such as resnet20"
        raise EectlError(f"backbone.name: {name} takes {kinds[for_text]}, and the data are {kinds[is_text]}; {advice}")


def attach_exits(
    backbone: "Backbone", *, after: Sequence[int], heads: str | Sequence[str], num_outputs: int, input_shape: Sequence[int]
) -> "MultiExitModel":
    """`backbone` with an exit after each block of `after`, sorted; `heads` is one kind for all, or one per entry of `after`.

    The kind `auto` is the backbone's default. The last block may have an exit too. Draws from torch's global generator.
    Raises EectlError for a block that the backbone does not have or that is listed twice, and for an unknown kind.
    """
    from eectl.models.backbone import dry_run
    from eectl.models.heads import make_head
    from eectl.models.multi_exit import MultiExitModel

    for position, block in enumerate(after):
        if not 0 <= block < backbone.depth:
            allowed = f"{backbone.name} takes exits after blocks 0–{backbone.depth - 1}"
            raise EectlError(f"exits.after[{position}] is {block}; {allowed}; list others, or take a placement such as every-2")
        if block in after[:position]:
            raise EectlError(f"exits.after[{position}] is {block}, which is listed before; each block takes one exit")
    kinds = [heads] * len(after) if isinstance(heads, str) else list(heads)
    if len(kinds) != len(after):
        raise EectlError(f"{len(kinds)} exit heads for {len(after)} exits; give one kind, or one for each")
    pairs = sorted(zip(after, kinds, strict=True))
    hidden = dry_run(backbone, input_shape) if pairs else []
    attached = [
        make_head(backbone.default_head if kind == "auto" else kind, backbone.feature(hidden[block]), num_outputs)
        for block, kind in pairs
    ]
    return MultiExitModel(backbone, attached, after=[block for block, _ in pairs])


def model_spec(model: "MultiExitModel", backbone: BackboneSection, *, input_shape: Sequence[int], num_outputs: int) -> ModelSpec:
    """What rebuilds `model`, whose backbone was built from the section `backbone`: no folder, no download, resolved heads."""
    name, args = model.backbone.rebuilds_as or (backbone.name, backbone.args)
    return ModelSpec(
        backbone=backbone.model_copy(update={"name": name, "args": args, "pretrained": False, "weights": None}),
        input_shape=tuple(input_shape),
        num_outputs=num_outputs,
        after=model.after,
        heads=tuple(str(head.kind) for head in model.exits),
        combine=None if model.combine is None else model.combine.kind,
    )


def build_model(spec: ModelSpec) -> "MultiExitModel":
    """The network of a checkpoint, freshly initialised: its weights come from the checkpoint, never from a download."""
    plain = spec.backbone.model_copy(update={"pretrained": False, "weights": None})
    backbone = build_backbone(plain, input_shape=spec.input_shape, num_outputs=spec.num_outputs)
    model = attach_exits(backbone, after=spec.after, heads=spec.heads, num_outputs=spec.num_outputs, input_shape=spec.input_shape)
    return model if spec.combine is None else attach_ensembles(model, spec.combine, num_outputs=spec.num_outputs)


def attach_ensembles(model: "MultiExitModel", kind: str, *, num_outputs: int) -> "MultiExitModel":
    """`model`, its weights shared, with fresh ensembles of `kind` at its attached exits, whose states are their own logits.

    Draws from torch's global generator. Raises EectlError for an unknown kind.
    """
    from eectl.models.ensembles import Ensembles
    from eectl.models.multi_exit import MultiExitModel

    combine = Ensembles(kind, num_heads=len(model.exits), num_outputs=num_outputs)
    return MultiExitModel(model.backbone, model.heads, after=model.after, combine=combine)


def _nets() -> "Callable[..., Backbone]":
    from eectl.models.adapters import cifar_resnet as nets

    return nets.build


def _msdnet() -> "Callable[..., Backbone]":
    from eectl.models.adapters import msdnet

    return msdnet.build


def _torchvision() -> "Callable[..., Backbone]":
    from eectl.models.adapters import torchvision as from_torchvision

    return from_torchvision.build


def _timm() -> "Callable[..., Backbone]":
    from eectl.models.adapters import timm as from_timm

    return from_timm.build


def _transformers() -> "Callable[..., Backbone]":
    from eectl.models.adapters import transformers as from_transformers

    return from_transformers.build


BACKBONES: "dict[str, Callable[[], Callable[..., Backbone]]]" = {
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56"), _nets),
    "msdnet": _msdnet,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _torchvision),
    **dict.fromkeys(("vit", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), _torchvision),
}
