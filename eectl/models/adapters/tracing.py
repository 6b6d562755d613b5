"""Trace a network's forward pass into a list of steps, for images of one size and any number of rows. Cuts nothing.

torch.fx records what the network's own code does with values that run along: where that code asks for a size or a flag, it gets
an answer, and that of these images is kept. A module whose parameters all go together is one step and runs its own code.
"""

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from eectl.core.errors import EectlError

_KINDS = {"call_module": "module", "get_attr": "attribute", "call_function": "function", "call_method": "method"}  # of fx
ROWS = (2, 3)  # what differs between a pass with 2 and one with 3 rows depends on their number


@dataclass(frozen=True)
class Slot:
    """The result of an earlier step, as an argument."""

    number: int


@dataclass(frozen=True)
class Rows:
    """`times` × the number of rows, as an argument."""

    times: int


@dataclass(frozen=True)
class Step:
    """One call of a forward pass.

    Attributes:
        kind: `module`, `attribute`, `function` or `method`.
        target: the name of the module, parameter, buffer or method; or the function.
        args: with Slot and Rows in place of what is not known before.
        kwargs: the same.
        slot: the number under which the result is kept; 0 is the images.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int

    @property
    def needs(self) -> set[int]:
        """The slots that it reads."""
        return {leaf.number for leaf in leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Slot)}


@dataclass(frozen=True)
class Trace:
    """A forward pass: its steps, the slot of its result, and what each slot held, with 2 rows and with 3."""

    steps: tuple[Step, ...]
    result: int
    values: Mapping[int, tuple[Any, Any]]


class CannotTraceError(EectlError):
    """A forward pass that does other things than the trace would."""


def leaves(value: Any) -> Iterator[Any]:
    """Yield what lies in nested tuples, lists, dictionaries and slices."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested tuples, lists, dictionaries and slices with `change` applied to what lies in them."""
    if isinstance(value, (tuple, list)):  # fx has lists of its own, which do not change
        found = [replaced(each, change) for each in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, dict):
        return {key: replaced(each, change) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(replaced(each, change) for each in (value.start, value.stop, value.step)))
    return change(value)


def trace(net: nn.Module, images: Sequence[Tensor], *, whole: Callable[[str], bool], functions: Sequence[Any] = ()) -> Trace:
    """Trace `net`'s forward pass; its flags stay as they are, and no number of torch's generators is drawn.

    Args:
        net: the network; what it does in its own code depends on its flag `training`.
        images: rows of two batches, of ROWS rows.
        whole: whether the module of this name is one step.
        functions: functions of the library's that are one step each.

    Raises:
        CannotTraceError: where its code does not run on recorded values, or takes the number of rows for a constant.
    """
    assert tuple(map(len, images)) == ROWS
    tracer = _Tracer(images[0], whole, functions)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            graph = tracer.trace(net, concrete_args=_defaults(net))
        except fx.proxy.TraceError as error:
            raise CannotTraceError(str(error).partition("\n")[0]) from error
        nodes = list(graph.nodes)
        second = _run_again(net, nodes, images[1])
    pairs = {node: (tracer.values[node], second[node]) for node in nodes if node in second}
    for node in nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CannotTraceError("its code makes tensors of its own as it runs")
    for node in tracer.fixed:
        if pairs[node][0] != pairs[node][1]:
            raise CannotTraceError(f"its code takes the number of rows for a constant ({node})")
    return _steps(nodes, pairs)


class _Tracer(fx.Tracer):
    """Records a forward pass whose values are computed as it goes."""

    proxy_buffer_attributes = True

    def __init__(self, images: Tensor, whole: Callable[[str], bool], functions: Sequence[Any]) -> None:
        super().__init__(autowrap_functions=tuple(functions))
        self.values: dict[fx.Node, Any] = {}
        self.fixed: set[fx.Node] = set()
        self._images, self._whole, self._runs = images, whole, False

    def proxy(self, node: fx.Node) -> "_Value":
        return _Value(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        self._runs = True
        try:
            self.values[proxy.node] = self._evaluate(proxy.node)
        finally:
            self._runs = False
        return proxy

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return _defaults(self.root).get(_argument(node), self._images)
        return None if node.op == "output" else _evaluate(self.root, node, self.values)

    def is_leaf_module(self, _module: nn.Module, name: str) -> bool:
        return self._whole(name)

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._runs else super().call_module(module, forward, args, kwargs)

    def getattr(self, attr: str, value: Any, cache: dict[str, Any]) -> Any:
        return value if self._runs else super().getattr(attr, value, cache)

    def to_bool(self, proxy: fx.Proxy) -> bool:
        return bool(self.values[proxy.node])

    def fix(self, node: fx.Node) -> Any:
        """Return a value that the network's code takes out of the trace."""
        self.fixed.add(node)
        return self.values[node]


def _defaults(net: nn.Module) -> dict[str, Any]:
    """Return the arguments of a forward pass besides the images; they keep their defaults."""
    parameters = list(inspect.signature(type(net).forward).parameters.values())[2:]
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _argument(node: fx.Node) -> str:
    """Return the name of the argument that a placeholder stands for; fx numbers some."""
    return re.sub(r"_\d+$", "", str(node.target))


class _Value(fx.Proxy):
    """A value of the forward pass that is recorded, with the number or tensor that it is for the images of the trace."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        held = getattr(self.tracer.values[self.node], name)
        if callable(held):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        held = list(self.tracer.values[self.node])
        parts = [self.tracer.create_proxy("call_function", operator.getitem, (self, place), {}) for place in range(len(held))]
        return iter([None if value is None else part for value, part in zip(held, parts, strict=True)])

    def __len__(self) -> int:
        value = self.tracer.values[self.node]
        return len(value) if isinstance(value, (tuple, list)) else len(self.tracer.fix(self.node))

    def __bool__(self) -> bool:
        return bool(self.tracer.values[self.node])

    def __int__(self) -> int:
        return int(self.tracer.fix(self.node))

    def __float__(self) -> float:
        return float(self.tracer.fix(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.fix(self.node))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _evaluate(net: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = replaced((node.args, dict(node.kwargs)), lambda each: values[each] if isinstance(each, fx.Node) else each)
    return call(net, _KINDS[node.op], node.target, args, kwargs)


def call(net: nn.Module, kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a step of `kind` (see `Step`) gives for these arguments."""
    if kind == "module":
        return net.get_submodule(target)(*args, **kwargs)
    if kind == "attribute":
        return operator.attrgetter(target)(net)
    if kind == "method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _run_again(net: nn.Module, nodes: Sequence[fx.Node], images: Tensor) -> dict[fx.Node, Any]:
    """Return every node's value for other images."""
    values: dict[fx.Node, Any] = {}
    given = True
    for node in nodes:
        if node.op == "placeholder":
            values[node] = images if given else _defaults(net).get(_argument(node))
            given = False
        elif node.op != "output":
            try:
                values[node] = _evaluate(net, node, values)
            except (RuntimeError, TypeError, ValueError) as error:
                raise CannotTraceError(f"its code depends on the number of rows ({node})") from error
    return values


def _steps(nodes: Sequence[fx.Node], pairs: Mapping[fx.Node, tuple[Any, Any]]) -> Trace:
    """Return nodes as steps: numbers become constants or multiples of the number of rows, and what only gave them goes."""
    slots = {node: number for number, node in enumerate(nodes)}

    def argument(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        known, found = _number(*pairs[value])
        return found if known else Slot(slots[value])

    steps = []
    result: Any = None
    for node in nodes:
        if node.op == "output":
            result = replaced(node.args[0], argument)
        elif node.op != "placeholder" and not _number(*pairs[node])[0]:
            steps.append(
                Step(
                    _KINDS[node.op],
                    node.target,
                    replaced(tuple(node.args), argument),
                    replaced(dict(node.kwargs), argument),
                    slots[node],
                )
            )
    if isinstance(result, list) and len(result) == 1:  # fx flattens what comes out
        result = result[0]
    if not isinstance(result, Slot):
        raise CannotTraceError("its forward pass gives more than logits")
    values = {slots[node]: pair for node, pair in pairs.items()}
    kept: list[Step] = []
    wanted = {result.number}
    for step in reversed(steps):
        touches = step.kind == "function" and step.target is getattr  # a shape that nothing reads
        if step.slot in wanted or not touches:
            kept.append(step)
            wanted |= step.needs
    return Trace(tuple(reversed(kept)), result.number, values)


def _number(first: Any, second: Any) -> tuple[bool, Any]:
    """Return whether a value of two passes is made of numbers alone, and what it is then, with Rows for the rows."""
    if isinstance(first, (tuple, list)) and isinstance(second, type(first)) and len(first) == len(second):
        parts = [_number(*pair) for pair in zip(first, second, strict=True)]
        if all(known for known, _ in parts):
            found = [part for _, part in parts]
            return True, found if isinstance(first, list) else tuple(found)
        return False, None
    if isinstance(first, (bool, str, int, float)) or first is None:
        if first == second:
            return True, first
        if isinstance(first, int) and first * ROWS[1] == second * ROWS[0] and first % ROWS[0] == 0:
            return True, Rows(first // ROWS[0])
    return False, None
