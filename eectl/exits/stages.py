"""Early exit as programs of fixed shape: a segment, its exit, the decision, and the rows that stay moved to the next ring.

Nothing here reads a value back or makes a shape of one, so a GPU can replay each program as one CUDA graph. Which program runs
when is not decided here (see static_router).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eectl.core.capture import Capture, Program
from eectl.exits.bookkeeping import Bookkeeping
from eectl.exits.policy import Rule
from eectl.models.backbone import Hidden, is_channels_last
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel

MOST_BYTES = 8 << 30  # of hidden states in rings, as far as fewer programs in flight can keep to it
TOKENS = 32  # the lengths of texts are rounded up to a multiple of it, so that few shapes are met


class Stages:
    """A network under a policy, cut into one program for each exit and number of rows.

    Rows wait in rings, one before each segment but the first, which reads `inputs`. Program k takes up to `size` rows from the
    ring before segment k, first come, first served, runs the segment and its exit, writes the rows that leave into `answers` and
    those that stay into the next ring. Places in it beyond the rows that are there are computed too, and thrown away.

    All counts are on the device. `end[k]` is how many rows were ever put into the ring after exit k, so `end[0]` are the rows
    that were given and `end[-1]` those that were answered. Nothing watches for rings that overflow: the caller does.

    Args:
        example: inputs of the shape, type and memory layout that will come.
        batch: the most rows that a program takes.
        in_flight: how many programs may run before the caller knows how many rows they left; 0: rings hold one batch only.

    Attributes:
        in_flight: the same, but fewer (1 at least) where the rings would take more than MOST_BYTES.
    """

    def __init__(
        self,
        model: MultiExitModel,
        rule: Rule,
        example: Tensor,
        *,
        batch: int,
        in_flight: int,
        capture: Capture,
        books: Bookkeeping,
    ) -> None:
        self.batch = batch
        self._model, self._rule, self._capture = model, rule, capture
        self._books = books
        self._remembers = rule.remembers or any(getattr(head, "uses_earlier", False) for head in model.exits)
        self._programs: dict[tuple[int, int], Program[None]] = {}
        self._places: dict[int, Tensor] = {}
        device = example.device
        self._inputs = _Column(example, batch)
        self._begin = torch.zeros(model.num_exits, dtype=torch.int64, device=device)
        self.end = torch.zeros(model.num_exits + 1, dtype=torch.int64, device=device)
        rows = torch.arange(len(example), device=device)
        hidden: Hidden | Tensor = example
        earlier: list[ExitOutput | None] = []
        kind = torch.bfloat16
        passed: list[tuple[Hidden, tuple[ExitOutput | None, ...]]] = []
        for number in range(1, model.num_exits + 1):
            hidden = model.advance(hidden, number)
            output = model.leave(hidden, number, earlier)
            kind = torch.promote_types(kind, output.logits.dtype) if passed else output.logits.dtype
            earlier.append(output if self._remembers else None)
            passed.append((hidden, tuple(earlier)))
        size = sum(scale[0].nbytes for hidden, _ in passed[:-1] for scale in hidden.scales) * batch
        self.in_flight = max(min(in_flight, MOST_BYTES // max(size, 1) - 2), 1) if in_flight else 0
        self.capacity = (2 + self.in_flight) * batch if in_flight else batch
        self._rings = [_Ring(rows, *each, self.capacity) for each in passed[:-1]]
        self._answered = [_Column(each, self.capacity) for each in (rows, output.logits.to(kind), rows)]

    @property
    def inputs(self) -> Tensor:
        """The rows [batch, …] that the first program reads."""
        return self._inputs.rows

    def start(self) -> None:
        """Forget all rows; those that are given are numbered from 0 again, and as many are there as `give` says."""
        self._begin.zero_()
        self.end.zero_()

    def give(self, count: int) -> None:
        """Say that `count` rows were given in all; more than that does no harm as long as all programs run on full batches."""
        self.end[:1].fill_(count)

    def run(self, number: int, size: int) -> None:
        """Run the program of exit `number` (from 1) for up to `size` rows."""
        program = self._programs.get((number, size))
        if program is None:
            self._places.setdefault(size, torch.arange(1, size + 1, device=self.end.device))
            program = self._programs[number, size] = self._capture.program(lambda: self._stage(number, size))
        program()

    def answers(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the answers from the `first` (from 0) up to the `last` that left: rows [n], logits [n, class], exits [n]."""
        begin, count = (first + 1) % self.capacity, last - first
        head = min(count, self.capacity - begin)
        parts = []
        for column in self._answered:
            whole = column.rows[begin : begin + head].clone()
            parts.append(whole if head == count else torch.cat([whole, column.rows[: count - head]]))
        return parts[0], parts[1], parts[2]

    def drop(self) -> None:
        """Forget the recordings."""
        for program in self._programs.values():
            self._capture.forget(program)
        self._programs.clear()

    def _stage(self, number: int, size: int) -> None:
        model, last = self._model, number == self._model.num_exits
        place = self._places[size]
        begin, end = self._begin[number - 1 : number], self.end[number - 1 : number]
        order, slots, valid = self._books.claim(begin, end, place, capacity=self.capacity)
        hidden: Hidden | Tensor
        earlier: Sequence[ExitOutput | None]
        if number == 1:
            rows, hidden, earlier = order - 1, self._inputs.rows[:size], ()
        else:
            rows, hidden, earlier = self._rings[number - 2].take(slots)
        hidden = model.advance(hidden, number)
        output = model.leave(hidden, number, earlier)
        fires = valid
        if not last:
            past = [each.logits for each in earlier if each is not None] if self._rule.remembers else ()
            fires = self._rule.fires(number, output.logits, past)
        after = None if last else self.end[number : number + 1]
        to_answers, to_ring = self._books.settle(fires, valid, place, answered=self.end[-1:], end=after, capacity=self.capacity)
        kept_rows, kept_logits, kept_exits = self._answered
        kept_rows.put(to_answers, rows)
        kept_logits.put(to_answers, output.logits)
        kept_exits.fill(to_answers, number - 1)
        if not last:
            self._rings[number - 1].put(to_ring, rows, hidden, [*earlier, output if self._remembers else None])


class _Column:
    """One tensor of a ring: rows in memory that stays, and one more row that takes what nobody reads. Maps keep their layout."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._channels_last = is_channels_last(like)
        shape = self._stored(like).shape[1:]
        self._data = torch.zeros((capacity + 1, *shape), dtype=like.dtype, device=like.device)

    @property
    def rows(self) -> Tensor:
        """All rows but the one that nobody reads, as the network takes them."""
        return self._shown(self._data[:-1])

    def take(self, places: Tensor) -> Tensor:
        """Return the rows at these places."""
        return self._shown(self._data.index_select(0, places))

    def put(self, places: Tensor, x: Tensor) -> None:
        """Write rows to these places."""
        self._data.index_copy_(0, places, self._stored(x).to(self._data.dtype))

    def fill(self, places: Tensor, value: int) -> None:
        """Write one number to these places."""
        self._data.index_fill_(0, places, value)

    def _stored(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self._channels_last else x

    def _shown(self, data: Tensor) -> Tensor:
        return data.permute(0, 3, 1, 2) if self._channels_last else data


class _Ring:
    """Rows that wait for a segment: their numbers, hidden states, and what later exits read of earlier ones."""

    def __init__(self, rows: Tensor, hidden: Hidden, earlier: Sequence[ExitOutput | None], capacity: int) -> None:
        self._is_tuple = not isinstance(hidden.x, Tensor)
        self._scales = [_Column(scale, capacity) for scale in hidden.scales]
        self._mask = None if hidden.mask is None else _Column(hidden.mask, capacity)
        self._rows = _Column(rows, capacity)
        self._memory = _Memory(earlier, capacity) if any(earlier) else None
        self._num_earlier = len(earlier)

    def take(self, places: Tensor) -> tuple[Tensor, Hidden, Sequence[ExitOutput | None]]:
        """Return the numbers, hidden states and earlier outputs of the rows at these places."""
        scales = tuple(column.take(places) for column in self._scales)
        mask = None if self._mask is None else self._mask.take(places)
        earlier = [None] * self._num_earlier if self._memory is None else self._memory.take(places)
        return self._rows.take(places), Hidden(scales if self._is_tuple else scales[0], mask), earlier

    def put(self, places: Tensor, rows: Tensor, hidden: Hidden, earlier: Sequence[ExitOutput | None]) -> None:
        """Write rows to these places."""
        self._rows.put(places, rows)
        for column, scale in zip(self._scales, hidden.scales, strict=True):
            column.put(places, scale)
        if self._mask is not None and hidden.mask is not None:
            self._mask.put(places, hidden.mask)
        if self._memory is not None:
            self._memory.put(places, earlier)


class _Memory:
    """The logits and states of all exits before a ring, side by side in one tensor: one copy moves them all."""

    def __init__(self, earlier: Sequence[ExitOutput | None], capacity: int) -> None:
        parts = _parts(earlier)
        self._shapes = [(part.shape[1:], part.dtype) for part in parts]
        self._has_state = [each is not None and each.state is not None for each in earlier]
        self._widths = [part[0].numel() for part in parts]
        self._kept = _Column(_side_by_side(parts), capacity)

    def take(self, places: Tensor) -> list[ExitOutput | None]:
        split = torch.split(self._kept.take(places), self._widths, dim=1)
        parts = iter([part.reshape(-1, *shape).to(kind) for part, (shape, kind) in zip(split, self._shapes, strict=True)])
        return [ExitOutput(next(parts), next(parts) if has_state else None) for has_state in self._has_state]

    def put(self, places: Tensor, earlier: Sequence[ExitOutput | None]) -> None:
        self._kept.put(places, _side_by_side(_parts(earlier)))


def _parts(earlier: Sequence[ExitOutput | None]) -> list[Tensor]:
    there = [each for each in earlier if each is not None]
    assert len(there) == len(earlier)
    return [part for each in there for part in (each.logits, each.state) if part is not None]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return [row, …] of all parts as one [row, number], in a type that holds them all exactly."""
    kind = parts[0].dtype
    for part in parts:
        kind = torch.promote_types(kind, part.dtype)
    return torch.cat([part.reshape(len(part), -1).to(kind) for part in parts], dim=1)


def in_bucket(inputs: Tensor, *, longest: int | None = None) -> Tensor:
    """Return texts [row, 3, token] with padding up to a multiple of TOKENS, but no more than `longest`; images as they are.

    Padding has ids and types of 0 and is hidden by the mask, so that no row's answer changes.
    """
    if inputs.is_floating_point():
        return inputs
    count = inputs.shape[-1]
    wanted = -(-count // TOKENS) * TOKENS
    if longest is not None:
        wanted = max(min(wanted, longest), count)
    return torch.nn.functional.pad(inputs, (0, wanted - count)) if wanted > count else inputs
