"""Build networks by name: a backbone, exits on it, or the whole network that a checkpoint describes.

Importing this module imports no torch: each adapter, and with it the library that it adapts, is imported when a name needs it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from eectl.core.errors import EectlError, closest
from eectl.recipe.recipe import BackboneSection, ModelSpec

if TYPE_CHECKING:
    from eectl.models.backbone import Backbone
    from eectl.models.multi_exit import MultiExitModel


def build_backbone(spec: BackboneSection, *, input_shape: Sequence[int], num_outputs: int) -> "Backbone":
    """Build the network that a recipe's backbone section names, and load the weights that it asks for.

    Fresh weights are drawn from torch's global generator. `fresh` of the result lists the parameters that loaded weights left
    freshly drawn.

    Args:
        spec: the section; with `pretrained` its library provides weights, with `weights` a file does.
        input_shape: of one row: (channels, height, width) of images, (3, tokens at most) of texts.
        num_outputs: the number of logits: classes, or 1 in a regression.

    Raises:
        EectlError: for an unknown name, options or inputs that the network does not take, weights that do not fit, or a download
            that fails.
    """
    from eectl.models.limits import building_within, check_size, limit_of_memory

    spec = with_dropout(spec)
    limit, title = limit_of_memory(), f"backbone {spec.name}"
    if spec.args or spec.name.startswith(TRANSFORMERS):  # options, or a folder's, may say sizes that take long to fill
        plain = spec.model_copy(update={"pretrained": False})
        check_size(lambda: _build(plain, input_shape, num_outputs), limit, name=title)
    with building_within(limit, name=title):
        backbone = _build(spec, input_shape, num_outputs)
    if spec.weights is not None:
        from eectl.core.tensor_files import read_any_tensors
        from eectl.models.adapters.args_and_weights import load_weights

        load_weights(backbone, read_any_tensors(spec.weights)[0], where=f"backbone.weights {spec.weights}")
    return backbone


def _build(spec: BackboneSection, input_shape: Sequence[int], num_outputs: int) -> "Backbone":
    """Build a network by the adapter for its name, of whatever size; the weights of a file are not loaded."""
    check_inputs_fit(spec.name, input_shape)
    name, load_adapter = _find_adapter(spec.name)
    build = load_adapter()
    backbone = build(name, spec.args, input_shape=tuple(input_shape), num_outputs=num_outputs, pretrained=spec.pretrained)
    backbone.name = spec.name
    if not backbone.depth:
        raise EectlError(f"backbone.args: {dict(spec.args)} leave {spec.name} no block")
    return backbone


def with_dropout(spec: BackboneSection) -> BackboneSection:
    """Return the section with its drop path and dropout among `args`, by the names that its library has for them.

    Raises EectlError where the network has none, or where `args` says another rate.
    """
    rates = {"drop_path": spec.drop_path, "dropout": spec.dropout}
    if set(rates.values()) == {None}:
        return spec
    from eectl.models.adapters.dropout import dropout_args

    args = dropout_args(spec.name, _option_names(spec), rates)
    for key, rate in args.items():
        if spec.args.get(key, rate) != rate:
            fault = f"backbone.args.{key} is {spec.args[key]}, and backbone.drop_path or backbone.dropout says {rate:g}"
            raise EectlError(f"{fault}; keep one")
    return spec.model_copy(update={"args": dict(spec.args) | args, "drop_path": None, "dropout": None})


def _option_names(spec: BackboneSection) -> tuple[str, ...]:
    """Return the names of the arguments that a network takes; none of one that no library builds."""
    name, load_adapter = _find_adapter(spec.name)
    if load_adapter is _timm:
        from eectl.models.adapters import timm

        return timm.option_names(name)
    if load_adapter is _transformers:
        from eectl.models.adapters import transformers

        return transformers.option_names(name, download=spec.pretrained)
    if load_adapter is _torchvision:
        from eectl.models.adapters import torchvision

        return torchvision.option_names(name)
    if load_adapter is _torchvision_traced:
        from eectl.models.adapters import torchvision_traced

        return torchvision_traced.option_names(name)
    return ()


def check_inputs_fit(name: str, input_shape: Sequence[int]) -> None:
    """Raise EectlError where the backbone `name` takes images and the data are texts, or the reverse.

    It says nothing of an unknown name, nor of a network that no adapter here builds; nothing is imported.
    """
    if name not in BACKBONES and not name.startswith(tuple(LIBRARIES)):
        return
    takes = INPUTS.get(_find_adapter(name)[1])
    given = "texts" if len(input_shape) == 2 else "images"
    if takes not in (None, given):
        advice = "texts need hf/NAME" if given == "texts" else "images need another, such as resnet20"
        raise EectlError(f"backbone.name: {name} takes {takes}, and the data are {given}; {advice}")


def attach_exits(
    backbone: "Backbone", *, after: Sequence[int], heads: str | Sequence[str], num_outputs: int, input_shape: Sequence[int]
) -> "MultiExitModel":
    """Attach an exit with a fresh head after each of these blocks.

    Weights are drawn from torch's global generator, in the order of the blocks.

    Args:
        backbone: the network; it is not copied.
        after: block numbers from 0, in any order; the last block may be among them.
        heads: one kind for all exits (see `heads.HEADS`), or one for each entry of `after`; `auto` is the backbone's default.
        num_outputs: the number of logits of each exit.
        input_shape: the shape of one row, from which the heads learn how wide the blocks' outputs are.

    Raises:
        EectlError: for a block that the backbone does not have or that is listed twice, and for an unknown kind of head.
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
    """Describe `model` so that `build_model` can build it again without a recipe, a local folder or a download.

    Args:
        model: the network; the kinds of its heads are those that it has, never `auto`.
        backbone: the recipe's section that its backbone was built from.
        input_shape: the shape of one row.
        num_outputs: the number of logits.
    """
    backbone = with_dropout(backbone)
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
    """Build the network that a checkpoint describes, with fresh weights and never a download; the caller loads its weights.

    Its size is the caller's to bound (see `limits`).
    """
    if spec.backbone.name.startswith(TRANSFORMERS):
        from eectl.models.adapters.transformers import check_rebuilds

        check_rebuilds(spec.backbone.name.removeprefix(TRANSFORMERS))
    plain = spec.backbone.model_copy(update={"pretrained": False, "weights": None})
    backbone = _build(plain, spec.input_shape, spec.num_outputs)
    model = attach_exits(backbone, after=spec.after, heads=spec.heads, num_outputs=spec.num_outputs, input_shape=spec.input_shape)
    return model if spec.combine is None else attach_ensembles(model, spec.combine, num_outputs=spec.num_outputs)


def attach_ensembles(model: "MultiExitModel", kind: str, *, num_outputs: int) -> "MultiExitModel":
    """Return a network of `model`'s backbone and heads (shared, not copied) with fresh ensembles at its attached exits.

    The heads' `state` must be their own logits, as ZTW's are. Weights are drawn from torch's global generator. Raises EectlError
    for a kind that `ensembles.ENSEMBLES` does not have.
    """
    from eectl.models.ensembles import Ensembles
    from eectl.models.multi_exit import MultiExitModel

    combine = Ensembles(kind, num_heads=len(model.exits), num_outputs=num_outputs)
    return MultiExitModel(model.backbone, model.heads, after=model.after, combine=combine)


def _find_adapter(name: str) -> "tuple[str, AdapterLoader]":
    """Return the name without its library's prefix, and what imports the adapter that builds it."""
    for prefix, load_adapter in LIBRARIES.items():
        if name.startswith(prefix):
            return name.removeprefix(prefix), load_adapter
    if name in BACKBONES:
        return name, BACKBONES[name]
    raise EectlError(
        f"unknown backbone '{name}'{closest(name, BACKBONES)}; known: {', '.join(BACKBONES)}; "
        "timm/NAME reaches timm's, such as timm/vit_tiny_patch16_224, torchvision/NAME torchvision's, "
        "hf/NAME transformers' text encoders, such as hf/bert"
    )


def _cifar_resnet() -> "Callable[..., Backbone]":
    from eectl.models.adapters import cifar_resnet

    return cifar_resnet.build


def _msdnet() -> "Callable[..., Backbone]":
    from eectl.models.adapters import msdnet

    return msdnet.build


def _torchvision() -> "Callable[..., Backbone]":
    from eectl.models.adapters import torchvision

    return torchvision.build


def _torchvision_traced() -> "Callable[..., Backbone]":
    from eectl.models.adapters import torchvision_traced

    return torchvision_traced.build


def _timm() -> "Callable[..., Backbone]":
    from eectl.models.adapters import timm

    return timm.build


def _transformers() -> "Callable[..., Backbone]":
    from eectl.models.adapters import transformers

    return transformers.build


AdapterLoader = Callable[[], Callable[..., "Backbone"]]
"""Imports an adapter and returns its function `build(name, args, *, input_shape, num_outputs, pretrained)`."""

BACKBONES: dict[str, AdapterLoader] = {
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56"), _cifar_resnet),
    "msdnet": _msdnet,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _torchvision),
    **dict.fromkeys(("vit", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), _torchvision),
}
TIMM, TRANSFORMERS = "timm/", "hf/"  # what the names of their networks begin with
LIBRARIES: dict[str, AdapterLoader] = {TIMM: _timm, "torchvision/": _torchvision_traced, TRANSFORMERS: _transformers}
INPUTS: dict[AdapterLoader, str] = {
    **dict.fromkeys((_cifar_resnet, _msdnet, _torchvision, _torchvision_traced, _timm), "images"),
}
"""The inputs that networks of one kind take; of transformers there are those of both."""
