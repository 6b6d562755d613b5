"""What calibrating and evaluating hand over, as plain data: budgets, the policy file, and an evaluation with its JSON.

Nothing is computed and nothing is printed here. Costs are MACs of one row or its measured time in nanoseconds, as `cost` says (an
entry of COSTS); budgets are % of the plain backbone's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from eectl.core.errors import EectlError, lookup
from eectl.exits.criteria import Policy, criterion_named
from eectl.core.files import read_json, write_json
from eectl.models.losses import TASKS
from eectl.exits.sweep import Point

POLICY_KIND, POLICY_SCHEMA = "policy", 1
EVALUATION_KIND, EVALUATION_SCHEMA = "evaluation", 1
MOST_BUDGET = 1000.0
_Form = TypeVar("_Form")
COSTS = {"macs": "MACs", "latency": "time"}  # what a cost may be, and what budgets are then percentages of


def parse_budgets(text: str) -> tuple[float, ...]:
    """`25,50,75,100` as rising percentages of the plain backbone's cost; raises EectlError for anything else."""
    budgets = []
    for part in text.split(","):
        try:
            budget = float(part)
        except ValueError:
            budget = math.nan
        if not 0 < budget <= MOST_BUDGET:
            raise EectlError(
                f"--budgets {text}: '{part.strip()}' is not a budget; give percentages of the plain backbone's cost, "
                f"over 0 and up to {MOST_BUDGET:g}, such as 25,50,75,100"
            )
        if budget in budgets:
            raise EectlError(f"--budgets {text}: {budget:g} stands twice; give each budget once")
        budgets.append(budget)
    return tuple(sorted(budgets))


@dataclass(frozen=True)
class BudgetPolicy:
    """What was chosen for one budget: K−1 thresholds, and the accuracy or MSE and the mean cost where they were chosen.

    All three are None where even leaving at the first exit is over the budget.
    """

    budget: float
    thresholds: tuple[float, ...] | None
    value: float | None
    mean_cost: float | None

    @classmethod
    def shared(cls, budget: float, point: Point | None, *, num_exits: int) -> "BudgetPolicy":
        """One threshold for all attached exits of a network of `num_exits`; no point: the budget is out of reach."""
        if point is None:
            return cls(budget, None, None, None)
        return cls(budget, (point.threshold,) * (num_exits - 1), point.value, point.mean_cost)


@dataclass(frozen=True)
class Policies:
    """The thresholds for a list of budgets, and what they were made for and from. `checkpoint` is a weights' digest.

    `search` says how thresholds were chosen: one shared by all exits, or one per exit. `measured` says where a cost of latency
    was measured, and is None for MACs. Files of older versions lack the last three.
    """

    checkpoint: str
    task: str
    criterion: str
    split: str
    fingerprint: str
    num_rows: int
    exit_costs: tuple[int, ...]
    plain_cost: int
    budgets: tuple[BudgetPolicy, ...]
    search: str = "shared"
    cost: str = "macs"
    measured: str | None = None

    def to_json(self) -> Mapping[str, Any]:
        """The policy file's content: JSON-able data with its kind and schema number."""
        return {"kind": POLICY_KIND, "schema": POLICY_SCHEMA, **asdict(self)}

    def only(self, budgets: Sequence[float]) -> "Policies":
        """The same, for these budgets alone; all of them must be there."""
        return replace(self, budgets=tuple(entry for entry in self.budgets if entry.budget in budgets))

    def check(self, checkpoint: str, *, path: Path) -> None:
        """Raise EectlError unless the policies are for the weights whose digest is `checkpoint`."""
        if self.checkpoint != checkpoint:
            raise EectlError(
                f"{path} was made for another checkpoint ({self.checkpoint[:12]}…, this one is {checkpoint[:12]}…); "
                "run eectl calibrate-thresholds on this checkpoint"
            )


def read_as(form: type[_Form], path: Path, *, kind: str, schema: int, again: str) -> _Form:
    """A dataclass from a JSON file; raises EectlError for the first thing that does not fit, naming the command to run again."""
    try:
        return TypeAdapter(form).validate_python(read_json(path, kind=kind, schema=schema))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise EectlError(f"{path}: {place}: {first['msg']}; write it again with {again}") from error


def write_policies(path: Path, policies: Policies) -> None:
    """Write the policy file."""
    write_json(path, policies.to_json())


def read_policies(path: Path) -> Policies:
    """Read a policy file; raises EectlError where it is not one, or where an edit by hand broke it."""
    policies = read_as(Policies, path, kind=POLICY_KIND, schema=POLICY_SCHEMA, again="eectl calibrate-thresholds")
    try:
        lookup(TASKS, policies.task, what="task")
        lookup(COSTS, policies.cost, what="cost")
        criterion_named(policies.criterion)
        for entry in policies.budgets:
            if entry.thresholds is not None:
                Policy(policies.criterion, entry.thresholds)
    except EectlError as error:
        raise EectlError(f"{path}: {error}") from error
    num_attached = len(policies.exit_costs) - 1
    for index, entry in enumerate(policies.budgets):
        if entry.thresholds is not None and len(entry.thresholds) != num_attached:
            raise EectlError(
                f"{path}: budgets.{index}: {len(entry.thresholds)} thresholds for {num_attached} attached exits; give one each"
            )
    return policies


def policies_for(path: Path, wanted: tuple[float, ...] | None) -> Policies:
    """The policies in a file, all of them or those for the budgets that are wanted; raises EectlError where one is missing."""
    policies = read_policies(path)
    there = {entry.budget: entry for entry in policies.budgets}
    missing = [budget for budget in wanted or () if budget not in there]
    if missing:
        has = ", ".join(f"{budget:g}" for budget in there)
        raise EectlError(
            f"{path} has no thresholds for {missing[0]:g}%, it has {has}; run eectl calibrate-thresholds CKPT --budgets "
            f"{','.join(f'{budget:g}' for budget in wanted or ())}"
        )
    return policies if wanted is None else policies.only(wanted)


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
class Origin:
    """Which run a network came from: its recipe as plain data, and the exits (blocks and kinds) that it really has."""

    recipe: Mapping[str, Any]
    after: tuple[int, ...]
    heads: tuple[str, ...]


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
