"""Scored outputs, all that sweeps and policies need: a score and an outcome per exit and row, a thousandth of all logits.

Outputs are reduced here a few rows at a time, as they come. Measures that rank rows need the probabilities too: they are kept
where they are few, and for several labels or targets always. Runs no network and reads no file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.exits.criteria import Criterion
from eectl.models.losses import Task

SCORE, OUTCOME, BROKEN, VALUE, NUM_PLANES = range(5)  # the planes of a table, and from where outputs follow that are kept
MOST_KEPT = 2**24  # numbers: 64 MiB


@dataclass(frozen=True)
class Provenance:
    """Which network's outputs these are, and of which rows.

    `checkpoint` is the digest of the weights, `split` and `fingerprint` name the rows, `precision` is what they were computed in.
    """

    split: str
    fingerprint: str
    checkpoint: str
    task: Task
    precision: str = "float32"

    def to_json(self) -> dict[str, str]:
        """Return it as a file keeps it, the task by its name."""
        return {
            "split": self.split,
            "fingerprint": self.fingerprint,
            "checkpoint": self.checkpoint,
            "task": self.task.name,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class ScoredRows:
    """A network's outputs on one split as a criterion sees them, on the CPU, in the split's order.

    `made` says whose outputs they are. `scores` [exit, row] are float32. `outcome` [exit, row] says how each exit did on each
    row: 1 a hit and 0 a miss, or the squared error; float64, which counts exactly. `values` [exit, row] are the numbers or the
    numbers of the classes that were predicted, in float32. `outputs` [exit, row, class] are probabilities, or numbers [exit, row,
    target], in float32; None where they are too many to keep.
    """

    made: Provenance
    criterion: Criterion
    labels: Tensor
    scores: Tensor
    outcome: Tensor
    values: Tensor
    outputs: Tensor | None = None

    @property
    def num_exits(self) -> int:
        """K: the attached exits and the network's own head."""
        return len(self.scores)

    @property
    def num_rows(self) -> int:
        """The split's rows."""
        return len(self.labels)


def keeps_outputs(task: Task, *, num_exits: int, num_rows: int, num_outputs: int) -> bool:
    """Return whether a split's outputs are kept beside what sweeps need: where a row has several answers, or they are few."""
    if task.predicts_number:
        return num_outputs > 1  # of one number the values are kept
    return task.name == "multilabel" or num_exits * num_rows * num_outputs <= MOST_KEPT


def reduce_rows(logits: Tensor, targets: Tensor, *, criterion: Criterion, keep: bool = False) -> Tensor:
    """Return a float32 table [plane, exit, row] of logits [exit, row, class] and targets [row, …], on their device.

    The planes are SCORE, OUTCOME, BROKEN (1 where an output is not finite) and VALUE, what is predicted; with `keep` one for each
    class or target follows, as `ScoredRows.outputs`. Every row stands for itself, so tables of some of a split's rows, side by
    side, are the whole split's. Nothing waits for the device.
    """
    task, rows = criterion.task, logits.flatten(0, 1)
    points = task.points(rows, targets.repeat(len(logits), *(1 for _ in targets.shape[1:])))
    finite = rows.amax(dim=1).isfinite() & rows.amin(dim=1).isfinite()  # NaN goes into both; ten times as fast as all elements
    planes = (plane.float().view(logits.shape[:2]) for plane in (points, ~finite, task.predicted(rows)))
    table = torch.stack([criterion.scores(logits), *planes])
    return torch.cat([table, task.probabilities(rows).view(*logits.shape[:2], -1).movedim(2, 0)]) if keep else table


def scored_from(table: Tensor, labels: Tensor, made: Provenance, *, criterion: Criterion) -> ScoredRows:
    """Return what was scored, from the table of a whole split's rows.

    Raises:
        EectlError: outputs are not finite; it names the exits.
    """
    counts = table[BROKEN].count_nonzero(dim=1).tolist()
    broken = [f"{number} ({count} of {len(labels)} rows)" for number, count in enumerate(counts, 1) if count]
    if broken:
        raise EectlError(
            f"{made.split} split: outputs are not finite at exit {', '.join(broken)}; training diverged: train again with a "
            "smaller optimizer.lr, or with --set optimizer.clip_norm=1"
        )
    kept = table[NUM_PLANES:].movedim(0, 2) if len(table) > NUM_PLANES else None
    return ScoredRows(made, criterion, labels, table[SCORE], table[OUTCOME].double(), table[VALUE], kept)
