"""The forward pass that really stops, for a GPU: programs of fixed shape, launched by counts that arrive while they run.

It answers as router.Router does. What a program does is in stages.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from eectl.core.capture import Capture, recorder_for
from eectl.exits.bookkeeping import bookkeeping_for
from eectl.exits.policy import Policy, Rule
from eectl.exits.router import Answers
from eectl.exits.stages import Stages, in_bucket
from eectl.models.backbone import is_channels_last
from eectl.models.multi_exit import MultiExitModel

IN_FLIGHT = 4  # programs that a stream launches before it waits for the counts of the first
MOST_SHAPES = 4  # for which programs are kept
ENDLESS = 1 << 62


class Counts(Protocol):
    """Numbers on their way from the device."""

    def arrived(self) -> bool:
        """Return whether they are there."""

    def read(self) -> list[int]:
        """Return them; waits where they are not there yet."""


class Courier(Protocol):
    """Brings counts from the device. `lags` says that they take their time, in which the host can launch more."""

    lags: bool

    def send(self, counts: Tensor) -> Counts:
        """Send what the counts will be once all that was launched so far has run."""


class _Known:
    def __init__(self, counts: list[int]) -> None:
        self._counts = counts

    def arrived(self) -> bool:
        return True

    def read(self) -> list[int]:
        return self._counts


class Direct:
    """Reads counts at once: on a CPU nothing is under way."""

    lags = False

    def send(self, counts: Tensor) -> Counts:
        return _Known(counts.tolist())


class _Pinned:
    def __init__(self, host: Tensor, event: torch.cuda.Event) -> None:
        self._host, self._event = host, event

    def arrived(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> list[int]:
        self._event.synchronize()
        numbers: list[int] = self._host.tolist()
        return numbers


class Pinned:
    """Copies counts into page-locked memory in turn with the work; each place is used again after `num_places` others."""

    lags = True

    def __init__(self, width: int, num_places: int) -> None:
        self._places = [torch.empty(width, dtype=torch.int64, pin_memory=True) for _ in range(num_places)]
        self._events = [torch.cuda.Event() for _ in range(num_places)]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, counts: Tensor) -> Counts:
        place, event = self._places[self._next], self._events[self._next]
        self._next = (self._next + 1) % len(self._places)
        place.copy_(counts, non_blocking=True)
        event.record()
        return _Pinned(place, event)


class StaticRouter:
    """A network under a policy, in programs of fixed shape; the network must be in eval mode and stay there.

    Call it under torch.inference_mode(). A batch goes through the exits at sizes that are powers of two, each known from the
    exit before the last, so that the device need not wait for the host. A stream runs full batches only.

    Args:
        capture: records the programs; default: the device's recorder.
        courier: brings the counts of rows to the host; default: the device's.
    """

    def __init__(
        self,
        model: MultiExitModel,
        policy: Policy,
        *,
        capture: Capture | None = None,
        courier: Courier | None = None,
    ) -> None:
        assert not any(module.training for module in model.modules())
        assert len(policy.thresholds) == model.num_exits - 1
        device = next(model.parameters()).device
        self._model, self._rule = model, Rule(policy)
        self._capture = capture or Capture(recorder_for(device), plain_calls=1)
        self._courier = courier or _courier_for(device, model.num_exits)
        self._books = bookkeeping_for(device, say=self._capture.say)
        self._longest: int | None = getattr(model.backbone, "max_tokens", None)
        self._kept: OrderedDict[object, Stages] = OrderedDict()

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [row, class] of the exit at which each row leaves, and that exit's index [row], from 0."""
        count = len(inputs)
        assert count
        inputs = in_bucket(inputs, longest=self._longest)
        stages = self._for_batch(inputs)
        stages.start()
        stages.give(count)
        stages.inputs[:count].copy_(inputs)
        sent: list[Counts] = []
        behind, waiting, last = int(self._courier.lags), count, self._model.num_exits
        for number in range(1, last + 1):
            stages.run(number, _size(waiting, stages.batch))
            if number == last:
                break
            sent.append(self._courier.send(stages.end))
            if number > behind:
                waiting = count - sent[number - 1 - behind].read()[-1]
            if not waiting:
                break
        rows, logits, exits = stages.answers(0, count)
        return torch.empty_like(logits).index_copy_(0, rows, logits), torch.empty_like(exits).index_copy_(0, rows, exits)

    def stream(self, batches: Iterable[Tensor], *, batch_size: int) -> Iterator[Answers]:
        """Yield answers as they come, for the rows of `batches` numbered from 0: every program runs on a full batch.

        Rows wait in rings until `batch_size` of them are there; what is left when the batches end, or where texts of another
        length come, runs from the first exit on, each time with what waits at the next.
        """
        flow: _Flow | None = None
        first = 0
        for batch in batches:
            padded = in_bucket(batch, longest=self._longest)
            for part in torch.split(padded, batch_size):
                key = _key(part)
                if flow is None or flow.key != key:
                    if flow is not None:
                        yield from flow.drain()
                        first += flow.given
                    flow = _Flow(self._for_stream(part, batch_size), self._courier, key=key, first=first)
                yield from flow.feed(part)
        if flow is not None:
            yield from flow.drain()

    def _for_batch(self, inputs: Tensor) -> Stages:
        """Return programs for batches like this one: any that take as many rows."""
        shape = _key(inputs)
        for key, stages in self._kept.items():
            if key == (shape, "batch", stages.batch) and stages.batch >= len(inputs):
                self._kept.move_to_end(key)
                return stages
        for key in [key for key, stages in self._kept.items() if key == (shape, "batch", stages.batch)]:
            self._kept.pop(key).drop()  # too small ones
        return self._keep((shape, "batch", len(inputs)), lambda: self._build(inputs, len(inputs), in_flight=0))

    def _for_stream(self, inputs: Tensor, batch_size: int) -> Stages:
        key = (_key(inputs), "stream", batch_size)
        return self._keep(key, lambda: self._build(inputs, batch_size, in_flight=IN_FLIGHT))

    def _build(self, inputs: Tensor, batch: int, *, in_flight: int) -> Stages:
        options = {"batch": batch, "in_flight": in_flight}
        return Stages(self._model, self._rule, inputs[:2], **options, capture=self._capture, books=self._books)

    def _keep(self, key: object, make: Callable[[], Stages]) -> Stages:
        if key not in self._kept:
            if len(self._kept) >= MOST_SHAPES:
                self._kept.popitem(last=False)[1].drop()
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]


class _Flow:
    """Rows of one shape on their way through the programs, and what the host knows of where they are.

    `given` counts the rows that came in; answers number them from `first`.
    """

    def __init__(self, stages: Stages, courier: Courier, *, key: object, first: int) -> None:
        self.key, self.given = key, 0
        self._stages, self._courier, self._first = stages, courier, first
        self._size = stages.batch
        self._filled = 0  # rows in the input buffer
        self._last = len(stages.end) - 1
        self._known = [0] * len(stages.end)
        self._taken = [0] * len(stages.end)
        self._under_way: deque[Counts] = deque()
        self._yielded = 0
        stages.start()
        stages.give(ENDLESS)

    def feed(self, rows: Tensor) -> Iterator[Answers]:
        """Take rows in, a batch at most, and run what is full."""
        while len(rows):
            part = rows[: self._size - self._filled]
            self._stages.inputs[self._filled : self._filled + len(part)].copy_(part)
            self._filled += len(part)
            self.given += len(part)
            rows = rows[len(part) :]
            if self._filled == self._size:
                yield from self._run_full()
                yield from self._launch(1, self._size)
                self._filled = 0
        yield from self._run_full()

    def drain(self) -> Iterator[Answers]:
        """Run all rows that are left."""
        if self._filled:
            self._stages.give(self.given)
            yield from self._run_full()
            yield from self._launch(1, self._filled)
            self._filled = 0
        while True:
            while self._under_way:
                self._take_in()
            yield from self._run_full()
            if self._under_way:
                continue
            waiting = [number for number in range(2, self._last + 1) if self._waiting(number)]
            if not waiting:
                break
            yield from self._launch(waiting[0], min(self._waiting(waiting[0]), self._size))
        yield from self._answer(1)
        assert self._yielded == self.given

    def _run_full(self) -> Iterator[Answers]:
        """Launch the deepest program for which a full batch is known to wait, until there is none."""
        while True:
            self._look()
            full = [number for number in range(2, self._last + 1) if self._waiting(number) >= self._size]
            if not full:
                return
            yield from self._launch(full[-1], self._size)

    def _launch(self, number: int, rows: int) -> Iterator[Answers]:
        """Launch a program that will find so many rows.

        When it is chosen no deeper ring is known to hold a batch, and the launches in flight bring a batch each at most, so that
        the ring that it fills holds less than two batches and those: its capacity is never reached. So it is with answers.
        """
        assert number == self._last or self._waiting(number + 1) < self._size
        while len(self._under_way) >= self._stages.in_flight:
            self._take_in()
        yield from self._answer(self._size)
        self._stages.run(number, self._size)
        if number > 1:
            self._taken[number - 1] += rows
        self._under_way.append(self._courier.send(self._stages.end))

    def _look(self) -> None:
        while self._under_way and self._under_way[0].arrived():
            self._take_in()

    def _take_in(self) -> None:
        self._known = self._under_way.popleft().read()

    def _waiting(self, number: int) -> int:
        """Return how many rows are known to wait for program `number`."""
        return self._known[number - 1] - self._taken[number - 1]

    def _answer(self, fewest: int) -> Iterator[Answers]:
        """Yield the answers that are known to be there, unless they are too few to be worth it."""
        if self._known[-1] - self._yielded < fewest:
            return
        rows, logits, exits = self._stages.answers(self._yielded, self._known[-1])
        self._yielded = self._known[-1]
        yield Answers(rows + self._first if self._first else rows, logits, exits)


def _size(rows: int, most: int) -> int:
    """Return the power of two that holds so many rows, `most` at most."""
    return min(1 << (rows - 1).bit_length(), most)


def _key(inputs: Tensor) -> object:
    return inputs.shape[1:], inputs.dtype, is_channels_last(inputs)


def _courier_for(device: torch.device, num_exits: int) -> Courier:
    return Pinned(num_exits + 1, max(IN_FLIGHT, num_exits) + 1) if device.type == "cuda" else Direct()
