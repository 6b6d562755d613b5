"""An evaluation as plain data, its JSON and its file. Computes and prints nothing.

Costs are MACs of one row or its measured time in nanoseconds, as `cost` says; budgets are % of the plain backbone's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError, lookup
from eectl.core.files import read_as, write_json
from eectl.exits.policy import COSTS
from eectl.models.checkpoint import Origin
from eectl.models.losses import TASKS

EVALUATION_KIND, EVALUATION_SCHEMA = "evaluation", 1


@dataclass(frozen=True)
class ExitResult:
    """One exit on all rows; `number` counts from 1, `error` is the value's standard error, `cost` that of a row.

    `pearson` and `spearman` are its correlations with the labels: None for classification, NaN where an exit gives one value.
    """

    number: int
    value: float
    error: float
    cost: int
    pearson: float | None = None
    spearman: float | None = None


@dataclass(frozen=True)
class BudgetResult:
    """What a budget gave on the split; a budget of None is unlimited: every row takes the last exit.

    `left[k]` counts the rows that leave at exit k+1. `is_over` says that the mean cost exceeds the budget, which thresholds
    chosen on another split can do. All but the budget is None (and `is_over` False) where the budget is out of reach. The
    correlations are ExitResult's.
    """

    budget: float | None
    thresholds: tuple[float, ...] | None = None
    value: float | None = None
    error: float | None = None
    mean_cost: float | None = None
    left: tuple[int, ...] | None = None
    is_over: bool = False
    pearson: float | None = None
    spearman: float | None = None


@dataclass(frozen=True)
class Curve:
    """Operating points on a split, cheapest first: a threshold shared by all attached exits, its mean cost, its value."""

    thresholds: tuple[float, ...]
    mean_costs: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """A network's exits and budgets on one split. `protocol` is calibrated or paper, `task` names an entry of TASKS.

    `dead` has the attached exits (numbers from 1) at which no row leaves under any budget. `curve` is the whole sweep on this
    split, thinned; `grid` has the authors' thresholds, the same for every network, and is None where they have none. Both are
    diagnostics: nobody may choose on them and call it calibrated. From `curve` to `origin` fields are None in files of older
    versions; `search`, `cost` and `measured` are the policies'.
    """

    checkpoint: str
    task: str
    criterion: str
    protocol: str
    split: str
    num_rows: int
    plain_cost: int
    exits: tuple[ExitResult, ...]
    budgets: tuple[BudgetResult, ...]
    dead: tuple[int, ...]
    curve: Curve | None = None
    grid: Curve | None = None
    fingerprint: str | None = None
    origin: Origin | None = None
    search: str = "shared"
    cost: str = "macs"
    measured: str | None = None

    def to_json(self) -> Mapping[str, Any]:
        """The evaluation as JSON-able data with its kind and schema number."""
        return {"kind": EVALUATION_KIND, "schema": EVALUATION_SCHEMA, **asdict(self)}


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation's file."""
    write_json(path, evaluation.to_json())


def read_evaluation(path: Path) -> Evaluation:
    """Read what `eectl evaluate` wrote, by this version or an older one; raises EectlError where it is something else."""
    evaluation = read_as(Evaluation, path, kind=EVALUATION_KIND, schema=EVALUATION_SCHEMA, again="eectl evaluate")
    try:
        lookup(TASKS, evaluation.task, what="task")
        lookup(COSTS, evaluation.cost, what="cost")
    except EectlError as error:
        raise EectlError(f"{path}: {error}") from error
    return evaluation
