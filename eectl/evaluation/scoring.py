"""The scores of exits and policies on a split. Chooses no thresholds there.

The exception is the authors' protocol, which picks and scores its thresholds on the same split; its results say so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.evaluation.measures import measures_at
from eectl.evaluation.results import BudgetResult, Evaluation, ExitResult
from eectl.exits.decisions import Decisions, decided
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
    decisions = policies.decisions
    scored = scored if decisions is None else decided(scored, decisions)
    how: dict[str, Any] = {"search": policies.search, "origin": origin, "decisions": decisions}
    result = _score(scored, policies.budgets, costs, protocol="calibrated", **how)
    return replace(result, metric=policies.metric)


def score_as_paper(scored: ScoredRows, costs: CostTable, *, budgets: Sequence[float], origin: Origin) -> Evaluation:
    """Return the authors' protocol: thresholds from a coarse grid, chosen and scored on the same split."""
    points = sweep(scored.scores, scored.outcome, costs.exits)
    chosen = pick_as_paper(points, budgets, costs, criterion=scored.criterion)
    return _score(scored, chosen, costs, protocol="paper", search="shared", origin=origin)


def _score(
    scored: ScoredRows,
    entries: Sequence[BudgetPolicy],
    costs: CostTable,
    *,
    protocol: str,
    search: str,
    origin: Origin,
    decisions: Decisions | None = None,
) -> Evaluation:
    num_exits = scored.num_exits
    unlimited = BudgetPolicy(math.inf, (NEVER,) * (num_exits - 1), None, None)
    how: dict[str, Any] = {"targets": _target_names(origin), "decisions": decisions}
    budgets = [_score_budget(entry, scored, costs, how) for entry in (*entries, unlimited)]
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
            ExitResult(
                k + 1, *_mean(scored.outcome[k]), costs.exits[k], **measures_at(scored, torch.full((scored.num_rows,), k), **how)
            )
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


def _target_names(origin: Origin) -> tuple[str, ...]:
    """Return the names of the columns that a network predicts, where its recipe has them."""
    data = origin.recipe.get("data")
    names = data.get("target", ()) if isinstance(data, Mapping) else ()
    return (names,) if isinstance(names, str) else tuple(map(str, names))


def _score_budget(entry: BudgetPolicy, scored: ScoredRows, costs: CostTable, how: Mapping[str, Any]) -> BudgetResult:
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
        **measures_at(scored, exits, **how),
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean of [row] and its standard error, which for hits and misses is the binomial one."""
    mean = values.mean()
    return float(mean), float((values - mean).square().mean().sqrt()) / math.sqrt(len(values))
