"""The adapter of any text classifier of transformers whose layers lie in one list, each of which reads what the last one made.

The library's own forward runs up to the last layer with layers that only note what they are called with: masks, rotary embeddings
and biases do not depend on the hidden state. The layers themselves then run with these arguments, and the library's forward
finishes from the last one's output. A block is a layer. Builds no network.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eectl.core.errors import EectlError
from eectl.models.adapters.transformers_parts import TextBackbone, TextFeature
from eectl.models.backbone import Feature, Hidden

_ROWS, _TOKENS = 2, 8  # of the texts that a network is looked at with
_MOST_TOWERS = 4  # that are looked at
_LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class CannotBeCutError(EectlError):
    """A network that does not run layer by layer; the message is the reason alone."""


@dataclass(frozen=True)
class LastTokenFeature(TextFeature):
    """Tokens of a text that is read from left to right: its last real token knows all others."""

    def cls(self) -> Tensor:
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = (places * self.mask).argmax(dim=1)
        return self.x[torch.arange(len(self.x), device=self.x.device), last]


@dataclass(frozen=True)
class _Layout:
    """How a network's layers are called, and what runs before and after them.

    Attributes:
        tower: the name of the list of layers.
        depth: how many there are.
        place: the hidden state's position or keyword among a layer's arguments.
        returns: the length of the tuple that a layer returns, the hidden state first; 0 where it returns that alone.
        tokens_first: whether the hidden state is [token, row, channel].
        around: the modules that are running while a layer does, the outermost first.
        before: the outermost modules that run before the layers.
        after: the outermost modules that run after the last layer and never before.
    """

    tower: str
    depth: int
    place: int | str
    returns: int
    tokens_first: bool
    around: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def hidden_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the hidden state among a layer's arguments."""
        return args[self.place] if isinstance(self.place, int) else kwargs[self.place]

    def with_hidden(self, call: "_Call", x: Tensor | None) -> "_Call":
        """Return a layer's arguments with `x` as its hidden state."""
        if isinstance(self.place, int):
            return _Call((*call.args[: self.place], x, *call.args[self.place + 1 :]), call.kwargs)
        return _Call(call.args, {**call.kwargs, self.place: x})

    def returned(self, x: Tensor) -> Any:
        """Return `x` in the form in which a layer returns it."""
        return (x, *(None,) * (self.returns - 1)) if self.returns else x

    def turned(self, x: Tensor) -> Tensor:
        """Turn a hidden state from the library's order to rows first, or back."""
        return x.transpose(0, 1) if self.tokens_first else x


@dataclass(frozen=True)
class _Call:
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Recorded:
    """What the library calls each layer with, hidden states left out, and what each module before the layers has returned."""

    calls: tuple[_Call, ...]
    made: dict[str, tuple[Any, ...]]


class _LastLayerReachedError(Exception):
    """Everything that the layers are called with is known: a pass of the library's forward ends here."""


class TowerBackbone(TextBackbone):
    """The adapter of networks with a tower: a list of like layers that run one after another.

    The hidden state's `mask` are the texts themselves, [row, token, 3], from which the layers' arguments follow; they are found
    once for a batch, and again once rows have left it.

    Raises:
        CannotBeCutError: where the network does not run so. It is looked at with two short texts, except on the device meta.
    """

    net: Any

    def __init__(self, net: Any) -> None:
        net.config.use_cache = False
        self._takes_types = bool(getattr(net.config, "type_vocab_size", 0)) and _accepts(net, "token_type_ids")
        self._pads_with: int | None = None
        if hasattr(net, "score"):  # the library's name for a classifier of the last real token, which it finds by the padding
            self._pads_with = net.config.get_text_config().pad_token_id
            if self._pads_with is None:
                raise CannotBeCutError(
                    "it reads a text's last token, and no padding token says which that is; set backbone.args.pad_token_id to "
                    "the tokenizer's, or to that of its end of text"
                )
        if net.config.is_encoder_decoder:
            raise CannotBeCutError("it is an encoder and a decoder, which runs once the encoder is through")
        first, *others = _towers(net)
        towers = [first, *(other for other in others if other[1] > 1)][:_MOST_TOWERS]
        on_meta = next(net.parameters()).is_meta
        if on_meta:
            self._layout = _Layout(*towers[0], 0, 0, False, (), (), ())
        else:
            self._layout = _first_that_fits(net, towers, self._arguments(_example_texts(net)))
        blocks = [(f"{self._layout.tower}.{index}",) for index in range(self._layout.depth)]
        base = f"{net.base_model_prefix}."
        ends = dict.fromkeys(
            name.rpartition(".")[0]
            for name, _ in net.named_parameters()
            if _within(name, self._layout.after) and (not name.startswith(base) or "pooler" in name)
        )
        super().__init__(net, block_names=blocks, head_names=self._layout.after, classifiers=list(ends))
        self.vocabulary = getattr(net.config.get_text_config(), "vocab_size", None)
        if not on_meta:
            self._check_bits()

    @property
    def max_tokens(self) -> int | None:
        """The length of the longest row that its table of positions has room for; None where it has no such table."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                most: int = getattr(self.net.config, "max_position_embeddings", module.num_embeddings)
                return min(most, module.num_embeddings - first)
        return None

    def stem(self, inputs: Tensor) -> Hidden:
        texts = inputs.transpose(1, 2)
        x, recorded = self._record(texts)
        return Hidden(x, texts, recorded)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        recorded = self._known(hidden)
        assert isinstance(hidden.x, Tensor)
        call = self._layout.with_hidden(recorded.calls[index], self._layout.turned(hidden.x))
        output = self._layers[index](*call.args, **call.kwargs)
        x = output[0] if isinstance(output, (tuple, list)) else output
        return replace(hidden, x=self._layout.turned(x), known=recorded)

    def head(self, hidden: Hidden) -> Tensor:
        """Run the library's forward once more: what ran before the layers returns what it has returned, and layers do nothing."""
        recorded = self._known(hidden)
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        x = self._layout.turned(hidden.x)
        waiting = {name: iter(results) for name, results in recorded.made.items()}
        before = {self.net.get_submodule(name): _repeats(results) for name, results in waiting.items()}

        def passes(*args: Any, **kwargs: Any) -> Any:
            return self._layout.returned(self._layout.hidden_of(args, kwargs))

        def gives_x(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            for module in before:
                vars(module).pop("forward", None)  # a module, such as a dropout, may run again after the layers
            return self._layout.returned(x)

        layers = list(self._layers)
        with _replaced(before | dict.fromkeys(layers[:-1], passes) | {layers[-1]: gives_x}):
            logits: Tensor = self.net(**self._arguments(hidden.mask)).logits
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        mask = hidden.mask[:, :, 1].bool()
        more = hidden.x.shape[1] - mask.shape[1]  # windows of attention are filled up
        mask = F.pad(mask, (0, more)) if more else mask
        return (TextFeature if self._pads_with is None else LastTokenFeature)(hidden.x, mask)

    @property
    def _layers(self) -> Any:
        return self.net.get_submodule(self._layout.tower)

    def _arguments(self, texts: Tensor) -> dict[str, Any]:
        """Return the arguments of the library's forward for texts [row, token, 3]."""
        ids, mask, types = texts.unbind(dim=2)
        if self._pads_with is not None:
            ids = ids.where(mask.bool(), self._pads_with)
        return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if self._takes_types else {})

    def _known(self, hidden: Hidden) -> _Recorded:
        """Return what the layers are called with: as noted before, or found anew where rows have left or come."""
        if isinstance(hidden.known, _Recorded):
            return hidden.known
        assert hidden.mask is not None
        return self._record(hidden.mask)[1]

    def _record(self, texts: Tensor) -> tuple[Tensor, _Recorded]:
        """Return the first layer's hidden state, and what the library calls each layer with."""
        calls: list[_Call] = []
        made: dict[str, list[Any]] = {name: [] for name in self._layout.before}

        def notes(*args: Any, **kwargs: Any) -> Any:
            calls.append(_Call(args, kwargs))
            if len(calls) == self.depth:
                raise _LastLayerReachedError
            return self._layout.returned(self._layout.hidden_of(args, kwargs))

        before = {self.net.get_submodule(name): name for name in made}
        kept = {module: _keeps(module.forward, made[name]) for module, name in before.items()}
        try:
            with _replaced(kept | dict.fromkeys(self._layers, notes)):
                self.net(**self._arguments(texts))
        except _LastLayerReachedError:
            left = [*(self.net.get_submodule(name) for name in self._layout.around), self._layers[-1]]
            _tell_tracer(left)
        x: Tensor = self._layout.turned(self._layout.hidden_of(calls[0].args, calls[0].kwargs))
        without = tuple(self._layout.with_hidden(call, None) for call in calls)
        return x, _Recorded(without, {name: tuple(results) for name, results in made.items()})

    def _check_bits(self) -> None:
        """Raise CannotBeCutError where the parts in a row do not give what the library's own forward does."""
        texts = _example_texts(self.net)
        with _explained(), _in_eval_mode(self.net):
            expected = self.net(**self._arguments(texts)).logits
            found = self(texts.transpose(1, 2))
        if not torch.equal(found, expected):
            raise CannotBeCutError("its layers depend on more than the hidden state of the layer before")


_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed", "position_embedding")


def _accepts(net: nn.Module, name: str) -> bool:
    return name in inspect.signature(net.forward).parameters


def _example_texts(net: Any) -> Tensor:
    """Return two short texts [row, token, 3], the second padded, with ids that every vocabulary has."""
    config, device = net.config.get_text_config(), next(net.parameters()).device
    texts = torch.zeros(_ROWS, _TOKENS, 3, dtype=torch.int64, device=device)
    texts[:, :, 0] = torch.arange(_ROWS * _TOKENS, device=device).view(_ROWS, _TOKENS) % getattr(
        config, "vocab_size", _ROWS * _TOKENS
    )
    texts[:, :, 1] = 1
    padding = getattr(config, "pad_token_id", None) or 0
    texts[1, _TOKENS // 2 :, 0], texts[1, _TOKENS // 2 :, 1] = padding, 0
    return texts


def _towers(net: nn.Module) -> list[tuple[str, int]]:
    """Return the name and length of each outermost list of layers of one type, that of most weights first."""
    lists = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    }
    outermost = {name: layers for name, layers in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outermost:
        raise CannotBeCutError("its layers lie in no list of layers of one type")
    sizes = {name: sum(weight.numel() for weight in layers.parameters()) for name, layers in outermost.items()}
    return [(name, len(outermost[name])) for name in sorted(sizes, key=lambda name: -sizes[name])]


def _first_that_fits(net: Any, towers: Sequence[tuple[str, int]], arguments: Mapping[str, Any]) -> _Layout:
    """Return the layout of the first of these lists whose layers run one after another, or raise what is said of the first."""
    faults = []
    for tower, depth in towers:
        try:
            return _look_at(net, tower, depth, arguments)
        except CannotBeCutError as error:
            faults.append(error)
    raise faults[0]


def _look_at(net: Any, tower: str, depth: int, arguments: Mapping[str, Any]) -> _Layout:
    """Run the library's forward, and return how it calls the layers of `tower` and what runs before and after them."""
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
        with _explained(), _in_eval_mode(net):
            net(**arguments)
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
    shape = (args[place] if isinstance(place, int) else kwargs[place]).shape
    if len(shape) != 3 or _ROWS not in shape[:2]:
        raise CannotBeCutError("its hidden state has no dimensions of rows and tokens")
    if shape[:2].numel() < _ROWS * _TOKENS:
        raise CannotBeCutError("its hidden states are fewer than the text has tokens")
    after = [name for name in late if name not in early]
    outermost = [name for name in after if not any(name.startswith(f"{other}.") for other in after)]
    return _Layout(tower, depth, place, lengths.pop(), shape[0] != _ROWS, tuple(around), tuple(before), tuple(outermost))


def _place(call: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> int | str | None:
    """Return where, among a layer's arguments, the last layer's hidden state is; None where it is not there."""
    x = output[0] if isinstance(output, (tuple, list)) else output
    args, kwargs = call
    places: list[int | str] = [*(number for number, value in enumerate(args) if value is x)]
    return next(iter([*places, *(key for key, value in kwargs.items() if value is x)]), None)


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
def _in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without a graph; no generator moves."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a library raises, given texts, into the reason that the network cannot be cut."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
        raise CannotBeCutError(f"it does not run on texts alone ({reason})") from error
