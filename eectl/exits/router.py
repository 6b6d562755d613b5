"""The forward pass that really stops: rows that are ready leave, the others go on together. When a row leaves, policy says.

One batch at a time, survivors are regrouped at once, or where measured times say that it pays; over a stream of batches they
can also wait in a queue until a whole batch of them is there. Every number of rows is a shape of its own, which suits CPUs; for
GPUs there is static_router.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from eectl.exits.policy import Policy, Rule
from eectl.exits.segment_times import SegmentTimes
from eectl.models.backbone import Hidden
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel


@dataclass(frozen=True)
class Answers:
    """Rows that have left: their numbers [n], logits [n, class], and the exits [n] at which they did, from 0."""

    rows: Tensor
    logits: Tensor
    exits: Tensor


class Answerer(Protocol):
    """A network under a policy: what it answers to each row, and at which exit. All ways to do it give the same."""

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [row, class] of the exit at which each row leaves, and that exit's index [row], from 0."""

    def stream(self, batches: Iterable[Tensor], *, batch_size: int) -> Iterator[Answers]:
        """Yield answers as they come, for the rows of `batches` numbered from 0; `batch_size` of them go together."""


@dataclass
class _Party:
    """Rows that go through the network together: their numbers, and what the last segment and the exits so far gave.

    `gone` [row] marks those that have left and are only carried along, `num_gone` of them; `wasted` are the seconds that this
    has cost. `memory` is where the caller's inputs lie, which nobody may write to.
    """

    hidden: Hidden | Tensor
    rows: Tensor
    earlier: list[ExitOutput | None] = field(default_factory=list)
    gone: Tensor | None = None
    num_gone: int = 0
    wasted: float = 0.0
    memory: int = 0

    @staticmethod
    def of(inputs: Tensor, start: int = 0) -> "_Party":
        """Return a batch that comes in as a party; its rows are numbered from `start`."""
        rows = torch.arange(start, start + len(inputs), device=inputs.device)
        return _Party(inputs, rows, memory=inputs.untyped_storage().data_ptr())

    @property
    def num_waiting(self) -> int:
        """The rows that have no answer yet."""
        return len(self.rows) - self.num_gone

    def answer(self, output: ExitOutput, number: int) -> Answers:
        """Let all rows that have no answer yet leave at exit `number`, from 1."""
        waiting = slice(None) if self.gone is None else (~self.gone).nonzero()[:, 0]
        self.num_gone = len(self.rows)
        return _left(self.rows[waiting], output.logits[waiting], number)

    def regroup(self) -> None:
        """Drop the rows that have left. Where fewer go than stay, the last ones that stay take their places."""
        assert self.gone is not None and isinstance(self.hidden, Hidden)
        count, order = self.num_waiting, (~self.gone).nonzero()[:, 0]
        if 2 * count < len(self.rows) or self._is_the_callers():
            self.hidden = self.hidden.take(order)
        else:
            gaps = self.gone[:count].nonzero()[:, 0]
            order = torch.arange(count, device=order.device).index_copy_(0, gaps, order[count - len(gaps) :])
            self.hidden = self.hidden.close_gaps(gaps, order)
        self.rows = self.rows.index_select(0, order)
        self.earlier = [each and _take(each, order) for each in self.earlier]
        self.gone, self.num_gone, self.wasted = None, 0, 0.0

    def _is_the_callers(self) -> bool:
        """Return whether the hidden state lies in the memory of the inputs, as blocks that do nothing would leave it."""
        assert isinstance(self.hidden, Hidden)
        return self.memory in {scale.untyped_storage().data_ptr() for scale in self.hidden.scales}

    def split(self, count: int) -> "tuple[_Party, _Party]":
        """Return the first `count` rows and the rest, as views."""
        assert self.gone is None and isinstance(self.hidden, Hidden)
        hidden, rows = self.hidden.split(count), (self.rows[:count], self.rows[count:])
        earlier = [_split(each, count) for each in self.earlier]
        first, rest = (_Party(hidden[i], rows[i], [pair[i] for pair in earlier], memory=self.memory) for i in (0, 1))
        return first, rest

    @staticmethod
    def cat(parties: "Sequence[_Party]") -> "_Party":
        """Return all of their rows as one party."""
        if len(parties) == 1:
            return parties[0]
        hidden = Hidden.cat([party.hidden for party in parties if isinstance(party.hidden, Hidden)])
        earlier = [_cat(each) for each in zip(*(party.earlier for party in parties), strict=True)]
        return _Party(hidden, torch.cat([party.rows for party in parties]), earlier)


class Router:
    """A network under a policy; the network must be in eval mode and stay there. Call it under torch.inference_mode().

    With `times`, rows that have left are dropped only where the batch without them is enough faster; without, at once.
    """

    def __init__(self, model: MultiExitModel, policy: Policy, *, times: SegmentTimes | None = None) -> None:
        assert not any(module.training for module in model.modules())
        assert len(policy.thresholds) == model.num_exits - 1
        self._model, self._times = model, times
        self._rule = Rule(policy)
        self._remembers = self._rule.remembers or any(getattr(head, "uses_earlier", False) for head in model.exits)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [row, class] of the exit at which each row leaves, and that exit's index [row], from 0.

        Once every row has left nothing more runs.
        """
        assert len(inputs)
        if len(inputs) == 1:
            return self._alone(inputs)
        party = _Party.of(inputs)
        answers = []
        for number in range(1, self._model.num_exits + 1):
            answers += self._step(party, number)
            if not party.num_waiting:
                break
            if party.num_gone and self._pays(party, number):
                party.regroup()
        return rows_in_order(answers)

    def stream(self, batches: Iterable[Tensor], *, batch_size: int) -> Iterator[Answers]:
        """Yield answers as they come, for the rows of `batches` numbered from 0: segments after the first see full batches.

        Survivors wait in a queue per exit until `batch_size` of them are there; what is left when the batches end runs from the
        first exit on, each time with what waits at the next. With `times`, rows wait only where the segment takes enough longer
        without others beside them.
        """
        last = self._model.num_exits
        queues = [_Queue() for _ in range(last + 1)]  # the first two stay empty

        def run(party: _Party, number: int) -> Iterator[Answers]:
            yield from self._step(party, number)
            if not party.num_waiting:
                return
            if party.num_gone:
                party.regroup()
            if self._queueing_pays(number, len(party.rows), batch_size):
                queues[number + 1].put(party)
            else:
                yield from run(party, number + 1)

        start = 0
        for inputs in batches:
            yield from run(_Party.of(inputs, start), 1)
            start += len(inputs)
            for number in range(2, last + 1):
                while queues[number].size >= batch_size:
                    yield from run(queues[number].get(batch_size), number)
        for number in range(2, last + 1):
            while queues[number].size:
                yield from run(queues[number].get(batch_size), number)

    def _alone(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run a single row until it stops: nothing is indexed."""
        model, number = self._model, 1
        hidden: Hidden | Tensor = inputs
        earlier: list[ExitOutput | None] = []
        while True:
            hidden = model.advance(hidden, number)
            output = model.leave(hidden, number, earlier)
            if number == model.num_exits or self._rule.fires_alone(number, output.logits, self._past(earlier)):
                return output.logits, torch.full((1,), number - 1, device=output.logits.device)
            earlier.append(output if self._remembers else None)
            number += 1

    def _step(self, party: _Party, number: int) -> list[Answers]:
        """Run segment and exit `number` on a party, mark the rows that leave there, and give their answers."""
        model = self._model
        party.hidden = model.advance(party.hidden, number)
        output = model.leave(party.hidden, number, party.earlier)
        if number == model.num_exits:
            return [party.answer(output, number)]
        fires = self._rule.fires(number, output.logits, self._past(party.earlier))
        if party.gone is not None:
            fires = fires & ~party.gone
        num_fired = int(fires.count_nonzero())  # the one wait for the device
        if num_fired == party.num_waiting:
            return [party.answer(output, number)]
        party.earlier.append(output if self._remembers else None)
        if not num_fired:
            return []
        leaving = fires.nonzero()[:, 0]
        party.gone = fires if party.gone is None else party.gone | fires
        party.num_gone += num_fired
        return [_left(party.rows.index_select(0, leaving), output.logits.index_select(0, leaving), number)]

    def _past(self, earlier: Sequence[ExitOutput | None]) -> Sequence[Tensor]:
        return [each.logits for each in earlier if each is not None] if self._rule.remembers else ()

    def _pays(self, party: _Party, number: int) -> bool:
        """Return whether to regroup after exit `number`: once carrying the rows that left costs more than dropping them.

        What was lost by waiting so far counts: so many short segments cannot lose more than regrouping once would have cost,
        and the same again.
        """
        if self._times is None:
            return True
        saved = self._times.saved(number + 1, rows=len(party.rows), staying=party.num_waiting)
        party.wasted += saved
        return party.wasted > self._times.regroup(number, moved=min(party.num_gone, party.num_waiting))

    def _queueing_pays(self, number: int, rows: int, batch_size: int) -> bool:
        """Return whether survivors of exit `number` gain more from a full batch than it takes to copy them into one."""
        if self._times is None:
            return True
        return self._times.crowd(number + 1, rows=rows, among=batch_size) > self._times.regroup(number, moved=rows)


class _Queue:
    """Survivors of several batches that wait for the same segment."""

    def __init__(self) -> None:
        self.size = 0
        self._parties: list[_Party] = []

    def put(self, party: _Party) -> None:
        """Add a party's rows."""
        self.size += len(party.rows)
        self._parties.append(party)

    def get(self, count: int) -> _Party:
        """Take `count` rows out as one party, or as many as there are; first come, first served."""
        taken, missing = [], count
        while missing and self._parties:
            party = self._parties.pop(0)
            if len(party.rows) > missing:
                party, rest = party.split(missing)
                self._parties.insert(0, rest)
            taken.append(party)
            missing -= len(party.rows)
        self.size -= count - missing
        return _Party.cat(taken)


def early_exit(model: MultiExitModel, inputs: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Return the logits [row, class] of the exit at which each row leaves, and that exit's index [row], from 0; see Router."""
    return Router(model, policy)(inputs)


def rows_in_order(answers: Sequence[Answers]) -> tuple[Tensor, Tensor]:
    """Return the logits [row, class] and exits [row] of all rows 0..N−1, each of which is in one of `answers`."""
    rows = torch.cat([each.rows for each in answers])
    logits = torch.cat([each.logits for each in answers])
    exits = torch.cat([each.exits for each in answers])
    return torch.empty_like(logits).index_copy_(0, rows, logits), torch.empty_like(exits).index_copy_(0, rows, exits)


def _left(rows: Tensor, logits: Tensor, number: int) -> Answers:
    """Return the answers of rows that leave together at exit `number`, from 1."""
    return Answers(rows, logits, torch.full_like(rows, number - 1))


def _take(output: ExitOutput, rows: Tensor) -> ExitOutput:
    return ExitOutput(output.logits.index_select(0, rows), None if output.state is None else output.state.index_select(0, rows))


def _split(output: ExitOutput | None, count: int) -> tuple[ExitOutput | None, ExitOutput | None]:
    if output is None:
        return None, None
    states = (None, None) if output.state is None else (output.state[:count], output.state[count:])
    return ExitOutput(output.logits[:count], states[0]), ExitOutput(output.logits[count:], states[1])


def _cat(outputs: Sequence[ExitOutput | None]) -> ExitOutput | None:
    """Return one exit's outputs on several parties; None where nobody reads them."""
    there = [each for each in outputs if each is not None]
    if not there:
        return None
    states = [each.state for each in there if each.state is not None]
    return ExitOutput(torch.cat([each.logits for each in there]), torch.cat(states) if states else None)
