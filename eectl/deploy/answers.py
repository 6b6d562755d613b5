"""Answers of a network for new inputs, as plain data. Computes nothing and reads no file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from eectl.core.errors import EectlError

KIND, SCHEMA = "answers", 1
T = TypeVar("T")


@dataclass(frozen=True)
class RowAnswer:
    """A network's answer for one input, at which exit (from 1), and what that cost as a share of the plain backbone's cost.

    Classification: `label` is the likeliest class and `probability` its softmax probability; `top` has the likeliest classes
    with theirs, as many as were asked for. An ordinal task: the same of its level, the median of the likely ones. Regression:
    `value` is the number, or `numbers` are those of several targets by name. Several labels: `labels` are those that apply with
    their probabilities, likeliest first, perhaps none. What does not apply is None, or empty.
    """

    exit: int
    cost: float
    label: str | None = None
    probability: float | None = None
    value: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, float], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a row of JSON says: the answer, its exit and its cost; and `top` where there is more than one.

        The answer is label and probability, a value, values by target, or labels and their probabilities.
        """
        row: dict[str, Any] = {**self._said(), "exit": self.exit, "cost": self.cost}
        if len(self.top) > 1:
            row["top"] = [{"label": label, "probability": probability} for label, probability in self.top]
        return row

    def _said(self) -> dict[str, Any]:
        if self.labels is not None:
            names, probabilities = [name for name, _ in self.labels], [probability for _, probability in self.labels]
            return {"labels": names, "probabilities": probabilities}
        if self.numbers:
            return {"values": dict(self.numbers)}
        return {"label": self.label, "probability": self.probability} if self.value is None else {"value": self.value}


@dataclass(frozen=True)
class AnswerList(Sequence[RowAnswer]):
    """Answers in the order of the inputs; each of their parts also as a list.

    >>> answers = AnswerList((RowAnswer(exit=1, cost=0.25, label="cat", probability=0.9),))
    >>> answers.labels, answers.exits, answers[0].label
    (['cat'], [1], 'cat')
    """

    rows: tuple[RowAnswer, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RowAnswer]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> RowAnswer: ...

    @overload
    def __getitem__(self, index: slice) -> "AnswerList": ...

    def __getitem__(self, index: int | slice) -> "RowAnswer | AnswerList":
        return AnswerList(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    @property
    def labels(self) -> list[str]:
        """The likeliest class of each input; raises EectlError for a task whose answers are numbers, or several labels."""
        return [_there(row.label, row, "labels") for row in self.rows]

    @property
    def label_sets(self) -> list[tuple[str, ...]]:
        """The labels that apply to each input, likeliest first; raises EectlError for a task with one answer for each."""
        return [tuple(name for name, _ in _there(row.labels, row, "label_sets")) for row in self.rows]

    @property
    def probabilities(self) -> list[float]:
        """The probability of each input's likeliest class; raises EectlError as `labels` does."""
        return [_there(row.probability, row, "probabilities") for row in self.rows]

    @property
    def values(self) -> list[float]:
        """The number of each input; raises EectlError for another task, and for several targets, which are in `rows`."""
        return [_there(row.value, row, "values") for row in self.rows]

    @property
    def exits(self) -> list[int]:
        """The exit at which each input left, from 1."""
        return [row.exit for row in self.rows]

    @property
    def costs(self) -> list[float]:
        """The cost of each input, as a share of the plain backbone's cost."""
        return [row.cost for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data: kind, schema, and a row per input."""
        return {"kind": KIND, "schema": SCHEMA, "rows": [row.to_json() for row in self.rows]}


def _there(found: T | None, row: RowAnswer, wanted: str) -> T:
    """Return what was found; raises EectlError where the network's task has no such thing."""
    if found is not None:
        return found
    if row.labels is not None:
        what, instead = "gives several labels", "answers.label_sets"
    elif row.numbers:
        what, instead = "gives several numbers (regression)", "numbers of each of answers.rows"
    elif row.value is not None:
        what, instead = "gives numbers (regression)", "answers.values"
    else:
        what, instead = "classifies", "answers.labels"
    raise EectlError(f"answers.{wanted}: this network {what}; read {instead}")
