"""Run a network of transformers layer by layer, where its layers lie in one list and each reads what the last one made.

The library's own forward runs up to the last layer with layers that only note what they are called with: masks, rotary embeddings
and biases do not depend on the hidden state. The layers themselves then run with these arguments, and the library's forward
finishes from the last one's output. What a network reads is not known here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.backbone import in_eval_mode

ROWS = 2  # that a network is looked at with
_MOST_TOWERS = 4  # that are looked at
_LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class CannotBeCutError(EectlError):
    """A network that does not run layer by layer; the message is the reason alone."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """The arguments of each layer, hidden states left out, and what each module before the layers has returned."""

    calls: tuple[LayerCall, ...]
    made: dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Layout:
    """How a network's layers are called, and what runs before and after them.

    Attributes:
        tower: the name of the list of layers.
        depth: how many there are.
        place: the hidden state's position or keyword among a layer's arguments.
        beside: for each layer what it returns in a tuple beside the hidden state, tensors left out; None where it returns the
            hidden state alone.
        shape: of the first hidden state of `ROWS` rows.
        around: the modules that are running while a layer does, the outermost first.
        before: the outermost modules that run before the layers.
        after: the outermost modules that run after the last layer and never before.
    """

    tower: str
    depth: int
    place: int | str = 0
    beside: tuple[tuple[Any, ...] | None, ...] = ()
    shape: tuple[int, ...] = ()
    around: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def tokens_first(self) -> bool:
        """Whether the hidden state is [token, row, channel]."""
        return len(self.shape) == 3 and self.shape[0] != ROWS

    @property
    def blocks(self) -> list[tuple[str]]:
        """The name of each layer."""
        return [(f"{self.tower}.{index}",) for index in range(self.depth)]

    def hidden_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the hidden state among a layer's arguments."""
        return args[self.place] if isinstance(self.place, int) else kwargs[self.place]

    def with_hidden(self, call: LayerCall, x: Tensor | None) -> LayerCall:
        """Return a layer's arguments with `x` as its hidden state."""
        if isinstance(self.place, int):
            return LayerCall((*call.args[: self.place], x, *call.args[self.place + 1 :]), call.kwargs)
        return LayerCall(call.args, {**call.kwargs, self.place: x})

    def returned(self, index: int, x: Tensor) -> Any:
        """Return `x` in the form in which layer `index` returns it."""
        beside = self.beside[index]
        return x if beside is None else (x, *beside)

    def turned(self, x: Tensor) -> Tensor:
        """Turn a hidden state from the library's order to rows first, or back."""
        return x.transpose(0, 1) if self.tokens_first else x


class _LastLayerReachedError(Exception):
    """Everything that the layers are called with is known: a pass of the library's forward ends here."""


def look_for_layers(net: Any, arguments: Mapping[str, Any], *, check: Callable[[Layout], None]) -> tuple[Layout, Any]:
    """Run the library's forward in eval mode on `ROWS` rows, and return how its layers run and what it gives.

    The lists of layers of most weights are looked at first. Raises CannotBeCutError, with what is said of the first, where the
    layers of no list run one after another; `check` raises it for hidden states of another form.
    """
    faults = []
    for tower, depth in _promising(net):
        try:
            layout, output = _look_at(net, tower, depth, arguments)
            check(layout)
            return layout, output
        except CannotBeCutError as error:
            faults.append(error)
    raise faults[0]


def layout_on_meta(net: nn.Module) -> Layout:
    """Return the layout of a network that cannot run: the list of layers of most weights."""
    return Layout(*_promising(net)[0])


def _promising(net: nn.Module) -> list[tuple[str, int]]:
    first, *others = _towers(net)
    return [first, *(other for other in others if other[1] > 1)][:_MOST_TOWERS]


def record(net: Any, layout: Layout, arguments: Mapping[str, Any]) -> tuple[Tensor, Recorded]:
    """Return the first layer's hidden state, rows first, and what the library calls each layer with, given `arguments`."""
    calls: list[LayerCall] = []
    made: dict[str, list[Any]] = {name: [] for name in layout.before}
    layers = list(net.get_submodule(layout.tower))

    def notes(*args: Any, **kwargs: Any) -> Any:
        calls.append(LayerCall(args, kwargs))
        if len(calls) == layout.depth:
            raise _LastLayerReachedError
        return layout.returned(len(calls) - 1, layout.hidden_of(args, kwargs))

    before = {net.get_submodule(name): name for name in made}
    kept = {module: _keeps(module.forward, made[name]) for module, name in before.items()}
    try:
        with _replaced(kept | dict.fromkeys(layers, notes)):
            net(**arguments)
    except _LastLayerReachedError:
        _tell_tracer([*(net.get_submodule(name) for name in layout.around), layers[-1]])
    x: Tensor = layout.turned(layout.hidden_of(calls[0].args, calls[0].kwargs))
    without = tuple(layout.with_hidden(call, None) for call in calls)
    return x, Recorded(without, {name: tuple(results) for name, results in made.items()})


def run_layer(net: Any, layout: Layout, recorded: Recorded, index: int, x: Tensor) -> Tensor:
    """Return what layer `index` makes of a hidden state, rows first."""
    call = layout.with_hidden(recorded.calls[index], layout.turned(x))
    output = net.get_submodule(layout.tower)[index](*call.args, **call.kwargs)
    return layout.turned(output[0] if isinstance(output, (tuple, list)) else output)


def finish(net: Any, layout: Layout, recorded: Recorded, x: Tensor, arguments: Mapping[str, Any]) -> Any:
    """Return what the library's forward gives from the last layer's hidden state, rows first.

    It runs once more: what ran before the layers returns what it has returned, and the layers do nothing.
    """
    waiting = {name: iter(results) for name, results in recorded.made.items()}
    before = {net.get_submodule(name): _repeats(results) for name, results in waiting.items()}
    passed = iter(range(layout.depth - 1))

    def passes(*args: Any, **kwargs: Any) -> Any:
        return layout.returned(next(passed), layout.hidden_of(args, kwargs))

    def gives_x(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        for module in before:
            vars(module).pop("forward", None)  # a module, such as a dropout, may run again after the layers
        return layout.returned(layout.depth - 1, layout.turned(x))

    layers = list(net.get_submodule(layout.tower))
    with _replaced(before | dict.fromkeys(layers[:-1], passes) | {layers[-1]: gives_x}):
        return net(**arguments)


def layers_at_the_end(net: Any, layout: Layout) -> list[str]:
    """Return the modules after the layers that weights may leave freshly drawn: a pooler, and all that is not the encoder's."""
    base = f"{net.base_model_prefix}."
    ends = (
        name.rpartition(".")[0]
        for name, _ in net.named_parameters()
        if _within(name, layout.after) and (not name.startswith(base) or "pooler" in name)
    )
    return list(dict.fromkeys(ends))


def _towers(net: nn.Module) -> list[tuple[str, int]]:
    """Return the name and length of each outermost list of layers, and of layers of one type, that of most weights first."""
    lists = {name: module for name, module in net.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    alike = {name: module for name, module in lists.items() if len({type(layer) for layer in module}) == 1}
    outermost = {name for each in (alike, lists) for name in each if not any(name.startswith(f"{other}.") for other in each)}
    if not outermost:
        raise CannotBeCutError("its layers lie in no list")
    sizes = {name: sum(weight.numel() for weight in lists[name].parameters()) for name in lists if name in outermost}
    return [(name, len(lists[name])) for name in sorted(sizes, key=lambda name: -sizes[name])]


def _look_at(net: Any, tower: str, depth: int, arguments: Mapping[str, Any]) -> tuple[Layout, Any]:
    """Run the library's forward, and return how it calls the layers of `tower`, what runs around them, and what it gives."""
    names = {module: name for name, module in net.named_modules()}
    layers = {module: index for index, module in enumerate(net.get_submodule(tower))}
    above = {name for name in names.values() if not name or tower == name or tower.startswith(f"{name}.")}
    order: list[int] = []
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returned: list[Any] = []
    open_modules: list[str] = []
    around: list[str] = []
    before: dict[str, None] = {}
    early: set[str] = set()
    late: dict[str, None] = {}

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        if module in layers:
            around[:] = open_modules
            order.append(layers[module])
            given.append((args, kwargs))
        elif len(returned) == depth:
            late[name] = None
        else:
            early.add(name)
            if name not in above and set(open_modules) <= above:
                before[name] = None
        open_modules.append(name)

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        open_modules.pop()
        if module in layers:
            returned.append(output)

    hooks = [module.register_forward_pre_hook(enters, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(leaves) for module in names]
    try:
        with while_looked_at(net):
            output = net(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    if order != list(range(depth)):
        raise CannotBeCutError(f"the {depth} layers of {tower} do not run once each, one after another")
    places = {_place(call, output) for call, output in zip(given[1:], returned, strict=False)} or {_first_place(given[0])}
    if len(places) != 1 or None in places:
        raise CannotBeCutError(f"the layers of {tower} do not hand on one hidden state each")
    (place,) = places
    assert place is not None
    lengths = {len(output) if isinstance(output, (tuple, list)) else 0 for output in returned}
    if len(lengths) != 1:
        raise CannotBeCutError(f"the layers of {tower} return different things")
    args, kwargs = given[0]
    shape = tuple((args[place] if isinstance(place, int) else kwargs[place]).shape)
    after = [name for name in late if name not in early]
    outermost = [name for name in after if not any(name.startswith(f"{other}.") for other in after)]
    beside = tuple(tuple(map(_plain, each[1:])) if isinstance(each, (tuple, list)) else None for each in returned)
    return Layout(tower, depth, place, beside, shape, tuple(around), tuple(before), tuple(outermost)), output


def _place(call: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> int | str | None:
    """Return where, among a layer's arguments, the last layer's hidden state is; None where it is not there."""
    x = output[0] if isinstance(output, (tuple, list)) else output
    args, kwargs = call
    places: list[int | str] = [*(number for number, value in enumerate(args) if value is x)]
    return next(iter([*places, *(key for key, value in kwargs.items() if value is x)]), None)


def _plain(value: Any) -> Any:
    """Return a value without tensors, such as the height and width of a map, and None in place of others."""
    if isinstance(value, (tuple, list)):
        inner = tuple(map(_plain, value))
        return None if any(item is None for item in inner) else inner
    return value if isinstance(value, (int, float, str)) else None


def _first_place(call: tuple[tuple[Any, ...], dict[str, Any]]) -> int | str | None:
    """Return where the hidden state of a single layer is: its first argument."""
    return 0 if call[0] else next(iter(call[1]), None)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == own or name.startswith(own + ".") for own in modules)


def _keeps(forward: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return `forward`, with its results kept in a list."""

    def run(*args: Any, **kwargs: Any) -> Any:
        results.append(forward(*args, **kwargs))
        return results[-1]

    return run


def _repeats(results: Iterator[Any]) -> Callable[..., Any]:
    """Return a function that returns one of `results` after the other."""

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        return next(results)

    return run


def _tell_tracer(left: Sequence[nn.Module]) -> None:
    """Run the hooks of modules that an exception has left, the outermost first, where fvcore is tracing: it counts by them."""
    if torch._C._get_tracing_state() is not None:
        for module in reversed(left):
            for hook in module._forward_hooks.values():
                hook(module, (), None)


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run these functions in place of their own forward in the block; their attributes stay as they are."""
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


@contextmanager
def while_looked_at(net: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without a graph; no generator moves."""
    with in_eval_mode(net), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def reasons_for(what: str) -> Iterator[None]:
    """Turn what a library raises, given rows of `what`, into the reason that the network cannot be cut."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
        raise CannotBeCutError(f"it does not run on {what} alone ({reason})") from error
