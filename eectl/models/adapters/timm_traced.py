"""The adapter of all timm networks that have none of their own: traced, and cut at the ends of timm's layer groups.

The groups are those that timm makes for learning rates by layer: stem, blocks, head. A network's own code is followed where it
runs modules of several groups; everything below is the library's module, whole.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from timm.layers._fx import get_notrace_functions
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.adapters.cutting import Piece, cut, find_copies
from eectl.models.adapters.tracing import ROWS, CannotTraceError, Trace, trace
from eectl.models.backbone import Backbone, Feature, Hidden, MapFeature, TokenFeature

_AFTER_PREVIOUS = (MATCH_PREV_GROUP[0] - 1,)  # instead of `with the group before`


class TimmTraced(Backbone):
    """A timm network in pieces: stem, one for each block, head.

    Where its own code does other things in train mode, each piece is there twice, and the training flag of the modules that it
    owns says which one runs.

    Args:
        net: the network.
        pieces: in eval mode.
        training: the pieces in train mode, where they are others.
        views: how features are read, by their shape without rows.
        input_shape: of the images that it was cut for.
    """

    net: Any

    def __init__(
        self,
        net: nn.Module,
        pieces: Sequence[Piece],
        training: Sequence[Piece] | None,
        *,
        views: Mapping[tuple[int, ...], "View"],
        input_shape: Sequence[int],
    ) -> None:
        owned = list(_owned(pieces))
        super().__init__(net, block_names=owned[1:-1], head_names=owned[-1], classifiers=_classifiers(net))
        self._pieces, self._training = tuple(pieces), None if training is None else tuple(training)
        modules = {name for name, _ in net.named_modules()}
        self._flags = [next((name for name in names if name in modules), "") for names in owned]
        self._views, self._image_shape = dict(views), tuple(input_shape)

    def _run(self, part: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pieces = self._pieces
        if self._training is not None and self.net.get_submodule(self._flags[part]).training:
            pieces = self._training
        return pieces[part].run(self.net, tensors)

    def stem(self, inputs: Tensor) -> Hidden:
        if inputs.shape[1:] != self._image_shape:
            given, own = ("×".join(map(str, shape)) for shape in (inputs.shape[1:], self._image_shape))
            raise EectlError(f"{self.name} was built for images of {own}, and these are {given}; resize them, or build another")
        return _join(self._run(0, (inputs,)))

    def block(self, index: int, hidden: Hidden) -> Hidden:
        return _join(self._run(index + 1, hidden.scales))

    def head(self, hidden: Hidden) -> Tensor:
        return self._run(self.depth + 1, hidden.scales)[0]

    def feature(self, hidden: Hidden) -> Feature:
        x = hidden.scales[-1]
        return self._views[tuple(map(int, x.shape[1:]))].feature(x)


class TimmTracedMaps(TimmTraced):
    """The same for a network of convolutional maps."""

    default_head = "sdn"
    prefers_channels_last = True


def _join(tensors: tuple[Tensor, ...]) -> Hidden:
    return Hidden(tensors[0] if len(tensors) == 1 else tensors)


def adapt(net: nn.Module, input_shape: Sequence[int]) -> Backbone:
    """Return a network of timm's as a backbone; its flags and torch's generators stay as they are.

    Raises:
        CannotTraceError: where it cannot be traced or cut, with the reason alone.
    """
    modes = {module: module.training for module in net.modules()}
    groups = layer_groups(net)
    try:
        net.eval()
        try:
            twin = _without_numbers(net)
            pieces, training, shapes = _pieces(twin, [_images(twin, rows, input_shape) for rows in ROWS], groups)
        except (CannotTraceError, NotImplementedError, RuntimeError, TypeError, ValueError):  # code that asks for numbers
            pieces, training, shapes = _pieces(net, [_images(net, rows, input_shape) for rows in ROWS], groups)
        _check(net, pieces, _images(net, ROWS[1], input_shape))
    finally:
        for module, flag in modes.items():
            module.training = flag
    views = {shape: View.of(net, shape, input_shape) for shape in shapes[1:-1]}
    kind = TimmTracedMaps if views[shapes[1]].layout == "NCHW" else TimmTraced
    return kind(net, pieces, training, views=views, input_shape=input_shape)


def _without_numbers(net: nn.Module) -> nn.Module:
    """Return a copy of a network whose tensors are on torch's meta device: on it a pass costs next to nothing."""
    memo: dict[int, Any] = {}
    for parameter in net.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in net.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(net, memo)


def _check(net: nn.Module, pieces: Sequence[Piece], images: Tensor) -> None:
    """Raise CannotTraceError where the pieces give other bits than the network, in eval mode."""
    if images.is_meta:
        return
    with torch.no_grad():
        tensors: tuple[Tensor, ...] = (images,)
        for piece in pieces:
            tensors = piece.run(net, tensors)
        if not torch.equal(tensors[0], net(images)):
            raise CannotTraceError("its pieces give other logits than it does")


class View:
    """How a feature of one shape is read: its layout, and for tokens their grid and how many special ones come first."""

    def __init__(self, layout: str, grid: tuple[int, int] = (1, 1), prefix: int = 0) -> None:
        self.layout, self.grid, self.prefix = layout, grid, prefix

    @staticmethod
    def of(net: Any, shape: Sequence[int], input_shape: Sequence[int]) -> "View":
        """Find how features of `shape` (rows left out) are to be read."""
        if len(shape) == 3:
            height, width = input_shape[1:]
            first, last = shape[1] * width == shape[2] * height, shape[0] * width == shape[1] * height
            if first == last:  # neither reading has the image's proportions alone
                widths = {info["num_chs"] for info in getattr(net, "feature_info", None) or () if "num_chs" in info}
                first, last = shape[0] in widths, shape[2] in widths
            if first != last:
                return View("NCHW" if first else "NHWC")
            return View(str(getattr(net, "output_fmt", "NCHW")))
        if len(shape) == 2:
            for prefix in dict.fromkeys((getattr(net, "num_prefix_tokens", 0), 0, 1)):
                grid = _grid(shape[0] - prefix, input_shape)
                if grid is not None:
                    return View("tokens", grid, prefix)
            return View("tokens", (1, shape[0]))
        return View("row")

    def feature(self, x: Tensor) -> Feature:
        """Return a tensor of this shape, rows first, as a feature."""
        if self.layout == "NCHW":
            return MapFeature(x)
        if self.layout == "NHWC":
            return MapFeature(x.permute(0, 3, 1, 2))
        if self.layout == "tokens":
            return TokenFeature(x, self.grid, prefix=self.prefix, has_cls=self.prefix > 0)
        flat = x.flatten(1, -2) if x.ndim > 3 else x[:, None]
        return TokenFeature(flat, (1, flat.shape[1]), prefix=0, has_cls=False)


def _grid(count: int, input_shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the (height, width) of so many patches of an image; None where they do not fill its rectangle."""
    height, width = input_shape[1:]
    if count * height % width == 0:
        rows = isqrt(count * height // width)
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return rows, count // rows
    return None


def layer_groups(net: Any) -> dict[str, int]:
    """Return the number of each parameter's group; the last is the head, with the layers between it and the last block."""
    try:
        matcher = net.group_matcher(coarse=False)
        groups: dict[str, int] = group_with_matcher(net.named_parameters(), matcher, reverse=True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError, ValueError):
        return _own_groups(net)
    if len(set(groups.values())) < 4:
        return _own_groups(net)
    last = max(groups.values())
    if isinstance(matcher, dict):  # norms that learn with the last block run after it
        apart = group_with_matcher(net.named_parameters(), _set_apart(matcher), reverse=True)
        body = [name for name, group in groups.items() if group == last - 1]
        first = min((apart[name] for name in body), default=0)
        groups.update({name: last for name in body if apart[name] > first})
    return groups


def _set_apart(matcher: Mapping[str, Any]) -> dict[str, Any]:
    """Return a matcher whose groups are not joined with those before them."""
    return {
        group: [(name, _AFTER_PREVIOUS if suffix == MATCH_PREV_GROUP else suffix) for name, suffix in patterns]
        if isinstance(patterns, (tuple, list))
        else patterns
        for group, patterns in matcher.items()
    }


def _own_groups(net: nn.Module) -> dict[str, int]:
    """Return groups for a network that timm makes none for: its children, and those of its lists of modules."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = {}
    for name, _ in net.named_parameters():
        parts = name.split(".")
        place: tuple[str, ...] = (parts[0],)
        while len(place) < len(parts) and isinstance(net.get_submodule(".".join(place)), (nn.Sequential, nn.ModuleList)):
            place = (*place, parts[len(place)])
        groups[name] = numbers.setdefault(place, len(numbers))
    return groups


def _classifiers(net: Any) -> list[str]:
    """Return the names of the layers whose size is the number of outputs."""
    heads = net.get_classifier()
    wanted = [head for head in (heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]) if head is not None]
    return [name for name, module in net.named_modules() if any(module is head for head in wanted)]


def _images(net: nn.Module, rows: int, input_shape: Sequence[int]) -> Tensor:
    """Return images of no particular look: none is like another, and no generator is used."""
    parameter = next(net.parameters())
    size = rows * input_shape[0] * input_shape[1] * input_shape[2]
    values = torch.arange(size, device=parameter.device, dtype=torch.float32).mul(12.9898).sin()
    return values.to(parameter.dtype).reshape(rows, *input_shape)


def _pieces(
    net: nn.Module, images: Sequence[Tensor], groups: Mapping[str, int]
) -> tuple[list[Piece], list[Piece] | None, list[tuple[int, ...]]]:
    """Return the pieces of `net` in eval mode, those in train mode where they are others, and the shapes of what they give."""
    below: dict[str, set[int]] = {}
    for name, group in groups.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            below.setdefault(".".join(parts[:length]), set()).add(group)

    def whole(name: str) -> bool:
        return len(below.get(name, ())) < 2

    def cut_in(mode: bool) -> tuple[Trace, list[Piece]]:
        net.eval()
        for name, module in net.named_modules():  # those that are whole ask their own flag whenever they run
            module.training = mode and (name == "" or not _inside_whole(name, whole))
        found = trace(net, images, whole=whole, functions=get_notrace_functions())  # type: ignore[no-untyped-call]
        return found, cut(found, _ends(found, groups, below))

    found, pieces = cut_in(False)
    if len(pieces) < 4:
        raise CannotTraceError("there are not two places between its layers where few enough tensors are alive")
    pieces, shapes = find_copies(pieces, net, images[0])
    also, training = cut_in(True)
    if also.steps == found.steps:
        return pieces, None, shapes
    if [len(piece.made) for piece in training] != [len(piece.made) for piece in pieces]:
        raise CannotTraceError("other tensors are alive between its layers in train mode than in eval mode")
    return pieces, [replace(one, copies=two.copies) for one, two in zip(training, pieces, strict=True)], shapes


def _inside_whole(name: str, whole: Callable[[str], bool]) -> bool:
    """Return whether a module is one step of the trace, or lies in one that is."""
    parts = name.split(".")
    return any(whole(".".join(parts[:length])) for length in range(1, len(parts) + 1))


def _ends(found: Trace, groups: Mapping[str, int], below: Mapping[str, set[int]]) -> list[tuple[int, int]]:
    """Return for each group but the head the steps after which it may be cut: from its last one to before the next group's."""
    places: dict[tuple[int, str], list[int]] = {}  # of the modules of each group, apart by the children of the network
    for place, step in enumerate(found.steps):
        if step.kind == "module" and step.target in below:
            (group,) = below[step.target]
            places.setdefault((group, step.target.partition(".")[0]), []).append(place)
    joined: list[tuple[int, list[int]]] = []
    for (group, _), own in places.items():  # in the order in which they first run
        if joined and joined[-1][0] == group:
            joined[-1] = (group, joined[-1][1] + own)
        else:
            joined.append((group, own))
    head, everything = max(groups.values()), sorted(place for own in places.values() for place in own)
    ends = []
    reached = -1
    for group, own in joined:
        if group == head and reached >= 0:
            continue
        reached = max(reached, *own)
        ends.append((reached, next((place for place in everything if place > reached), len(found.steps)) - 1))
    return ends


def _owned(pieces: Sequence[Piece]) -> Iterator[list[str]]:
    """Yield the names of what each piece owns: the first that uses something owns it."""
    taken: set[str] = set()
    for piece in pieces:
        own = []
        for name in piece.names():
            parts = name.split(".")
            if not any(".".join(parts[:length]) in taken for length in range(1, len(parts) + 1)):
                own.append(name)
                taken.add(name)
        yield own
