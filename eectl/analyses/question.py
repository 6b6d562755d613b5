"""The inputs and outputs of every question: subjects, a context and an answer; and the sample of rows that it looks at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.tables import Listing, Scalar
from eectl.core.errors import lookup
from eectl.core.seeds import derive_seed
from eectl.data import Batch, Split
from eectl.data.batches import longest_first
from eectl.evaluation.opened import Session


@dataclass(frozen=True)
class Subject:
    """One open network; `label` is what tables and plots call it."""

    label: str
    session: Session


@dataclass(frozen=True)
class Context:
    """The circumstances of a question: seed, rows at once (default: each recipe's), and the progress bar.

    `count(what, total)` is a context manager that gives a function to call once per step.
    """

    seed: int
    batch_size: int | None
    count: Callable[[str, int], AbstractContextManager[Callable[[], None]]]

    def rows_at_once(self, subject: Subject) -> int:
        """Return the batch size for a subject."""
        return self.batch_size or subject.session.checkpoint.about.eval_batch_size


@dataclass(frozen=True)
class Answer:
    """The numbers that a question found, and what they say.

    `values` is everything, as JSON (a list per subject, in their order, where it is per subject); `records` are the same numbers
    as flat rows with one set of keys, for the CSV; `reading` says in two sentences what they say, and what they cannot.
    """

    values: Mapping[str, Any]
    records: Sequence[Mapping[str, Scalar]]
    tables: Sequence[Listing]
    reading: tuple[str, str]
    notes: tuple[str, ...] = field(default=())


def sample_rows(split: Split, count: int, seed: int) -> Tensor:
    """Draw `count` row numbers of a split (all, where it has no more) from the seed: ascending int64 on the CPU.

    The same seed draws the same rows for every network.
    """
    if count >= len(split):
        return torch.arange(len(split))
    generator = torch.Generator().manual_seed(derive_seed(seed, "rows", split.name))
    return torch.randperm(len(split), generator=generator)[:count].sort().values


def sample_batches(split: Split, rows: Tensor, batch_size: int) -> Iterator[Batch]:
    """Read those rows in batches of `batch_size`; texts come by length, longest first (`Batch.rows` says which they are)."""
    yield from split.batches(torch.split(longest_first(rows, split.lengths), batch_size))


def check_split(session: Session, name: str) -> Split:
    """Return a split by its name; raises EectlError that lists those there are."""
    return lookup(session.data.splits, name, what="split")
