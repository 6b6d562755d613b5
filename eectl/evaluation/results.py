"""An evaluation as plain data, its JSON and its file. Computes and prints nothing.

Costs are MACs of one row or its measured time in nanoseconds, as `cost` says; budgets are % of the plain backbone's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eectl.core.errors import EectlError, lookup
from eectl.core.json_files import read_as, sealed, write_json
from eectl.core.kinds import FEW, Natural, NonNegative, Number, Positive, Text, Whole
from eectl.exits.criteria import criterion_named
from eectl.exits.policy import COSTS, ThresholdMetric
from eectl.exits.sweep import Curve
from eectl.models.checkpoint import Origin
from eectl.models.losses import TASKS

EVALUATION_KIND, EVALUATION_SCHEMA = "evaluation", 1
Measures = Annotated[Mapping[Text, Number | None], Field(max_length=100)]


@dataclass(frozen=True)
class ExitResult:
    """One exit's results on all rows; `number` counts from 1.

    `value` is the accuracy or MSE and `error` its standard error, `cost` that of a row. `pearson` and `spearman` are the
    correlations with the labels: None for classification, NaN where an exit gives one value. `balanced` is the mean over classes
    of their accuracies and `macro_f1` that of their F1 scores: None for regression. `measures` has what else the task is measured
    by, entries of MEASURE_CHOICES, and `by_target` what each of several targets is.
    """

    number: Natural
    value: Number
    error: NonNegative
    cost: Whole
    pearson: Number | None = None
    spearman: Number | None = None
    balanced: Number | None = None
    macro_f1: Number | None = None
    measures: Measures = field(default_factory=dict)
    by_target: Annotated[Mapping[Text, Measures], FEW] = field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """Return an entry of MEASURE_CHOICES; None where it is not of this task, or is not defined on these rows."""
        return _measure(self, name)


@dataclass(frozen=True)
class BudgetResult:
    """The results of a budget's thresholds on the split; a budget of None is unlimited: every row takes the last exit.

    `left[k]` counts the rows that leave at exit k+1. `is_over` says that the mean cost exceeds the budget, which thresholds
    chosen on another split can do. All but the budget is None (and `is_over` False) where the budget is out of reach. The other
    fields are ExitResult's.
    """

    budget: Positive | None
    thresholds: tuple[Number, ...] | None = None
    value: Number | None = None
    error: NonNegative | None = None
    mean_cost: NonNegative | None = None
    left: tuple[Whole, ...] | None = None
    is_over: bool = False
    pearson: Number | None = None
    spearman: Number | None = None
    balanced: Number | None = None
    macro_f1: Number | None = None
    measures: Measures = field(default_factory=dict)
    by_target: Annotated[Mapping[Text, Measures], FEW] = field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """Return an entry of MEASURE_CHOICES; None where it is not of this task, or is not defined on these rows."""
        return _measure(self, name)


def _measure(entry: ExitResult | BudgetResult, name: str) -> float | None:
    value: float | None = entry.measures.get(name) if name in entry.measures else getattr(entry, name, None)
    return None if value is None or value != value else value


@dataclass(frozen=True)
class Evaluation:
    """A network's exits and budgets on one split.

    `task` and `criterion` are names, `protocol` is an entry of evaluate.PROTOCOLS, `fingerprint` names the rows and `origin` the
    run. `dead` has the attached exits (numbers from 1) at which no row leaves under any budget. `curve` is the whole sweep on
    this split, thinned; `grid` has the authors' thresholds, the same for every network, and is None where they have none. Both
    are diagnostics: nobody may choose on them and call it calibrated. `search`, `cost`, `measured` and `metric` are the
    policies'. `precision` is what the outputs were computed in.
    """

    checkpoint: Text
    task: Text
    criterion: Text
    protocol: Text
    split: Text
    num_rows: Natural
    plain_cost: Natural
    exits: Annotated[tuple[ExitResult, ...], Field(min_length=1, max_length=10_000)]
    budgets: Annotated[tuple[BudgetResult, ...], Field(max_length=10_000)]
    dead: tuple[Natural, ...]
    curve: Curve
    grid: Curve | None
    fingerprint: Text
    origin: Origin
    search: Text
    cost: Text
    measured: Text | None
    precision: Text = "float32"
    metric: ThresholdMetric = "score"

    @property
    def plain(self) -> ExitResult:
        """Return the plain backbone's results: its own head's answer, which no attached exit changes, and the last exit's.

        Its cost is `plain_cost`; the last exit's counts the heads passed on the way too.
        """
        return self.exits[-1]

    def to_json(self) -> Mapping[str, Any]:
        """Return the evaluation as JSON-able data with its kind, schema number and digest."""
        return sealed({"kind": EVALUATION_KIND, "schema": EVALUATION_SCHEMA, **asdict(self)})


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation's file."""
    write_json(path, evaluation.to_json())


def read_evaluation(path: Path) -> Evaluation:
    """Return what `eectl evaluate` wrote into a file; raises EectlError where it is something else."""
    again = "eectl evaluate"
    return read_as(Evaluation, path, kind=EVALUATION_KIND, schema=EVALUATION_SCHEMA, again=again, check=_check_together)


def _check_together(evaluation: Evaluation) -> None:
    """Raise EectlError where the fields of an evaluation that was read do not go together."""
    lookup(TASKS, evaluation.task, what="task")
    lookup(COSTS, evaluation.cost, what="cost")
    criterion_named(evaluation.criterion)
    if len(evaluation.origin.after) != len(evaluation.origin.heads):
        raise EectlError(f"origin: {len(evaluation.origin.heads)} heads for {len(evaluation.origin.after)} exits; evaluate again")
    for index, entry in enumerate(evaluation.budgets):
        numbers = (entry.thresholds, entry.value, entry.error, entry.mean_cost, entry.left)
        if len({each is None for each in numbers}) > 1:
            raise EectlError(f"budgets.{index}: has only some of its numbers; run eectl evaluate again")
        if entry.left is not None and sum(entry.left) != evaluation.num_rows:
            raise EectlError(f"budgets.{index}.left: {sum(entry.left)} rows of {evaluation.num_rows}; run eectl evaluate again")
    for name in ("curve", "grid"):
        curve = getattr(evaluation, name)
        if curve is not None and not len(curve.thresholds) == len(curve.mean_costs) == len(curve.values):
            raise EectlError(f"{name}: its lists are not of one length; run eectl evaluate again")
