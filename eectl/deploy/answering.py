"""From an exit's outputs to answers with names, for each task. Runs no network and decides on no exit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.deploy.answers import RowAnswer
from eectl.exits.decisions import HALF, Decisions
from eectl.models.losses import TASKS
from eectl.recipe.choices import TASK_CHOICES, in_order


@dataclass(frozen=True)
class Answering:
    """The names that a network's outputs have.

    `task` is an entry of TASKS, `classes` are those of classes, levels or labels, `targets` those of numbers. `decisions` are for
    several labels the probability that each must exceed at each exit; None: 1/2.
    """

    task: str
    classes: tuple[str, ...]
    targets: tuple[str, ...] = ()
    decisions: Decisions | None = None

    def answers(self, logits: Tensor, exits: Sequence[int], costs: Sequence[float], *, top: int) -> Iterator[RowAnswer]:
        """Make answers of finite outputs [row, output] on the CPU, in float32.

        Args:
            logits: the outputs of each row's exit.
            exits: those exits, from 1.
            costs: what each row cost, as a share of the plain backbone's cost.
            top: how many of the likeliest classes or labels each answer names.
        """
        return _ANSWERS[self.task](self, logits, zip(exits, costs, strict=True), top)

    def named(self, probabilities: Sequence[float], places: Sequence[int]) -> tuple[tuple[str, float], ...]:
        """Return the names of the classes at these places with their probabilities."""
        return tuple((self.classes[place], probability) for place, probability in zip(places, probabilities, strict=True))


_Ways = Iterator[tuple[int, float]]  # each row's exit and cost


def _classes(how: Answering, logits: Tensor, ways: _Ways, top: int) -> Iterator[RowAnswer]:
    best = logits.softmax(dim=1).topk(top, dim=1)
    for (number, cost), probabilities, places in zip(ways, best.values.tolist(), best.indices.tolist(), strict=True):
        named = how.named(probabilities, places)
        yield RowAnswer(number, cost, label=named[0][0], probability=named[0][1], top=named)


def _levels(how: Answering, logits: Tensor, ways: _Ways, top: int) -> Iterator[RowAnswer]:
    """Name the median level first, and after it the likeliest others."""
    task = TASKS["ordinal"]
    probabilities, predicted = task.probabilities(logits), task.predicted(logits)
    order = probabilities.scatter(1, predicted[:, None], 2.0).topk(top, dim=1).indices
    rows = zip(ways, probabilities.gather(1, order).tolist(), order.tolist(), strict=True)
    for (number, cost), own, places in rows:
        named = how.named(own, places)
        yield RowAnswer(number, cost, label=named[0][0], probability=named[0][1], top=named)


def _labels(how: Answering, logits: Tensor, ways: _Ways, top: int) -> Iterator[RowAnswer]:
    best = TASKS["multilabel"].probabilities(logits).sort(dim=1, descending=True, stable=True)
    cuts = None if how.decisions is None else torch.tensor(how.decisions, dtype=torch.float64)
    for (number, cost), probabilities, places in zip(ways, best.values, best.indices, strict=True):
        cut = torch.full_like(probabilities, HALF) if cuts is None else cuts[number - 1][places]
        applies = (probabilities.double() > cut.double()).tolist()
        named = how.named(probabilities.tolist(), places.tolist())
        chosen = tuple(each for each, is_over in zip(named, applies, strict=True) if is_over)
        yield RowAnswer(number, cost, top=named[:top], labels=chosen)


def _numbers(how: Answering, logits: Tensor, ways: _Ways, top: int) -> Iterator[RowAnswer]:  # noqa: ARG001
    for (number, cost), values in zip(ways, logits.tolist(), strict=True):
        if len(values) == 1:
            yield RowAnswer(number, cost, value=values[0])
        else:
            yield RowAnswer(number, cost, numbers=tuple(zip(how.targets, values, strict=True)))


_ANSWERS: dict[str, Callable[[Answering, Tensor, _Ways, int], Iterator[RowAnswer]]] = in_order(
    TASK_CHOICES, {"classification": _classes, "regression": _numbers, "multilabel": _labels, "ordinal": _levels}
)
