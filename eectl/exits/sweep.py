"""The exact sweep: quality and mean cost of every distinct shared threshold, and the choice of one for a cost budget.

Arithmetic on scores and outcomes, no files and no network. Calibration applies it to its own split; the authors' protocol
(paper, Appendix C) applies its coarser rule to the test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.exits.policy import ALWAYS, NEVER
from eectl.models.losses import TASKS


@dataclass(frozen=True)
class Point:
    """One operating point: a threshold shared by all attached exits, the accuracy or MSE, and the mean cost of a row."""

    threshold: float
    value: float
    mean_cost: float


@dataclass(frozen=True)
class OperatingPoints:
    """Every operating point that one shared threshold can reach, cheapest first.

    Point i holds for thresholds from `edges[i]` (float32, itself a score that occurs) up to but without `edges[i + 1]`.
    `totals` sums the outcomes (float64) and `costs` what rows cost (int64) over `num_rows` rows; `task` names an entry of TASKS.
    """

    edges: Tensor
    totals: Tensor
    costs: Tensor
    num_rows: int
    task: str

    @property
    def values(self) -> Tensor:
        """The accuracy or MSE of each point, float64."""
        return self.totals / self.num_rows

    @property
    def mean_costs(self) -> Tensor:
        """Mean cost of a row at each point, float64."""
        return self.costs.double() / self.num_rows

    def __len__(self) -> int:
        return len(self.edges)

    def point(self, index: int, threshold: float | None = None) -> Point:
        """Point `index`, at its own lowest threshold or a given one; the last, where no row leaves early, has NEVER."""
        if threshold is None:
            threshold = NEVER if index == len(self) - 1 else float(self.edges[index])
        return Point(threshold, float(self.totals[index]) / self.num_rows, int(self.costs[index]) / self.num_rows)

    def at(self, threshold: float) -> int:
        """The index of the point that `threshold` (as float32) reaches."""
        return int(torch.searchsorted(self.edges, torch.tensor([threshold]), right=True)) - 1


def sweep(scores: Tensor, outcome: Tensor, exit_costs: Sequence[int], *, task: str) -> OperatingPoints:
    """All operating points of scores [exit, row] and outcomes [exit, row]; `exit_costs` rise with the exit.

    As the threshold falls, a row moves to an earlier exit whenever it drops below a new maximum of the row's scores so far.
    These moves, sorted by value and summed up, are the whole curve: O(rows · exits · log). NaN scores never fire.
    """
    last, num_rows = len(scores) - 1, scores.shape[1]
    assert len(exit_costs) == len(outcome) == last + 1 and num_rows
    cost = torch.tensor([int(each) for each in exit_costs])
    assert sorted(exit_costs) == list(exit_costs), "an exit costs at least what the one before it does"
    best = scores[:last].masked_fill(scores[:last].isnan(), -torch.inf).cummax(dim=0).values
    values, cost_changes, total_changes = [best.new_empty(0)], [cost.new_empty(0)], [outcome.new_empty(0)]
    after = torch.full((num_rows,), last)  # where a row leaves while the threshold is at or above this exit's best score
    for index in reversed(range(last)):
        moved = best[index] > (best[index - 1].clamp(min=ALWAYS) if index else ALWAYS)
        rows, source = moved.nonzero()[:, 0], after[moved]
        values.append(best[index, rows])
        cost_changes.append(cost[index] - cost[source])
        total_changes.append(outcome[index, rows] - outcome[source, rows])
        after[rows] = index
    value, order = torch.cat(values).sort(descending=True)
    costs = torch.cat([cost[-1:] * num_rows, torch.cat(cost_changes)[order]]).cumsum(0)
    totals = torch.cat([outcome[-1:].sum(dim=1), torch.cat(total_changes)[order]]).cumsum(0)
    ends = torch.cat([torch.tensor([0]), torch.unique_consecutive(value, return_counts=True)[1].cumsum(0)])
    edges = torch.cat([value[ends[:-1]], torch.tensor([ALWAYS])])  # `score > edge` takes the moves of larger value only
    return OperatingPoints(edges.flip(0), totals[ends].flip(0), costs[ends].flip(0), num_rows, task)


def limit(budget: float, plain_cost: int) -> float:
    """What a row may cost on average under a budget in % of the plain backbone."""
    return budget * plain_cost / 100


def pick(points: OperatingPoints, budgets: Sequence[float], plain_cost: int) -> list[Point | None]:
    """For each budget (% of `plain_cost`) the best point within it, the cheapest of equally good ones.

    None where no point is within the budget. A larger budget never does worse on the rows that `points` are made from.
    """
    badness = -points.totals if TASKS[points.task].higher_is_better else points.totals
    mean_costs = points.mean_costs  # cheapest first, so what a budget allows is a prefix
    chosen: list[Point | None] = []
    for budget in budgets:
        num_within = int(torch.searchsorted(mean_costs, limit(budget, plain_cost), right=True))
        chosen.append(points.point(int(badness[:num_within].argmin())) if num_within else None)
    return chosen


def check_paper(task: str) -> None:
    """Raise EectlError for a task that the authors' choice is not defined for."""
    if task == "regression":
        raise EectlError("the paper names no exit criterion for regression; use --protocol calibrated")


def pick_as_paper(
    points: OperatingPoints, budgets: Sequence[float], plain_cost: int, *, criterion: str, num_exits: int
) -> list[Point | None]:
    """The authors' choice: walk a fixed grid from cheap to dear, stop before the first entry whose mean cost is over budget.

    The grid is 100 thresholds from 0 to 1, or 0..K−1 for patience (kamadforge/early-exit-benchmark,
    visualize/cost_vs_table.py). It takes the dearest entry within the budget, not the best. Raises EectlError for
    regression, where the paper names no criterion.
    """
    check_paper(points.task)
    walk = paper_walk(points, criterion=criterion, num_exits=num_exits)
    within = [[entry for entry in walk if entry.mean_cost <= limit(budget, plain_cost)] for budget in budgets]
    return [entries[-1] if entries else None for entries in within]  # costs rise along the grid, so the dearest is the last


def paper_walk(points: OperatingPoints, *, criterion: str, num_exits: int) -> list[Point]:
    """What the thresholds of the authors' grid reach, from cheap to dear; at the last one no row leaves early."""
    grid = torch.arange(float(num_exits)) if criterion == "patience" else torch.linspace(0, 1, 100)
    return [points.point(points.at(threshold), threshold) for threshold in grid.tolist()]


def thin(points: OperatingPoints, at_most: int) -> list[Point]:
    """At most `at_most` of the points, spread evenly over the cost, the first and the last among them.

    Drawn as a step function they lag the whole curve by at most one even step of cost.
    """
    costs = points.mean_costs
    steps = torch.linspace(0, 1, at_most, dtype=torch.float64) * (costs[-1] - costs[0]) + costs[0]
    kept = (torch.searchsorted(costs, steps, right=True) - 1).clamp(min=0).tolist()
    return [points.point(index) for index in sorted({*kept, len(points) - 1})]
