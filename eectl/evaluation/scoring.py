"""The scores of exits and policies on a split. Chooses no thresholds there.

The exception is the authors' protocol, which picks and scores its thresholds on the same split; its results say so.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.evaluation.results import BudgetResult, Evaluation, ExitResult
from eectl.exits.policy import NEVER, BudgetPolicy, CostTable, Policies, choose
from eectl.exits.scores import ScoredRows
from eectl.exits.sweep import paper_walk, pick_as_paper, sweep, thin
from eectl.models.checkpoint import Origin

CURVE_POINTS = 500  # more cannot be told apart in a plot


def score_policies(scored: ScoredRows, policies: Policies, costs: CostTable, *, origin: Origin) -> Evaluation:
    """Return what calibrated policies give on a split that they were not chosen on.

    Args:
        scored: The split's outputs, as the policies' criterion sees them.
        policies: The thresholds for each budget.
        costs: What a row costs, in the policies' unit.
        origin: The run that the network came from, for the record.

    Raises:
        EectlError: the policies are for another task or number of exits, or were chosen on this very split.
    """
    made = scored.made
    if policies.fingerprint == made.fingerprint:
        raise EectlError(
            f"the thresholds were chosen on the rows they would be tested on (the {policies.split} split, fingerprint "
            f"{policies.fingerprint[:12]}…); calibrate on another split, or use --protocol paper, which does that openly"
        )
    if (policies.task, len(policies.exit_costs)) != (made.task, scored.num_exits):
        raise EectlError(
            f"the policies are for {policies.task.name} with {len(policies.exit_costs)} exits, the network does {made.task.name} "
            f"with {scored.num_exits}; run eectl calibrate-thresholds on it"
        )
    assert policies.criterion.name == scored.criterion.name
    result = _score(scored, policies.budgets, costs, protocol="calibrated", search=policies.search, origin=origin)
    return replace(result, metric=policies.metric)


def score_as_paper(scored: ScoredRows, costs: CostTable, *, budgets: Sequence[float], origin: Origin) -> Evaluation:
    """Return the authors' protocol: thresholds from a coarse grid, chosen and scored on the same split."""
    points = sweep(scored.scores, scored.outcome, costs.exits)
    chosen = pick_as_paper(points, budgets, costs, criterion=scored.criterion)
    return _score(scored, chosen, costs, protocol="paper", search="shared", origin=origin)


def _score(
    scored: ScoredRows, entries: Sequence[BudgetPolicy], costs: CostTable, *, protocol: str, search: str, origin: Origin
) -> Evaluation:
    num_exits = scored.num_exits
    unlimited = BudgetPolicy(math.inf, (NEVER,) * (num_exits - 1), None, None)
    budgets = [_score_budget(entry, scored, costs) for entry in (*entries, unlimited)]
    reached = [result.left for result in budgets[:-1] if result.left is not None]
    used = {index for left in reached for index, count in enumerate(left) if count}
    points = sweep(scored.scores, scored.outcome, costs.exits)
    return Evaluation(
        checkpoint=scored.made.checkpoint,
        task=scored.made.task.name,
        criterion=scored.criterion.name,
        protocol=protocol,
        split=scored.made.split,
        num_rows=scored.num_rows,
        plain_cost=costs.plain,
        exits=tuple(
            ExitResult(k + 1, *_mean(scored.outcome[k]), costs.exits[k], **_measures(scored, torch.full((scored.num_rows,), k)))
            for k in range(num_exits)
        ),
        budgets=tuple(budgets),
        dead=tuple(index + 1 for index in range(num_exits - 1) if reached and index not in used),
        curve=thin(points, CURVE_POINTS),
        grid=paper_walk(points, criterion=scored.criterion),
        fingerprint=scored.made.fingerprint,
        origin=origin,
        search=search,
        cost=costs.kind,
        measured=costs.measured,
        precision=scored.made.precision,
    )


def _score_budget(entry: BudgetPolicy, scored: ScoredRows, costs: CostTable) -> BudgetResult:
    budget = None if math.isinf(entry.budget) else entry.budget
    if entry.thresholds is None:
        return BudgetResult(budget)
    exits = choose(scored.scores, entry.thresholds)
    value, error = _mean(scored.outcome.gather(0, exits[None])[0])
    left = torch.bincount(exits, minlength=scored.num_exits).tolist()
    mean_cost = sum(count * cost for count, cost in zip(left, costs.exits, strict=True)) / len(exits)
    return BudgetResult(
        budget,
        entry.thresholds,
        value,
        error,
        mean_cost,
        tuple(left),
        is_over=mean_cost > costs.limit(entry.budget),
        **_measures(scored, exits),
    )


def _measures(scored: ScoredRows, exits: Tensor) -> dict[str, float]:
    """Return what is measured beside the score where each row takes the exit in `exits`, from 0."""
    values = scored.values.gather(0, exits[None])[0]
    if scored.made.task.predicts_number:
        return _correlations(values, scored.labels)
    return _by_class(values.long(), scored.labels)


def _correlations(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of values [row] with labels [row], NaN where either do not differ."""
    from scipy import stats

    pair = values.double().numpy(), labels.double().numpy()
    if min(map(np.ptp, pair)) == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    return {"pearson": float(stats.pearsonr(*pair)[0]), "spearman": float(stats.spearmanr(*pair)[0])}


def _by_class(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean over classes of their accuracy, and of their F1 score, for predicted classes [row] and labels [row].

    As in scikit-learn, classes without rows have no accuracy, and those that are neither there nor predicted no F1.
    """
    size = int(max(predicted.max(), labels.max())) + 1
    hits, rows, guesses = (
        torch.bincount(each, minlength=size).double() for each in (labels[predicted == labels], labels, predicted)
    )
    there, named = rows > 0, rows + guesses > 0
    return {
        "balanced": float((hits[there] / rows[there]).mean()),
        "macro_f1": float((2 * hits[named] / (rows + guesses)[named]).mean()),
    }


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean of [row] and its standard error, which for hits and misses is the binomial one."""
    mean = values.mean()
    return float(mean), float((values - mean).square().mean().sqrt()) / math.sqrt(len(values))
