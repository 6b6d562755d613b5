"""Watch one forward pass operation by operation: which axes of which tensors must be permuted together.

Below the libraries every network is made of the same ATen operations; `aten_rules` says of each what it does to the labels of its
inputs' axes. An operation without a rule pins all axes that it reads.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from eectl.analyses.connectivity.axis_labels import Label, Labels, fixed

AxisLabels = list[Label]


@dataclass(frozen=True)
class Call:
    """An operation as it was called, and the tensors it gave."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that may come by place or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def tensors(self, start: int = 0) -> list[Tensor]:
        """Return the tensors among the arguments from place `start` on."""
        return tensors_in((self.args[start:], self.kwargs))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels the axes of every tensor that is made while it is entered; `unknown` are the operations without a rule.

    Each axis of a parameter or buffer starts free; tensors that nobody made while it watched (inputs, constants) stay as they
    are. Tensors live as long as the tracer, so that none takes another's place.
    """

    def __init__(self, weights: Mapping[str, Tensor], rules: "Mapping[str, Rule]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules
        self.labels = Labels()
        self.unknown: set[str] = set()
        self.read: set[int] = set()
        self._of: dict[int, AxisLabels] = {}
        self._alive: list[Tensor] = []
        self._storages: dict[int, list[int]] = {}
        for tensor in weights.values():
            if id(tensor) not in self._of:
                self.put(tensor, self.fresh(tensor))

    def fresh(self, tensor: Tensor) -> AxisLabels:
        """Label each axis with a variable of its own, so that it is free to be permuted."""
        return [self.labels.new(size) for size in tensor.shape]

    def put(self, tensor: Tensor, labels: AxisLabels) -> None:
        """Record the labels of a tensor's axes."""
        assert len(labels) == tensor.dim()
        if id(tensor) not in self._of:
            self._alive.append(tensor)
            self._storages.setdefault(_storage(tensor), []).append(id(tensor))
        self._of[id(tensor)] = labels

    def get(self, tensor: Tensor) -> AxisLabels:
        """Return the labels of a tensor's axes.

        A tensor that no watched operation made is pinned, and so is whatever it shares memory with.
        """
        if id(tensor) not in self._of:
            for other in self._storages.get(_storage(tensor), ()) if tensor.numel() else ():
                self.read.add(other)
                self.pin(self._of[other])
            self.put(tensor, [fixed(size) for size in tensor.shape])
        self.read.add(id(tensor))
        return self._of[id(tensor)]

    def pin(self, labels: AxisLabels) -> None:
        """Keep these axes as they are."""
        for label in labels:
            self.labels.pin(label)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, then label the tensors it gave."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        call = Call(args, kwargs, tensors_in(result))
        rule = self._rules.get(name)
        given = None if rule is None else rule(self, call)
        if given is None:
            if rule is None:
                self.unknown.add(name)
            for tensor in call.tensors():
                self.pin(self.get(tensor))
            given = [[fixed(size) for size in tensor.shape] for tensor in call.outputs]
        for tensor, labels in zip(call.outputs, given, strict=True):
            self.put(tensor, labels)
        return result


Rule = Callable[[Tracer, Call], list[AxisLabels] | None]
"""A rule returns the labels of each output's axes, or None where it does not know them."""


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def plain_attention() -> AbstractContextManager[Any]:
    """Run attention as products and softmax inside the context; one fused operation would hide them."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    fast = torch.backends.mha.get_fastpath_enabled()
    stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
    torch.backends.mha.set_fastpath_enabled(False)
    return stack
