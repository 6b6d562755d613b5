"""The exact sweep: accuracy (or MSE) and mean cost of every distinct shared threshold, and the best one for a cost budget.

Arithmetic on scores and outcomes, no files and no network. Calibration applies it to its own split; the authors' protocol
(paper, Appendix C) applies its coarser rule to the test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.core.kinds import NonNegative, Number
from eectl.exits.criteria import Criterion
from eectl.exits.policy import ALWAYS, NEVER, BudgetPolicy, CostTable, out_of_reach
from eectl.models.losses import Task


@dataclass(frozen=True)
class Curve:
    """Operating points on a split, cheapest first: a threshold shared by all attached exits, its mean cost, its value."""

    thresholds: tuple[Number, ...]
    mean_costs: tuple[NonNegative, ...]
    values: tuple[Number, ...]


@dataclass(frozen=True)
class OperatingPoints:
    """Every operating point that one shared threshold can reach, cheapest first.

    Point i holds for thresholds from `edges[i]` (float32, itself a score that occurs) up to but without `edges[i + 1]`.
    `totals` sums the outcomes (float64) and `costs` what rows cost (int64) over `num_rows` rows, for `num_attached` attached
    exits.
    """

    edges: Tensor
    totals: Tensor
    costs: Tensor
    num_rows: int
    num_attached: int

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

    def at(self, threshold: float) -> int:
        """Return the index of the point that `threshold` (as float32) reaches."""
        return int(torch.searchsorted(self.edges, torch.tensor([threshold]), right=True)) - 1

    def threshold(self, index: int) -> float:
        """Return the lowest threshold of point `index`; of the last, where no row leaves early, NEVER."""
        return NEVER if index == len(self) - 1 else float(self.edges[index])

    def curve(self, indexes: Sequence[int], thresholds: Sequence[float] | None = None) -> Curve:
        """Return these points as columns, with the thresholds that reached them; default: each point's lowest."""
        places = torch.tensor(indexes, dtype=torch.int64)
        thresholds = [self.threshold(index) for index in indexes] if thresholds is None else thresholds
        return Curve(tuple(thresholds), tuple(self.mean_costs[places].tolist()), tuple(self.values[places].tolist()))

    def policy(self, index: int, budget: float, threshold: float | None = None) -> BudgetPolicy:
        """Return point `index` as what is chosen for a budget, at a threshold that reaches it; default: its lowest."""
        threshold = self.threshold(index) if threshold is None else threshold
        value, mean_cost = float(self.totals[index]) / self.num_rows, int(self.costs[index]) / self.num_rows
        return BudgetPolicy(budget, (threshold,) * self.num_attached, value, mean_cost)


def sweep(scores: Tensor, outcome: Tensor, exit_costs: Sequence[int]) -> OperatingPoints:
    """Return all operating points of scores [exit, row] and outcomes [exit, row]; `exit_costs` rise with the exit.

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
    return OperatingPoints(edges.flip(0), totals[ends].flip(0), costs[ends].flip(0), num_rows, last)


def pick(points: OperatingPoints, budgets: Sequence[float], costs: CostTable, *, task: Task) -> list[BudgetPolicy]:
    """Return for each budget the best point within it, the cheapest of equally good ones.

    A larger budget never does worse on the rows that `points` are made from.
    """
    badness = -points.totals if task.higher_is_better else points.totals
    mean_costs = points.mean_costs  # cheapest first, so what a budget allows is a prefix
    chosen = []
    for budget in budgets:
        num_within = int(torch.searchsorted(mean_costs, costs.limit(budget), right=True))
        best = int(badness[:num_within].argmin()) if num_within else None
        chosen.append(out_of_reach(budget) if best is None else points.policy(best, budget))
    return chosen


def check_paper(criterion: Criterion) -> None:
    """Raise EectlError for a criterion that the authors' choice is not defined for."""
    if criterion.paper_grid is None:
        raise EectlError(f"the paper names no exit criterion for {criterion.task.name}; use --protocol calibrated")


def pick_as_paper(
    points: OperatingPoints, budgets: Sequence[float], costs: CostTable, *, criterion: Criterion
) -> list[BudgetPolicy]:
    """Return the authors' choice: walk a fixed grid from cheap to dear, stop before the first entry over budget.

    The grid is 100 thresholds from 0 to 1, or 0..K−1 for patience (kamadforge/early-exit-benchmark,
    visualize/cost_vs_table.py). It takes the dearest entry within the budget, not the best.

    Raises:
        EectlError: the paper names no grid for this criterion, as for regression.
    """
    check_paper(criterion)
    walk = paper_walk(points, criterion=criterion)
    assert walk is not None
    chosen = []
    for budget in budgets:
        within = [place for place, cost in enumerate(walk.mean_costs) if cost <= costs.limit(budget)]
        threshold = walk.thresholds[within[-1]] if within else None  # costs rise along the grid: the dearest is the last
        chosen.append(out_of_reach(budget) if threshold is None else points.policy(points.at(threshold), budget, threshold))
    return chosen


def paper_walk(points: OperatingPoints, *, criterion: Criterion) -> Curve | None:
    """Return what the thresholds of the authors' grid reach, from cheap to dear; None where the paper has no grid.

    At the last one no row leaves early.
    """
    if criterion.paper_grid is None:
        return None
    grid = criterion.paper_grid(points.num_attached + 1).tolist()
    return points.curve([points.at(threshold) for threshold in grid], grid)


def thin(points: OperatingPoints, at_most: int) -> Curve:
    """Return at most `at_most` + 1 of the points, spread evenly over the cost, the first and the last among them.

    Drawn as a step function they lag the whole curve by at most one even step of cost.
    """
    costs = points.mean_costs
    steps = torch.linspace(0, 1, at_most, dtype=torch.float64) * (costs[-1] - costs[0]) + costs[0]
    kept = (torch.searchsorted(costs, steps, right=True) - 1).clamp(min=0).tolist()
    return points.curve(sorted({*kept, len(points) - 1}))
