"""What sweeps and policies read of a network's outputs: a score and an outcome per exit and row, a thousandth of all logits.

Outputs are reduced here a few rows at a time, as they come. Runs no network and reads no file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.exits.criteria import Criterion
from eectl.models.losses import TASKS
from eectl.recipe.choices import DEFAULT_CRITERION

SCORE, OUTCOME, BROKEN, VALUE = range(4)  # the planes of a table


@dataclass(frozen=True)
class Source:
    """Whose outputs, on which rows: `checkpoint` is the weights' digest, `split` and `fingerprint` name the rows, `task` is an
    entry of TASKS."""

    split: str
    fingerprint: str
    checkpoint: str
    task: str


@dataclass(frozen=True)
class Scored(Source):
    """A network's outputs on one split as `criterion` sees them, on the CPU, in the split's order.

    `scores` [exit, row] are float32. `outcome` [exit, row] says how each exit did on each row: 1 a hit and 0 a miss, or the
    squared error; float64, which counts exactly. `values` [exit, row] are a regression's outputs in float32, None else.
    """

    criterion: str
    labels: Tensor
    scores: Tensor
    outcome: Tensor
    values: Tensor | None = None

    @property
    def num_exits(self) -> int:
        """K: the attached exits and the network's own head."""
        return len(self.scores)

    @property
    def num_rows(self) -> int:
        """The split's rows."""
        return len(self.labels)


def reduce_rows(logits: Tensor, targets: Tensor, *, criterion: Criterion, task: str) -> Tensor:
    """A float32 table [plane, exit, row] of logits [exit, row, class] and targets [row], on their device, without waiting for it.

    The planes are SCORE, OUTCOME, BROKEN (1 where an output is not finite) and, of a regression, VALUE. Every row stands for
    itself, so tables of some of a split's rows, side by side, are the whole split's.
    """
    rows = logits.flatten(0, 1)
    points = TASKS[task].points(rows, targets.repeat(len(logits)))
    finite = rows.amax(dim=1).isfinite() & rows.amin(dim=1).isfinite()  # NaN goes into both; ten times as fast as all elements
    planes = [criterion.scores(logits), *(plane.float().view(logits.shape[:2]) for plane in (points, ~finite))]
    return torch.stack([*planes, logits[:, :, 0]] if task == "regression" else planes)


def scored_from(table: Tensor, labels: Tensor, source: Source, *, criterion: str | None) -> Scored:
    """What was scored, from the table of a whole split's rows; raises EectlError that names exits with outputs not finite."""
    counts = table[BROKEN].count_nonzero(dim=1).tolist()
    broken = [f"{number} ({count} of {len(labels)} rows)" for number, count in enumerate(counts, 1) if count]
    if broken:
        raise EectlError(
            f"{source.split} split: outputs are not finite at exit {', '.join(broken)}; training diverged: train again with a "
            "smaller optimizer.lr, or with --set optimizer.clip_norm=1"
        )
    values = table[VALUE] if source.task == "regression" else None
    criterion = criterion or DEFAULT_CRITERION[source.task]
    return Scored(
        **vars(source), criterion=criterion, labels=labels, scores=table[SCORE], outcome=table[OUTCOME].double(), values=values
    )
