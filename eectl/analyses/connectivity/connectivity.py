"""Measure mode connectivity: losses on the straight line between two networks, before and after their units are matched.

The units come from `permutations`, their matching from `matching`, the barriers from `barriers`; whether networks can be compared
is `same_shape`'s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.batch_norms import norm_batches, reestimate
from eectl.analyses.connectivity import barriers
from eectl.analyses.connectivity.barriers import PATHS, SPLITS
from eectl.analyses.connectivity.matching import Matching, match
from eectl.analyses.connectivity.permutations import (
    Specification,
    Weights,
    check_specification,
    check_unchanged,
    find_permutations,
    holding,
    logits_of,
)
from eectl.analyses.connectivity.same_shape import check_alike, common_starts, without_heads
from eectl.analyses.question import Answer, Context, Subject, sample_batches, sample_rows
from eectl.analyses.settings import ConnectivitySettings
from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import Batch
from eectl.evaluation.opened import preparing
from eectl.models.losses import Task, task_of
from eectl.models.multi_exit import MultiExitModel

CHECK_ROWS = 16  # on which a permuted network must do what the original does

Measured = dict[str, dict[str, list[float]]]
"""Split → `loss` or `score` → [exit]."""


@dataclass(frozen=True)
class _Yardstick:
    """The rows that networks are measured on: batches by split, inputs that BatchNorm's statistics come from, and the task."""

    rows: Mapping[str, Sequence[Batch]]
    statistics: Sequence[Tensor]
    prepare: Callable[[Tensor], Tensor]
    task: Task

    def measure(self, model: MultiExitModel, weights: Mapping[str, Tensor]) -> Measured:
        """Return each exit's mean loss and score on each split, with these weights and BatchNorm's statistics taken anew."""
        with holding(model, weights):
            if self.statistics:
                reestimate(model, map(self.prepare, self.statistics))
            return {name: self._means(model, batches) for name, batches in self.rows.items()}

    @torch.inference_mode()
    def _means(self, model: MultiExitModel, batches: Sequence[Batch]) -> dict[str, list[float]]:
        kind = self.task
        measures: list[Callable[[Tensor, Tensor], Tensor]] = [lambda x, y: kind.losses(x, y, 0.0), kind.points]
        sums = torch.zeros(2, model.num_exits, dtype=torch.float64)
        for batch in batches:
            logits = [output.logits for output in model(self.prepare(batch.inputs))]
            for line, measure in zip(sums, measures, strict=True):
                line += torch.stack([measure(each, batch.targets).sum(dtype=torch.float64) for each in logits]).cpu()
        loss, score = (sums / sum(len(batch.targets) for batch in batches)).tolist()
        return {"loss": loss, "score": score}


def ask_connectivity(subjects: Sequence[Subject], settings: ConnectivitySettings, context: Context) -> Answer:
    """Measure every exit along the line between each two networks, and the barriers (paper's Figure 3).

    Raises EectlError for networks that differ in more than their weights, and where permuting units changes what one computes.
    """
    notes = [*check_alike(subjects), *common_starts(subjects)]
    models = without_heads(subjects)
    model, yardstick = models[0], _prepare(subjects[0], settings, context)
    if settings.reestimate and not yardstick.statistics:
        notes.append("the networks have no BatchNorm, so there were no statistics to take anew")
    probe = yardstick.prepare(yardstick.rows["test"][0].inputs[:CHECK_ROWS])
    spec = find_permutations(model, probe[:1])
    check_specification(model, spec, probe, seed=derive_seed(context.seed, "permutations"))
    if spec.unknown:
        notes.append(f"units that {', '.join(spec.unknown)} read were left in place, as no rule says what those operations do")
    weights = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in models]
    two = list(combinations(range(len(subjects)), 2))
    pairs: list[dict[str, Any]] = []
    with context.count("networks on lines", len(subjects) + len(two) * len(PATHS) * (settings.points - 2)) as step:

        def measure(at: Mapping[str, Tensor], place: str) -> Measured:
            found = yardstick.measure(model, at)
            _check_finite(found, place)
            step()
            return found

        ends = [measure(own, subject.label) for own, subject in zip(weights, subjects, strict=True)]
        for first, second in two:
            matching = match(spec, weights[first], weights[second], seed=context.seed, orders=settings.orders)
            moved = _moved(model, spec, matching, weights[second], probe, label=subjects[second].label)
            names = {"first": subjects[first].label, "second": subjects[second].label}
            lines = {}
            for path, target in zip(PATHS, (weights[second], moved), strict=True):
                inner = barriers.shares(settings.points)[1:-1]
                place = " and ".join(names.values())
                between = [
                    measure(interpolate(weights[first], target, share), f"λ = {share:g} between {place}") for share in inner
                ]
                lines[path] = _by_split([ends[first], *between, ends[second]])
            pairs.append({**names, "matching": _described(matching), "paths": lines})
    still = [f"{pair['first']} – {pair['second']}" for pair in pairs if not pair["matching"]["moved"]]
    if still:
        notes.append(f"{'; '.join(still)}: matching changed nothing, no order of units is closer than the one they have")
    labels = [subject.label for subject in subjects]
    values = {
        "score": yardstick.task.score_name,
        "lambdas": barriers.shares(settings.points),
        "samples": {name: sum(len(batch.targets) for batch in batches) for name, batches in yardstick.rows.items()},
        "batch_norm": "re-estimated" if yardstick.statistics else "as stored",
        "bn_rows": sum(map(len, yardstick.statistics)),
        "orders": settings.orders,
        "groups": dict(zip(spec.names, spec.sizes, strict=True)),
        "pinned_by": list(spec.unknown),
        "pairs": pairs,
        "barriers": {path: {name: barriers.barrier_map(pairs, labels, path, name) for name in SPLITS} for path in PATHS},
    }
    return Answer(values, barriers.records(pairs), barriers.tables(pairs), barriers.read(values), tuple(notes))


def _prepare(subject: Subject, settings: ConnectivitySettings, context: Context) -> _Yardstick:
    """Read the rows, which are the same for all networks, once and not once per point."""
    session, size = subject.session, context.rows_at_once(subject)
    about = session.checkpoint.about
    splits = {name: session.data.splits[name] for name in SPLITS}
    rows = {
        name: list(sample_batches(split, sample_rows(split, settings.samples, context.seed), size))
        for name, split in splits.items()
    }
    statistics = norm_batches(subject, settings.bn_samples, context, option="--bn-samples") if settings.reestimate else []
    return _Yardstick(rows, statistics, preparing(session), task_of(about.task, about.recipe))


def _check_finite(found: Measured, place: str) -> None:
    for split, means in found.items():
        broken = [str(number) for number, loss in enumerate(means["loss"], 1) if not math.isfinite(loss)]
        if broken:
            raise EectlError(
                f"{place}: the {split} loss of exit {', '.join(broken)} is not finite, so there is no barrier to measure"
            )


def _moved(
    model: MultiExitModel, spec: Specification, matching: Matching, weights: Weights, probe: Tensor, *, label: str
) -> Weights:
    """Permute the units of weights, and check that this does not change what the network computes."""
    moved = spec.apply(weights, matching.permutations)
    with holding(model, weights):
        plain = logits_of(model, probe)
    with holding(model, moved):
        check_unchanged(plain, logits_of(model, probe), label=label)
    return moved


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> Weights:
    """Return (1 − share) · first + share · second; tensors of whole numbers are the first's."""
    return {
        name: torch.lerp(tensor, second[name], share) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in first.items()
    }


def _by_split(points: Sequence[Measured]) -> dict[str, Any]:
    return {
        name: barriers.summarize_line({what: [point[name][what] for point in points] for what in ("loss", "score")})
        for name in SPLITS
    }


def _described(matching: Matching) -> dict[str, Any]:
    """Say how far matching came, as JSON; `moved` counts the units that changed place."""
    found = asdict(matching)
    found.pop("permutations")
    return {**found, "orders": list(matching.orders), "moved": matching.moved}
