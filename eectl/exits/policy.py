"""What calibrating and evaluating hand over, as plain data: budgets, the policy file, and an evaluation with its JSON.

Nothing is computed and nothing is printed here. Costs are MACs of one row or its measured time in nanoseconds, as `cost` says (an
entry of COSTS); budgets are % of the plain backbone's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.core.files import read_as, write_json
from eectl.exits.criteria import criterion_named
from eectl.models.losses import TASKS

if TYPE_CHECKING:
    from eectl.exits.sweep import Point

POLICY_KIND, POLICY_SCHEMA = "policy", 1
MOST_BUDGET = 1000.0
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
    def shared(cls, budget: float, point: "Point | None", *, num_exits: int) -> "BudgetPolicy":
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


ALWAYS = -torch.finfo(torch.float32).max  # a threshold below every finite score, and a number that JSON can hold


NEVER = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Policy:
    """A criterion and a threshold for each attached exit (K−1 of them; the network's own head takes whoever is left)."""

    criterion: str
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(ALWAYS <= threshold <= NEVER for threshold in self.thresholds):
            raise EectlError(f"thresholds must be finite float32 numbers, from {ALWAYS:g} (always) to {NEVER:g} (never)")


def choose(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit [row], from 0, at which each row leaves: the first whose score [exit, row] is over its threshold, else the last.

    Strictly over; a NaN score never is. The last exit's scores are not read.
    """
    assert len(thresholds) == len(scores) - 1
    fires = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    for index, threshold in enumerate(thresholds):
        fires[index] = scores[index] > threshold
    return fires.int().argmax(dim=0)  # the first of equal maxima


class Rule:
    """A policy that is asked at one exit after the other, and chooses as `choose` does.

    `remembers` says that it reads the logits of the exits before: only then must they be given.
    """

    def __init__(self, policy: Policy) -> None:
        criterion = criterion_named(policy.criterion)
        self.remembers = criterion.compares
        self._score = criterion.score
        self._thresholds = torch.tensor(policy.thresholds, dtype=torch.float32).tolist()  # a score in Python meets no other bits

    def fires(self, number: int, logits: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """Which rows [row] leave at exit `number` (from 1), given its logits and, first exit first, those before it."""
        fires: Tensor = self._score(logits, earlier) > self._thresholds[number - 1]
        return fires

    def fires_alone(self, number: int, logits: Tensor, earlier: Sequence[Tensor]) -> bool:
        """The same for a single row, in Python: one operation on the device less."""
        return bool(self._score(logits, earlier).item() > self._thresholds[number - 1])
