"""Cut a traced forward pass into pieces where few tensors are alive, at the ends of groups of layers, and run the pieces.

A piece is given what is alive before it, rows first, and gives what is alive after it. What depends on no image (position
embeddings, biases) is not carried along: each piece that needs it computes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eectl.models.adapters.tracing import ROWS, Rows, Slot, Step, Trace, call, replaced

MOST_ALIVE = 4  # tensors that one cut may carry
MIN_CUTS = 2  # of a network with blocks: after the stem and before the head


@dataclass(frozen=True)
class End:
    """Where a unit of layers ends: it may be cut from the next one after the steps from `first` to `last`.

    Attributes:
        first: the number of a step.
        last: the same.
        group: the number of the group that the unit and the next one are in; None where they are in different ones.
        holder: the name of the smallest module that both are in.
    """

    first: int
    last: int
    group: int | None
    holder: str


@dataclass(frozen=True)
class Carried:
    """A slot that is alive at a cut: a tensor, or a tuple or list (`form`) of tensors.

    `times` says for each tensor how many of its rows there are for one image: patches of patches lie so.
    """

    slot: int
    form: type | None
    times: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of tensors."""
        return len(self.times)

    def value(self, tensors: Sequence[Tensor]) -> Any:
        """Return the slot's value of tensors with a row for each image."""
        parts = [tensor if times == 1 else tensor.flatten(0, 1) for tensor, times in zip(tensors, self.times, strict=True)]
        return parts[0] if self.form is None else self.form(parts)

    def tensors(self, value: Any) -> list[Tensor]:
        """Return the tensors of the slot's value, with a row for each image."""
        parts = [value] if self.form is None else value
        return [part if times == 1 else part.unflatten(0, (-1, times)) for part, times in zip(parts, self.times, strict=True)]


@dataclass(frozen=True)
class TracedPiece:
    """A part of a forward pass.

    Attributes:
        given: what it reads of the parts before it.
        steps: its steps, in order.
        made: what later parts read, in the order in which it was made; of the last piece the result.
        copies: whether it changes what it is given in place, so that it has to work on a copy.
        last_use: for each of `steps` the slots that no later step reads.
    """

    given: tuple[Carried, ...]
    steps: tuple[Step, ...]
    made: tuple[Carried, ...]
    copies: bool = False
    last_use: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def run(self, net: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the piece of `net` on the tensors that it is given."""
        values: dict[int, Any] = {}
        num_rows, start = tensors[0].shape[0], 0
        if self.copies:
            tensors = [tensor.clone() for tensor in tensors]
        for each in self.given:
            values[each.slot] = each.value(tensors[start : start + each.count])
            start += each.count
        for step, done in zip(self.steps, self.last_use, strict=True):
            values[step.slot] = _run(net, step, values, num_rows)
            for slot in done:
                del values[slot]
        found: list[Tensor] = []
        for each in self.made:
            found += each.tensors(values[each.slot])
        return tuple(found)

    def names(self) -> list[str]:
        """Return the names of the modules, parameters and buffers that its steps read."""
        return [step.target for step in self.steps if step.kind in ("module", "attribute")]


def _run(net: nn.Module, step: Step, values: Mapping[int, Any], num_rows: int) -> Any:
    def known(value: Any) -> Any:
        if isinstance(value, Slot):
            return values[value.number]
        return value.times * num_rows if isinstance(value, Rows) else value

    return call(net, step.kind, step.target, replaced(step.args, known), replaced(dict(step.kwargs), known))


def cut(trace: Trace, ends: Sequence[End]) -> tuple[list[TracedPiece], set[int]]:
    """Return a trace as pieces, and the groups in which more than one tensor is alive where a unit ends.

    Where too much is alive at a unit's end, it stays with the next one, and so do the others in the module that holds both, as
    long as there are other cuts: a dense block, whose every layer reads all layers before it, is not cut after its first ones.
    """
    steps, free = trace.steps, _free(trace)
    last_read = {trace.result: len(steps)}
    for place, step in enumerate(steps):
        for slot in step.needs:
            last_read[slot] = max(last_read.get(slot, 0), place)
    made_at = {0: -1, **{step.slot: place for place, step in enumerate(steps)}}

    def alive(place: int) -> tuple[Carried, ...] | None:
        """Return what is alive after step `place`; None where it cannot be carried."""
        slots = [slot for slot, made in made_at.items() if made <= place < last_read.get(slot, -1) and slot not in free]
        found = [_carried(slot, trace.values[slot]) for slot in slots]
        carried = tuple(each for each in found if each is not None)
        fits = len(carried) == len(found) and 0 < sum(each.count for each in carried) <= MOST_ALIVE
        return carried if fits and carried[0].slot != 0 else None

    places: list[tuple[int, tuple[Carried, ...], str]] = []
    tangled: set[int] = set()
    uncut: set[str] = set()
    for end in ends:
        options = [(place, found) for place in range(end.first, end.last + 1) if (found := alive(place)) is not None]
        if not places:  # what comes after the stem's last module (positions, class tokens) is the stem's
            options.reverse()
        best = min(options, key=lambda option: sum(each.count for each in option[1]), default=None)
        if end.group is not None and (best is None or sum(each.count for each in best[1]) > 1):
            tangled.add(end.group)
        elif best is None:
            uncut.add(end.holder)
        elif not places or best[0] > places[-1][0]:
            places.append((*best, end.holder))
    outside = [place for place in places if place[2] not in uncut]
    places = outside if len(outside) >= MIN_CUTS else places
    pieces = []
    start = 0
    given: tuple[Carried, ...] = (Carried(0, None, (1,)),)
    for place, carried, _ in [*places, (len(steps) - 1, (Carried(trace.result, None, (1,)),), "")]:
        pieces.append(_piece(steps, start, place + 1, given, carried, free))
        start, given = place + 1, carried
    return pieces, tangled


def _piece(
    steps: Sequence[Step], start: int, stop: int, given: tuple[Carried, ...], made: tuple[Carried, ...], free: set[int]
) -> TracedPiece:
    """Return steps `start` to before `stop` as a piece, with the earlier steps that depend on no image and are read there."""
    own = list(steps[start:stop])
    wanted = {slot for step in own for slot in step.needs} | {each.slot for each in made}
    before = []
    for step in reversed(steps[:start]):
        if step.slot in wanted and step.slot in free:
            before.append(step)
            wanted |= step.needs
    own = [*reversed(before), *(step for step in own if step.slot not in free or step.slot in wanted)]
    kept = {each.slot for each in made}
    last_use: list[tuple[int, ...]] = []
    seen: set[int] = set(kept)
    for step in reversed(own):
        last_use.append(tuple(slot for slot in {*step.needs, step.slot} if slot not in seen))
        seen |= step.needs | {step.slot}
    return TracedPiece(given, tuple(own), made, last_use=tuple(reversed(last_use)))


def _free(trace: Trace) -> set[int]:
    """Return the slots that depend on no image, but for their number and size."""
    free: set[int] = set()
    for step in trace.steps:
        if step.needs <= free:
            free.add(step.slot)
    return free


def _carried(slot: int, pair: tuple[Any, Any]) -> Carried | None:
    """Return how a slot is carried across a cut; None where it is not made of tensors with rows first."""
    if isinstance(pair[0], Tensor):
        times = _times(*pair)
        return None if times is None else Carried(slot, None, (times,))
    if type(pair[0]) not in (tuple, list) or not pair[0] or not all(isinstance(each, Tensor) for each in pair[0]):
        return None
    found = [times for times in map(_times, *pair) if times is not None]
    return Carried(slot, type(pair[0]), tuple(found)) if len(found) == len(pair[0]) else None


def _times(first: Tensor, second: Tensor) -> int | None:
    """Return how many rows a tensor of the passes with 2 and 3 images has for each; None where it is not made of them alone."""
    times, rest = divmod(len(first), ROWS[0]) if first.ndim > 1 else (0, 1)
    fits = times > 0 and not rest and len(second) == times * ROWS[1] and first.shape[1:] == second.shape[1:]
    return times if fits else None


def find_copies(
    pieces: Sequence[TracedPiece], net: nn.Module, images: Tensor
) -> tuple[list[TracedPiece], list[tuple[Tensor, ...]]]:
    """Return the pieces, with `copies` set for those that change what they are given, and what they make of these images."""
    found, results = [], []
    tensors: tuple[Tensor, ...] = (images,)
    with torch.no_grad():
        for piece in pieces:
            tensors = tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)  # those count no changes
            before = [tensor._version for tensor in tensors]
            made = piece.run(net, tensors)
            changes = [tensor._version for tensor in tensors] != before
            if changes:
                made = replace(piece, copies=True).run(net, tensors)
            found.append(replace(piece, copies=changes))
            results.append(made)
            tensors = made
    return found, results
