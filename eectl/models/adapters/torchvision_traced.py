"""Build any of torchvision's classifiers by its name, traced and cut; ResNets and ViTs have an adapter of their own besides."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import models

from eectl.core.errors import EectlError, closest
from eectl.models.adapters.args_and_weights import load_weights, read_args
from eectl.models.adapters.feature_views import Facts
from eectl.models.adapters.layer_groups import own_groups
from eectl.models.adapters.torchvision import published_weights
from eectl.models.adapters.traced import adapt
from eectl.models.adapters.tracing import CannotTraceError
from eectl.models.backbone import Backbone

RATES = ("dropout", "attention_dropout", "stochastic_depth_prob", "drop_rate")
_PARTS_FOR_TRAINING = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def build(name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool) -> Backbone:
    """Build a network of torchvision's.

    Args:
        name: torchvision's, without `torchvision/`.
        args: the recipe's `backbone.args`: the rates of dropout and stochastic depth that the network takes.
        input_shape: (channels, height, width).
        num_outputs: the number of logits.
        pretrained: whether torchvision's default weights are loaded, from its cache or by a download.

    Raises:
        EectlError: for an unknown name, options, images that the network does not take, a network that cannot be cut, and a
            download that fails.
    """
    names = models.list_models(module=models)
    if name not in names:
        raise EectlError(f"torchvision has no classifier '{name}'{closest(name, names)}; it has {', '.join(names)}")
    title = f"torchvision/{name}"
    read_args(title, args, dict.fromkeys(option_names(name) if args else (), 0.0))
    net = _create(name, args, input_shape, num_outputs)
    classifier = [key for key, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    try:
        backbone = adapt(net, input_shape, Facts(own_groups(net), (), (classifier,)))
    except (CannotTraceError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason, size = str(error).partition("\n")[0], "×".join(map(str, input_shape[1:]))
        raise EectlError(f"{title} cannot be cut for images of {size}: {reason}; set data.image_size, or take another") from error
    backbone.name = title
    if pretrained:
        state = published_weights(name, input_shape)
        parts = _PARTS_FOR_TRAINING.get(name, ())
        state = {key: tensor for key, tensor in state.items() if not key.startswith(parts)} if parts else state
        load_weights(backbone, state, where=f"torchvision's weights of {name}")
    return backbone


def option_names(name: str) -> tuple[str, ...]:
    """Return the names of the rates that a network takes, found by building it without memory; all for an unknown one."""

    def is_taken(option: str) -> bool:
        try:
            with torch.device("meta"):
                kind = type(models.get_model(name, weights=None, **{option: 0.1}))
        except (TypeError, ValueError):
            return False
        return option in inspect.signature(kind).parameters  # some take any name, and do nothing with it

    return tuple(filter(is_taken, RATES)) if name in models.list_models(module=models) else RATES


def _create(name: str, args: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Return a fresh network for images of this shape."""
    options: dict[str, Any] = {}
    if name in _PARTS_FOR_TRAINING:
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options = {"image_size": input_shape[1]}
    if name.startswith("maxvit"):
        options = {"input_size": tuple(input_shape[1:])}
    try:
        net: nn.Module = models.get_model(name, weights=None, num_classes=num_outputs, **options, **args)
    except (AssertionError, ValueError) as error:
        size = "×".join(map(str, input_shape[1:]))
        raise EectlError(f"torchvision/{name} does not take images of {size} ({error}); set data.image_size") from error
    if input_shape[0] != 3:
        _take_channels(net, input_shape[0])
    return net


def _take_channels(net: nn.Module, channels: int) -> None:
    """Give the first convolution other colour channels: its filters for the first ones, and so on in turn."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    weight = first.weight.detach()[:, torch.arange(channels) % first.in_channels].clone()
    first.in_channels, first.weight = channels, nn.Parameter(weight)
