"""The adapter of networks that have none of their own: traced, and cut at the ends of their groups of layers.

A network's own code is followed where it runs modules of several groups; everything below is the library's module, whole.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.adapters.cutting import MIN_CUTS, End, TracedPiece, cut, find_copies
from eectl.models.adapters.feature_views import Facts, Shapes, View, shapes_of
from eectl.models.adapters.layer_groups import Unit, groups_below, split_stages
from eectl.models.adapters.tracing import ROWS, CannotTraceError, Trace, trace
from eectl.models.backbone import Backbone, Feature, Hidden, in_eval_mode

SMALL = 10**12  # parameters × pixels: a pass of so much work costs less with numbers than on torch's meta device


class Traced(Backbone):
    """A network in pieces: stem, one for each block, head.

    Where its own code does other things in train mode, each piece is there twice, and the training flag of the modules that it
    owns says which one runs.

    Args:
        net: the network.
        pieces: in eval mode.
        training: the pieces in train mode, where they are others.
        views: how features are read, by the shapes, rows left out, of all that is alive after a block.
        input_shape: of the images that it was cut for.
        classifiers: the layers whose size is the number of outputs.
        caches: names of modules, with the attribute in which each keeps in eval mode what follows from its weights.
    """

    def __init__(
        self,
        net: nn.Module,
        pieces: Sequence[TracedPiece],
        training: Sequence[TracedPiece] | None,
        *,
        views: Mapping[Shapes, View],
        input_shape: Sequence[int],
        classifiers: Sequence[str],
        caches: Sequence[tuple[str, str]],
    ) -> None:
        owned = list(_owned(pieces))
        super().__init__(net, block_names=owned[1:-1], head_names=owned[-1], classifiers=classifiers)
        self._pieces, self._training = tuple(pieces), None if training is None else tuple(training)
        modules = {name for name, _ in net.named_modules()}
        self._flags = [next((name for name in names if name in modules), "") for names in owned]
        self._views, self._image_shape = dict(views), tuple(input_shape)
        self._caches = [_caches_in(piece, net, caches) for piece in pieces]

    def _run(self, part: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for module, name in self._caches[part]:  # weights may have changed; a past graph, or a recording, may hold what is kept
            setattr(module, name, {})
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
        return self._views[shapes_of(hidden.scales)].feature(hidden.scales)


class TracedMaps(Traced):
    """The same for a network of convolutional maps."""

    default_head = "sdn"
    prefers_channels_last = True


def _join(tensors: tuple[Tensor, ...]) -> Hidden:
    return Hidden(tensors[0] if len(tensors) == 1 else tensors)


def adapt(net: nn.Module, input_shape: Sequence[int], facts: Facts) -> Backbone:
    """Return a network as a backbone; its flags and torch's generators stay as they are.

    Raises:
        CannotTraceError: where it cannot be traced or cut, with the reason alone.
    """
    with torch.inference_mode(False), in_eval_mode(net):  # tensors of inference mode count no changes
        try:
            pieces, training, alive = _pieces(_cheapest(net, input_shape), input_shape, facts)
        except (AttributeError, CannotTraceError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pieces, training, alive = _pieces(net, input_shape, facts)  # its code asks for numbers
        net.eval()
        _check(net, pieces, _images(net, ROWS[1], input_shape))
        caches = _caches(net)
    found = [shapes_of(tensors) for tensors in alive[1:-1]]
    views = {shapes: View.of(facts, shapes, input_shape) for shapes in found}
    kind = TracedMaps if views[found[0]].layout == "NCHW" else Traced
    return kind(net, pieces, training, views=views, input_shape=input_shape, classifiers=facts.classifiers, caches=caches)


def _cheapest(net: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """Return a network to trace: this one, or for much work a copy whose tensors are on torch's meta device."""
    work = sum(parameter.numel() for parameter in net.parameters()) * input_shape[1] * input_shape[2]
    return net if work <= SMALL else _without_numbers(net)


def _without_numbers(net: nn.Module) -> nn.Module:
    """Return a copy of a network whose tensors are on torch's meta device: the time of a pass depends on no size."""
    memo: dict[int, Any] = {}
    for parameter in net.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in net.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(net, memo)


def _caches(net: nn.Module) -> list[tuple[str, str]]:
    """Return the names of modules that have kept tensors in a dictionary in a pass in eval mode, with that attribute's."""
    return [
        (owner, name)
        for owner, module in net.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())
    ]


def _caches_in(piece: TracedPiece, net: nn.Module, caches: Sequence[tuple[str, str]]) -> list[tuple[nn.Module, str]]:
    """Return those of the modules that a piece runs, with the attribute."""
    own = tuple(f"{name}." for name in piece.names())
    return [(net.get_submodule(owner), name) for owner, name in caches if f"{owner}.".startswith(own)]


def _check(net: nn.Module, pieces: Sequence[TracedPiece], images: Tensor) -> None:
    """Raise CannotTraceError where the pieces give other bits than the network, in eval mode."""
    if images.is_meta:
        return
    with torch.no_grad():
        tensors: tuple[Tensor, ...] = (images,)
        for piece in pieces:
            tensors = piece.run(net, tensors)
        if not torch.equal(tensors[0], net(images)):
            raise CannotTraceError("its pieces give other logits than it does")


def _images(net: nn.Module, rows: int, input_shape: Sequence[int]) -> Tensor:
    """Return images of no particular look: none is like another, and no generator is used."""
    parameter = next(net.parameters())
    size = rows * input_shape[0] * input_shape[1] * input_shape[2]
    values = torch.arange(size, device=parameter.device, dtype=torch.float32).mul(12.9898).sin()
    return values.to(parameter.dtype).reshape(rows, *input_shape)


Pieces = tuple[list[TracedPiece], list[TracedPiece] | None, list[tuple[Tensor, ...]]]
"""The pieces of a network in eval mode, those in train mode where they are others, and what is alive after each."""


def _pieces(net: nn.Module, input_shape: Sequence[int], facts: Facts) -> Pieces:
    """Cut `net` at the ends of its groups, and at those of the blocks of a stage where a single tensor is alive at each."""
    images = [_images(net, rows, input_shape) for rows in ROWS]
    try:
        cutter = _Cutter(net, images, facts, but=set())
        return (_Cutter(net, images, facts, but=cutter.tangled) if cutter.tangled else cutter).pieces()
    except (CannotTraceError, RuntimeError, TypeError, ValueError):  # a stage's own code cannot be followed
        return _Cutter(net, images, facts, but=set(facts.groups.values())).pieces()


class _Cutter:
    """Traces and cuts one network by the units of its parameters; those modules whose parameters share one are whole.

    Args:
        net: the network.
        images: two batches, of ROWS rows.
        facts: what its library says of it.
        but: the groups that are not split into blocks.

    Attributes:
        tangled: the groups in which more than one tensor is alive between two blocks.
    """

    def __init__(self, net: nn.Module, images: Sequence[Tensor], facts: Facts, *, but: set[int]) -> None:
        units = split_stages(net, facts.groups, but=but)
        self._net, self._images, self._functions = net, images, facts.functions
        self._below, self._head = groups_below(units), max(units.values()).group
        self._trace, self._plain, self.tangled = self._cut(False)

    def pieces(self) -> Pieces:
        """Return the pieces."""
        found, pieces = self._trace, self._plain
        if len(pieces) <= MIN_CUTS:
            raise CannotTraceError("it has no block, or none before and after which few enough tensors are alive")
        pieces, alive = find_copies(pieces, self._net, self._images[0])
        also, training, _ = self._cut(True)
        if also.steps == found.steps:
            return pieces, None, alive
        if [len(piece.made) for piece in training] != [len(piece.made) for piece in pieces]:
            raise CannotTraceError("other tensors are alive between its layers in train mode than in eval mode")
        return pieces, [replace(one, copies=two.copies) for one, two in zip(training, pieces, strict=True)], alive

    def _cut(self, mode: bool) -> tuple[Trace, list[TracedPiece], set[int]]:
        self._net.eval()
        for name, module in self._net.named_modules():  # those that are whole ask their own flag whenever they run
            module.training = mode and (name == "" or not _inside_whole(name, self._whole))
        found = trace(self._net, self._images, whole=self._whole, functions=self._functions)
        return found, *cut(found, self._ends(found))

    def _whole(self, name: str) -> bool:
        return len(self._below.get(name, ())) < 2

    def _ends(self, found: Trace) -> list[End]:
        """Return for each unit but the head the steps after which it may be cut: from its last one to before the next unit's."""
        runs = [(place, str(step.target)) for place, step in enumerate(found.steps) if step.kind == "module"]
        units = self._units([name for _, name in runs])
        owned = [(place, name, unit) for (place, name), unit in zip(runs, units, strict=True) if unit is not None]
        apart: dict[tuple[Unit, str], list[int]] = {}  # of the modules of each unit, by the children of the network
        for place, name, unit in owned:
            apart.setdefault((unit, name.partition(".")[0]), []).append(place)
        joined: list[tuple[Unit, list[int]]] = []
        for (unit, _), own in apart.items():  # in the order in which they first run
            if joined and joined[-1][0] == unit:
                joined[-1] = (unit, joined[-1][1] + own)
            else:
                joined.append((unit, own))
        ends = []
        reached = -1
        for number, (unit, own) in enumerate(joined):
            if unit.group == self._head and reached >= 0:
                continue
            reached = max(reached, *own)
            after = next((place for place, _, _ in owned if place > reached), len(found.steps))
            following = joined[number + 1][0].group if number + 1 < len(joined) else None
            holder = _common([name for place, name, _ in owned if place in (reached, after)])
            ends.append(End(reached, after - 1, unit.group if unit.group == following else None, holder))
        return ends

    def _units(self, names: Sequence[str]) -> list[Unit | None]:
        """Return the units of modules in the order in which they run; None without parameters.

        What runs in a stage beside its blocks goes with the block before it, and at its start with the first one.
        """
        found = [next(iter(self._below[name]), None) if name in self._below else None for name in names]
        latest: dict[int, Unit] = {}
        for unit in reversed(found):
            if unit is not None and unit.block >= 0:
                latest[unit.group] = unit  # at last the first to run
        for place, unit in enumerate(found):
            if unit is not None:
                if unit.block >= 0:
                    latest[unit.group] = unit
                found[place] = latest.get(unit.group, unit)
        return found


def _common(names: Sequence[str]) -> str:
    """Return the name of the smallest module that holds all of these."""
    return commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")


def _inside_whole(name: str, whole: Callable[[str], bool]) -> bool:
    """Return whether a module is one step of the trace, or lies in one that is."""
    parts = name.split(".")
    return any(whole(".".join(parts[:length])) for length in range(1, len(parts) + 1))


def _owned(pieces: Sequence[TracedPiece]) -> Iterator[list[str]]:
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
