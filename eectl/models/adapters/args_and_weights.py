"""Check a recipe's `backbone.args`, and load weights under a library's names: what all adapters have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from eectl.core.errors import EectlError, closest
from eectl.models.backbone import Backbone

PREFIX = "backbone.net."  # where a MultiExitModel's state dict holds the library's network

Option = int | float | tuple[str, ...]


class NotOnThisMachineError(EectlError):
    """A network that is neither a folder nor in a library's cache.

    Attributes:
        model_type: the type that its name says; None where it says none.
    """

    def __init__(self, message: str, *, model_type: str | None) -> None:
        super().__init__(message)
        self.model_type = model_type


def read_args(name: str, args: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the `backbone.args` of the network `name` with defaults filled in.

    Args:
        name: of the network, for messages.
        args: what the recipe says.
        options: each option by its default, which also says what is allowed: a whole number (a count from 1), a fraction (a
            probability below 1), or a tuple of words (the choices, the default first).

    Raises:
        EectlError: for an unknown option, or a value that is not allowed.
    """
    check_names(name, args, options)
    return {
        key: _read(f"backbone.args.{key}", args[key], option) if key in args else _default(option)
        for key, option in options.items()
    }


def check_names(name: str, args: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise EectlError for a key of `backbone.args` that the network `name` does not take."""
    for key in args:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise EectlError(f"backbone.args.{key}: no such option{closest(key, known)}; {name} {takes}")


def _default(option: Option) -> Any:
    return option[0] if isinstance(option, tuple) else option


def _read(place: str, value: Any, option: Option) -> Any:
    if isinstance(option, tuple):
        fits, allowed = isinstance(value, str) and value in option, " or ".join(option)
    elif isinstance(option, int):
        fits, allowed = type(value) is int and value >= 1, "a whole number from 1"
    else:
        fits, allowed = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"
    if not fits:
        raise EectlError(f"{place} is {value!r}; it must be {allowed}")
    return value


def load_weights(backbone: Backbone, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights into `backbone.net`.

    Where they have no classifier, or one for another number of outputs, the network's own stays as it was drawn, and
    `backbone.fresh` lists its parameters.

    Args:
        backbone: the network.
        weights: by the library's parameter names, or by those of an eectl checkpoint.
        where: what they are, for messages.

    Raises:
        EectlError: that names the first few tensors that are missing, unexpected or of another shape.
    """
    given = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items() if key.startswith(PREFIX)} or weights
    given = backbone.own_names(given)
    own = backbone.net.state_dict()
    fresh = []
    for classifier in backbone.classifiers:
        names = [key for key in own if key.startswith(f"{classifier}.")]
        if any(key not in given or given[key].shape != own[key].shape for key in names):
            fresh += names
    given = {key: tensor for key, tensor in given.items() if key not in fresh}
    for key, tensor in given.items():
        if key in own and tensor.shape != own[key].shape:
            raise EectlError(
                f"{where}: {key} is {_shape(tensor)}, {backbone.name} here has {_shape(own[key])}{_advice(tensor, own[key])}"
            )
    missing, unexpected = backbone.net.load_state_dict(given, strict=False)
    missing = [key for key in missing if key not in fresh]
    faults = [f"{what} {first_names(keys)}" for what, keys in (("no", missing), ("unexpected", unexpected)) if keys]
    if faults:
        fit = f"{sum(key in own for key in given)} of its {len(own) - len(fresh)} tensors are there"
        raise EectlError(f"{where}: not weights of {backbone.name} with these backbone.args ({fit}): {'; '.join(faults)}")
    backbone.fresh = tuple(fresh)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _advice(given: Tensor, own: Tensor) -> str:
    """Return what to do about the two usual reasons of another shape: other colour channels, or another image size."""
    if given.ndim == own.ndim == 4 and given.shape[1] != own.shape[1] and given.shape[2:] == own.shape[2:]:
        return f"; these weights take images of {given.shape[1]} channels (data.channels)"
    if given.ndim == own.ndim == 3 and given.shape[1] != own.shape[1]:
        return "; these weights take images of another size (data.image_size)"
    return ""


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
