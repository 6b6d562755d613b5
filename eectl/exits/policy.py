"""Policies: a criterion with a threshold for each attached exit, the choice that they make, and the file that keeps them.

`choose` is the only definition of when a row leaves: sweeps apply it to whole splits, and `Rule` is the same exit by exit. No
thresholds are searched for here. Costs are MACs of one row or its time in nanoseconds (see COSTS); budgets are % of the plain
backbone's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError
from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.core.json_files import read_as, sealed, write_json
from eectl.core.kinds import FEW, Natural, NonNegative, Number, Positive, Text, Whole
from eectl.exits.criteria import Criterion, criterion_named
from eectl.models.losses import TASKS, Task

_T = TypeVar("_T")
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
POLICY_KIND, POLICY_SCHEMA = "policy", 1
ThresholdMetric = Literal["score", "balanced"]  # what thresholds make the best of: the task's score, or balanced accuracy
COSTS = {"macs": "MACs", "latency": "time"}  # what a cost may be, and what budgets are then percentages of

ALWAYS = -torch.finfo(torch.float32).max  # a threshold below every finite score, and a number that JSON can hold
NEVER = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Policy:
    """A criterion and a threshold for each attached exit; the network's own head takes the rows that are left."""

    criterion: Criterion
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(ALWAYS <= threshold <= NEVER for threshold in self.thresholds):
            raise EectlError(f"thresholds must be finite float32 numbers, from {ALWAYS:g} (always) to {NEVER:g} (never)")


def choose(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the exit [row], from 0, at which each row leaves.

    It is the first whose score [exit, row] is strictly over its threshold, else the last. A NaN score never is; the last exit's
    scores are not read.
    """
    assert len(thresholds) == len(scores) - 1
    fires = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    for index, threshold in enumerate(thresholds):
        fires[index] = scores[index] > threshold
    return fires.int().argmax(dim=0)  # the first of equal maxima


class Rule:
    """A policy that is asked at one exit after the other, and decides as `choose` does.

    `remembers` says that it reads the logits of the exits before: only then must they be given.
    """

    def __init__(self, policy: Policy) -> None:
        self.remembers = policy.criterion.compares
        self._score = policy.criterion.score
        self._thresholds = torch.tensor(policy.thresholds, dtype=torch.float32).tolist()  # a score in Python meets no other bits

    def fires(self, number: int, logits: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """Return which rows [row] leave at exit `number` (from 1), given its logits and, first exit first, those before it."""
        fires: Tensor = self._score(logits, earlier) > self._thresholds[number - 1]
        return fires

    def fires_alone(self, number: int, logits: Tensor, earlier: Sequence[Tensor]) -> bool:
        """Return the same for a single row, as a bool: one operation on the device less."""
        return bool(self._score(logits, earlier).item() > self._thresholds[number - 1])


@dataclass(frozen=True)
class CostTable:
    """Costs of a row: `exits[k-1]` where it leaves at exit k, `plain` in the backbone without exits.

    `kind` is an entry of COSTS and says the unit: MACs, or nanoseconds that were `measured` on some device.
    """

    exits: tuple[int, ...]
    plain: int
    kind: str = "macs"
    measured: str | None = None

    def limit(self, budget: float) -> float:
        """Return what a row may cost on average under a budget in % of the plain backbone."""
        return budget * self.plain / 100


@dataclass(frozen=True)
class BudgetPolicy:
    """The thresholds chosen for one budget, and the accuracy or MSE and the mean cost of a row where they were chosen.

    There are K−1 thresholds. All three fields are None where even leaving at the first exit is over the budget.
    """

    budget: Positive
    thresholds: tuple[Number, ...] | None
    value: Number | None
    mean_cost: NonNegative | None


def out_of_reach(budget: float) -> BudgetPolicy:
    """Return the entry of a budget that no thresholds keep."""
    return BudgetPolicy(budget, None, None, None)


def _read_criterion(name: object) -> Criterion:
    return _named(criterion_named, name)


def _read_task(name: object) -> Task:
    return _named(lambda text: lookup(TASKS, text, what="task"), name)


def _named(find: Callable[[str], _T], name: object) -> _T:
    """Return what `find` has under a name in a file; an unknown one is one of the file's errors."""
    try:
        return find(str(name))
    except EectlError as error:
        raise PydanticCustomError("unknown_name", "{message}", {"message": str(error)}) from error


@dataclass(frozen=True)
class Policies:
    """The thresholds for a list of budgets, and what they were made for and from.

    `checkpoint` is the digest of the weights; `split`, `fingerprint` and `num_rows` name the rows that the thresholds were chosen
    on; `search` is an entry of thresholds.SEARCHES. `exit_costs`, `plain_cost`, `cost` and `measured` are CostTable's fields.
    `precision` is what the scores were computed in, `metric` says what the thresholds make the best of. `decisions` [exit][label]
    are for several labels the probability that each must exceed to apply, None for other tasks.
    """

    checkpoint: Text
    task: Annotated[Task, PlainValidator(_read_task)]
    criterion: Annotated[Criterion, PlainValidator(_read_criterion)]
    split: Text
    fingerprint: Text
    num_rows: Natural
    exit_costs: Annotated[tuple[Whole, ...], Field(min_length=1, max_length=10_000)]
    plain_cost: Natural
    budgets: Annotated[tuple[BudgetPolicy, ...], Field(min_length=1, max_length=10_000)]
    search: Text
    cost: Text
    measured: Text | None
    precision: Text = "float32"
    metric: ThresholdMetric = "score"
    decisions: Annotated[tuple[Annotated[tuple[Share, ...], Field(max_length=100_000)], ...], FEW] | None = None

    @property
    def costs(self) -> CostTable:
        """The costs of a row, in the unit in which the thresholds were chosen."""
        return CostTable(self.exit_costs, self.plain_cost, self.cost, self.measured)

    def to_json(self) -> Mapping[str, Any]:
        """Return the policy file's content: JSON-able data with its kind, schema number and digest."""
        names = {"task": self.task.name, "criterion": self.criterion.name}
        return sealed({"kind": POLICY_KIND, "schema": POLICY_SCHEMA, **asdict(self), **names})

    def reached(self) -> dict[float, Policy]:
        """Return the policy of each budget that is within reach, by budget."""
        return {entry.budget: Policy(self.criterion, entry.thresholds) for entry in self.budgets if entry.thresholds is not None}

    def only(self, budgets: Sequence[float]) -> "Policies":
        """Return the same for these budgets alone; all of them must be there."""
        return replace(self, budgets=tuple(entry for entry in self.budgets if entry.budget in budgets))

    def check(
        self,
        checkpoint: str,
        *,
        num_exits: int,
        splits: Mapping[str, Mapping[str, Any]],
        path: Path,
        num_labels: int | None = None,
    ) -> None:
        """Raise EectlError unless the policies are for a checkpoint, and their thresholds were chosen on rows of its own.

        Args:
            checkpoint: the digest of its weights.
            num_exits: how many exits it has, its own head included.
            splits: the size and fingerprint of each of its splits.
            path: the file that the policies were read from.
            num_labels: how many labels a row may have, None where it has one class or number.
        """
        if self.checkpoint != checkpoint:
            raise EectlError(
                f"{path} was made for another checkpoint ({self.checkpoint[:12]}…, this one is {checkpoint[:12]}…); "
                "run eectl calibrate-thresholds on this checkpoint"
            )
        if len(self.exit_costs) != num_exits:
            raise EectlError(f"{path}: costs of {len(self.exit_costs)} exits, the checkpoint has {num_exits}; calibrate it again")
        if self.decisions is not None and num_labels != len(self.decisions[0]):
            raise EectlError(
                f"{path}: decisions on {len(self.decisions[0])} labels, the checkpoint has {num_labels}; calibrate it again"
            )
        own = splits.get(self.split, {}).get("fingerprint", self.fingerprint)
        if own != self.fingerprint:
            raise EectlError(
                f"{path}: its thresholds were not chosen on the {self.split} split of this checkpoint ({self.fingerprint[:12]}…, "
                f"recorded is {own[:12]}…); run eectl calibrate-thresholds on this checkpoint"
            )


def write_policies(path: Path, policies: Policies, *, overwrite: bool = True) -> None:
    """Write a policy file; `overwrite` says whether one that came there meanwhile gives way."""
    write_json(path, policies.to_json(), overwrite=overwrite)


def read_policies(path: Path) -> Policies:
    """Read a policy file.

    Raises:
        EectlError: it is not one, or an edit by hand broke it.
    """
    again = "eectl calibrate-thresholds"
    return read_as(Policies, path, kind=POLICY_KIND, schema=POLICY_SCHEMA, again=again, check=_check_together)


def _check_together(policies: Policies) -> None:
    """Raise EectlError where the fields of policies that were read do not go together."""
    lookup(COSTS, policies.cost, what="cost")
    num_attached = len(policies.exit_costs) - 1
    for index, entry in enumerate(policies.budgets):
        if entry.thresholds is not None and len(entry.thresholds) != num_attached:
            raise EectlError(
                f"budgets.{index}: {len(entry.thresholds)} thresholds for {num_attached} attached exits; give one each"
            )
        if (entry.thresholds is None) != (entry.mean_cost is None):
            raise EectlError(f"budgets.{index}: thresholds and mean_cost are there both, or neither is; give both")
        if entry.budget in [other.budget for other in policies.budgets[:index]]:
            raise EectlError(f"budgets.{index}: {entry.budget:g} stands twice; keep one")
    decisions = policies.decisions
    if (decisions is None) == (policies.task.name == "multilabel"):
        raise EectlError("decisions: policies of several labels have them, and no others; calibrate again")
    if decisions is not None and (len(decisions) != num_attached + 1 or len(set(map(len, decisions))) != 1):
        raise EectlError(f"decisions: give one list of the same length for each of {num_attached + 1} exits")
    policies.reached()


def policies_for(path: Path, wanted: tuple[float, ...] | None) -> Policies:
    """Return the policies in a file for the budgets that are wanted; default: all of them.

    Raises:
        EectlError: the file is not a policy file, or has nothing for one of the budgets.
    """
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
