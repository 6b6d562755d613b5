"""Build timm's networks by their names, and refuse names, options and images that do not work.

The adapter of all of them is `traced.Traced`."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch

from eectl.core.errors import EectlError
from eectl.models.adapters.args_and_weights import check_names
from eectl.models.adapters.timm_traced import adapt_timm
from eectl.models.adapters.tracing import CannotTraceError
from eectl.models.backbone import Backbone


def build(name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool) -> Backbone:
    """Build a network of timm's.

    Args:
        name: timm's, without `timm/`; a tag that names pretrained weights (resnet50.a1_in1k) is allowed.
        args: arguments of timm's constructor, less those that the data decide.
        input_shape: (channels, height, width).
        num_outputs: the number of logits.
        pretrained: whether timm's weights are loaded, from its cache or by a download.

    Raises:
        EectlError: for an unknown name, a network that cannot be cut, options or images that it does not take, and for a download
            that fails.
    """
    if not timm.is_model(name):
        near = _near(name)
        found = f" (nearest: {', '.join(near)})" if near else ""
        raise EectlError(f"timm has no '{name}'{found}; timm.list_models() lists what it has")
    classes = _classes(name)
    _check_args(name, args, classes)
    net: Any = _create(name, args, classes, input_shape, num_outputs, pretrained)
    backbone = _trace(name, net, input_shape)
    backbone.name = f"timm/{name}"
    if pretrained and net.pretrained_cfg["num_classes"] != num_outputs:
        names = tuple(f"{own}." for own in backbone.classifiers)
        backbone.fresh = tuple(key for key in net.state_dict() if key.startswith(names))
    return backbone


def _near(name: str) -> list[str]:
    """Return up to three names of timm's that are like this one."""
    return [near for near in get_close_matches(name, timm.list_models(), n=4) if near != name][:3]


def option_names(name: str) -> tuple[str, ...]:
    """Return the names of what the constructor of a network takes; those of most for a name that `build` refuses."""
    if not timm.is_model(name):
        return ("drop_rate", "drop_path_rate")
    return tuple(_parameters(_classes(name)))


def _create(
    name: str, args: Mapping[str, Any], classes: Sequence[type], input_shape: Sequence[int], num_outputs: int, pretrained: bool
) -> Any:
    shape: dict[str, Any] = {"in_chans": input_shape[0]}
    if "img_size" in _parameters(classes):
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


def _check_args(name: str, args: Mapping[str, Any], classes: Sequence[type]) -> None:
    """Raise EectlError for an option that timm's constructor does not take.

    Nor is one allowed that the data decide, that is a class, or that drops patches, which leaves exits no grid of them.
    """
    ours = ["img_size", "in_chans", "num_classes", "device", "dtype", "patch_drop_rate", "cfg", "kwargs"]
    ours += ["embed_layer", "block_fn", "mlp_layer", "attn_layer", "block", "aa_layer", "block_args", "weight_init"]
    ours += ["block_layer", "conv_layer", "se_layer", "round_chs_fn"]
    check_names(f"timm/{name}", args, {key: None for key in _parameters(classes) if key not in ours})


def _classes(name: str) -> list[type]:
    """Return the class of the networks of this name, or all that it may be."""
    entrypoint = timm.model_entrypoint(name)
    said = inspect.signature(entrypoint).return_annotation
    if isinstance(said, type) and said is not inspect.Signature.empty:
        return [said]
    known = vars(sys.modules[entrypoint.__module__]).values()
    return [each for each in known if isinstance(each, type) and hasattr(each, "get_classifier")]


def _parameters(classes: Sequence[type]) -> list[str]:
    """Return the names of what the constructors of these classes take; one that takes any hands them to the class above."""
    found: list[str] = []
    for each in classes:
        for owner in inspect.getmro(each):
            if "__init__" in vars(owner):
                own = inspect.signature(owner).parameters
                found += own
                if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
                    break
    return [key for key in dict.fromkeys(found) if key not in ("args", "self")]


def _trace(name: str, net: torch.nn.Module, input_shape: Sequence[int]) -> Backbone:
    """Return a network, traced and cut."""
    try:
        return adapt_timm(net, input_shape)
    except (
        CannotTraceError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        size = "×".join(map(str, input_shape[1:]))
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, *input_shape, device=next(net.parameters()).device))
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as own:
            reason = str(own).partition("\n")[0]
            fault = f"timm/{name} does not run on images of {size} ({reason})"
            raise EectlError(f"{fault}; set data.image_size, 64 is enough for most") from own
        reason = str(error).partition("\n")[0]
        others = ", ".join(f"timm/{near}" for near in _near(name.partition(".")[0]))
        raise EectlError(
            f"timm/{name} cannot be cut into blocks: {reason}; take another of timm's: "
            f"{f'near it are {others}; ' if others else ''}timm/resnet18 and timm/test_vit can be cut"
        ) from error
