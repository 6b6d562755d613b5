"""What each exit and each budget's policy give on a split. Chooses nothing there by itself.

The exception is the authors' protocol, which picks and scores its thresholds on the same split; its results say so.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.evaluation.results import BudgetResult, Curve, Evaluation, ExitResult
from eectl.exits.policy import NEVER, BudgetPolicy, Policies, choose
from eectl.exits.scores import Scored
from eectl.exits.sweep import OperatingPoints, Point, limit, paper_walk, pick_as_paper, sweep, thin

CURVE_POINTS = 500  # more cannot be told apart in a plot


def evaluate(scored: Scored, policies: Policies, *, exit_costs: Sequence[int], plain_cost: int) -> Evaluation:
    """Apply calibrated policies to the test split, scored by their criterion; costs are in the policies' unit.

    Raises EectlError where the policies are for another task or number of exits, or were chosen on this very split.
    """
    if policies.fingerprint == scored.fingerprint:
        raise EectlError(
            f"the thresholds were chosen on the rows they would be tested on (the {policies.split} split, fingerprint "
            f"{policies.fingerprint[:12]}…); calibrate on another split, or use --protocol paper, which does that openly"
        )
    if (policies.task, len(policies.exit_costs)) != (scored.task, scored.num_exits):
        raise EectlError(
            f"the policies are for {policies.task} with {len(policies.exit_costs)} exits, the network does {scored.task} "
            f"with {scored.num_exits}; run eectl calibrate-thresholds on it"
        )
    assert policies.criterion == scored.criterion
    result = _evaluate(scored, policies.budgets, exit_costs, plain_cost, protocol="calibrated")
    return replace(result, search=policies.search, cost=policies.cost, measured=policies.measured)


def evaluate_as_paper(scored: Scored, *, exit_costs: Sequence[int], plain_cost: int, budgets: Sequence[float]) -> Evaluation:
    """The authors' protocol: thresholds from a coarse grid, chosen and scored on the same split."""
    num_exits = scored.num_exits
    points = every_point(scored, exit_costs=exit_costs)
    chosen = pick_as_paper(points, budgets, plain_cost, criterion=scored.criterion, num_exits=num_exits)
    entries = [BudgetPolicy.shared(*each, num_exits=num_exits) for each in zip(budgets, chosen, strict=True)]
    return _evaluate(scored, entries, exit_costs, plain_cost, protocol="paper")


def every_point(scored: Scored, *, exit_costs: Sequence[int]) -> OperatingPoints:
    """Every operating point on this split: what the curve of a plot shows, a diagnostic and not a choice."""
    return sweep(scored.scores, scored.outcome, exit_costs, task=scored.task)


def _evaluate(
    scored: Scored, entries: Sequence[BudgetPolicy], exit_costs: Sequence[int], plain_cost: int, *, protocol: str
) -> Evaluation:
    num_exits = scored.num_exits
    costs = torch.tensor(list(exit_costs))
    unlimited = BudgetPolicy(math.inf, (NEVER,) * (num_exits - 1), None, None)
    budgets = [_budget(entry, scored, costs, plain_cost) for entry in (*entries, unlimited)]
    reached = [result.left for result in budgets[:-1] if result.left is not None]
    used = {index for left in reached for index, count in enumerate(left) if count}
    points = every_point(scored, exit_costs=exit_costs)
    has_grid = scored.task != "regression"  # the paper names no grid there
    return Evaluation(
        checkpoint=scored.checkpoint,
        task=scored.task,
        criterion=scored.criterion,
        protocol=protocol,
        split=scored.split,
        num_rows=scored.num_rows,
        plain_cost=plain_cost,
        exits=tuple(
            ExitResult(k + 1, *_mean(scored.outcome[k]), int(costs[k]), *_correlations(scored, torch.full((scored.num_rows,), k)))
            for k in range(num_exits)
        ),
        budgets=tuple(budgets),
        dead=tuple(index + 1 for index in range(num_exits - 1) if reached and index not in used),
        curve=_curve(thin(points, CURVE_POINTS)),
        grid=_curve(paper_walk(points, criterion=scored.criterion, num_exits=num_exits)) if has_grid else None,
        fingerprint=scored.fingerprint,
    )


def _curve(points: Sequence[Point]) -> Curve:
    thresholds, costs, values = zip(*((point.threshold, point.mean_cost, point.value) for point in points), strict=True)
    return Curve(thresholds, costs, values)


def _budget(entry: BudgetPolicy, scored: Scored, costs: Tensor, plain_cost: int) -> BudgetResult:
    budget = None if math.isinf(entry.budget) else entry.budget
    if entry.thresholds is None:
        return BudgetResult(budget)
    exits = choose(scored.scores, entry.thresholds)
    value, error = _mean(scored.outcome.gather(0, exits[None])[0])
    left = torch.bincount(exits, minlength=scored.num_exits)
    mean_cost = int((left * costs).sum()) / len(exits)
    is_over = mean_cost > limit(entry.budget, plain_cost)
    correlations = _correlations(scored, exits)
    return BudgetResult(budget, entry.thresholds, value, error, mean_cost, tuple(left.tolist()), is_over, *correlations)


def _correlations(scored: Scored, exits: Tensor) -> tuple[float | None, float | None]:
    """Pearson's and Spearman's correlation with the labels where each row takes the exit in `exits`, from 0.

    None for classification, NaN where the values or the labels do not differ.
    """
    if scored.values is None:
        return None, None
    from scipy import stats

    values = scored.values.gather(0, exits[None])[0].double().numpy()
    labels = scored.labels.double().numpy()
    if min(np.ptp(values), np.ptp(labels)) == 0:
        return math.nan, math.nan
    return float(stats.pearsonr(values, labels)[0]), float(stats.spearmanr(values, labels)[0])


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean of [row] and its standard error, which for hits and misses is the binomial one."""
    mean = values.mean()
    return float(mean), float((values - mean).square().mean().sqrt()) / math.sqrt(len(values))
