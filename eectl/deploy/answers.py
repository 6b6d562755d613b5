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
    with theirs, as many as were asked for. Regression: `value` is the number. What does not apply is None, or empty.
    """

    exit: int
    cost: float
    label: str | None = None
    probability: float | None = None
    value: float | None = None
    top: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what a row of JSON says: label and probability, or value; exit; cost; and `top` where there is more than one."""
        said = {"label": self.label, "probability": self.probability} if self.value is None else {"value": self.value}
        row: dict[str, Any] = {**said, "exit": self.exit, "cost": self.cost}
        if len(self.top) > 1:
            row["top"] = [{"label": label, "probability": probability} for label, probability in self.top]
        return row


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
        """The likeliest class of each input; raises EectlError for a regression, which has `values`."""
        return [_there(row.label, "labels", "values") for row in self.rows]

    @property
    def probabilities(self) -> list[float]:
        """The probability of each input's likeliest class; raises EectlError for a regression, which has `values`."""
        return [_there(row.probability, "probabilities", "values") for row in self.rows]

    @property
    def values(self) -> list[float]:
        """The number of each input; raises EectlError for a classification, which has `labels`."""
        return [_there(row.value, "values", "labels") for row in self.rows]

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


def _there(found: T | None, wanted: str, instead: str) -> T:
    """Return what was found; raises EectlError where the network's task has no such thing."""
    if found is None:
        what = "classifies" if instead == "labels" else "gives numbers (regression)"
        raise EectlError(f"answers.{wanted}: this network {what}; read answers.{instead}")
    return found
