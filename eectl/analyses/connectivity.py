"""Mode connectivity: losses on the straight line between two networks, before and after their units are matched.

The units come from `permutations`, their matching from `matching`; checking that networks can be compared is `same_shape`'s.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from eectl.analyses.asking import Answer, Context, Settings, Subject, check_count, eval_inputs, sample_batches, sample_rows
from eectl.analyses.matching import match
from eectl.analyses.permutations import Weights, check_specification, check_unchanged, find_permutations, holding, logits_of
from eectl.analyses.same_shape import check_alike, common_starts, without_heads
from eectl.data import Split
from eectl.losses import TASKS
from eectl.models.multi_exit import MultiExitModel
from eectl.report import Listing, Scalar
from eectl.seeds import derive_seed

CHECK_ROWS = 16  # on which a permuted network must do what the original does
PATHS = ("naive", "matched")
SPLITS = ("train", "test")
_FLAT = 0.05  # a barrier below this is called low in the reading, in units of the loss


@dataclass(frozen=True)
class ConnectivitySettings(Settings):
    """`points` networks on each line, ends included, on `samples` rows of train and of test each; BatchNorm's statistics anew
    from `bn_samples` train rows at each unless `reestimate` is off; `orders` random orders of matching."""

    points: int = 11
    samples: int = 1000
    bn_samples: int = 1000
    orders: int = 5
    reestimate: bool = True

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads."""
        return SPLITS


Curves = dict[str, dict[str, list[list[float]]]]
"""Split → `loss` or `score` → [point, exit]."""


@dataclass(frozen=True)
class _Line:
    """What is measured at one point: the task, and prepared batches of inputs and targets."""

    rows: Mapping[str, list[tuple[Tensor, Tensor]]]
    statistics: list[Tensor]
    task: str

    def measure(self, model: MultiExitModel) -> dict[str, dict[str, list[float]]]:
        """Mean loss and score of each exit on each split, after BatchNorm's statistics were taken anew."""
        if self.statistics:
            reestimate(model, self.statistics)
        return {name: measure_exits(model, batches, self.task) for name, batches in self.rows.items()}


def ask(subjects: Sequence[Subject], settings: ConnectivitySettings, context: Context) -> Answer:
    """Loss and score of every exit along the line between each two networks, and the barriers (paper Figure 3).

    Raises EectlError for networks that differ in more than their weights, and where permuting units changes what one computes.
    """
    check_count(settings.points, 3, option="--points", why="the two ends and what lies between")
    check_count(settings.samples, 1, option="--samples", why="a loss is a mean over rows")
    check_count(settings.orders, 1, option="--orders", why="matching runs at least once")
    if settings.reestimate:
        check_count(settings.bn_samples, 2, option="--bn-samples", why="BatchNorm takes no statistics of one row")
    notes = [*check_alike(subjects), *common_starts(subjects)]
    models = without_heads(subjects)
    line = _prepare(subjects[0], models[0], settings, context)
    if settings.reestimate and not line.statistics:
        notes.append("the networks have no BatchNorm, so there were no statistics to take anew")
    weights = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    model, probe = models[0], next(iter(line.rows["test"]))[0][:CHECK_ROWS]
    spec = find_permutations(model, probe[:1])
    check_specification(model, spec, probe, seed=derive_seed(context.seed, "permutations"))
    if spec.unknown:
        notes.append(f"units that {', '.join(spec.unknown)} read were left in place, as no rule says what those operations do")
    ends, pairs = [], []
    steps = len(subjects) + len(list(combinations(subjects, 2))) * 2 * (settings.points - 2)
    with context.count("lines", steps) as step:
        for own in weights:
            ends.append(_at(model, own, line))
            step()
        for first, second in combinations(range(len(subjects)), 2):
            matching = match(spec, weights[first], weights[second], seed=context.seed, orders=settings.orders)
            moved = spec.apply(weights[second], matching.permutations)
            with holding(model, weights[second]):
                plain = logits_of(model, probe)
            with holding(model, moved):
                check_unchanged(plain, logits_of(model, probe), label=subjects[second].label)
            pair: dict[str, Any] = {"first": subjects[first].label, "second": subjects[second].label, "paths": {}}
            for path, target in zip(PATHS, (weights[second], moved), strict=True):
                between = []
                for share in _shares(settings.points)[1:-1]:
                    between.append(_at(model, interpolate(weights[first], target, share), line))
                    step()
                pair["paths"][path] = _summary(_curves([ends[first], *between, ends[second]]))
            pair["matching"] = {
                "cosine_before": matching.before,
                "cosine_after": matching.after,
                "orders": matching.orders,
                "sweeps": matching.sweeps,
            }
            pairs.append(pair)
    labels = [subject.label for subject in subjects]
    values = {
        "score": TASKS[line.task].score_name,
        "lambdas": _shares(settings.points),
        "samples": {name: sum(len(targets) for _, targets in batches) for name, batches in line.rows.items()},
        "batch_norm": "re-estimated" if line.statistics else "as stored",
        "bn_rows": sum(map(len, line.statistics)),
        "groups": dict(zip(spec.names, spec.sizes, strict=True)),
        "pinned_by": list(spec.unknown),
        "pairs": pairs,
        "barriers": {path: {name: _matrix(pairs, labels, path, name) for name in SPLITS} for path in PATHS},
    }
    return Answer(values, _records(pairs, values["lambdas"]), _tables(pairs, labels), _reading(values, labels), tuple(notes))


def _shares(points: int) -> list[float]:
    return [index / (points - 1) for index in range(points)]


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> Weights:
    """(1 − share) · first + share · second; tensors of whole numbers are the first's."""
    return {
        name: (1 - share) * tensor + share * second[name] if tensor.is_floating_point() else tensor.clone()
        for name, tensor in first.items()
    }


def _at(model: MultiExitModel, weights: Mapping[str, Tensor], line: _Line) -> dict[str, dict[str, list[float]]]:
    with holding(model, weights):
        return line.measure(model)


def _prepare(subject: Subject, model: MultiExitModel, settings: ConnectivitySettings, context: Context) -> _Line:
    """The rows of both splits, and those of BatchNorm's statistics where they are to be taken anew."""
    session, size = subject.session, context.rows_at_once(subject)
    prepare = eval_inputs(session)

    def batches(split: Split, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in sample_batches(split, rows, size):
            yield prepare(batch.inputs), batch.targets

    splits = session.data.splits
    rows = {name: list(batches(splits[name], sample_rows(splits[name], settings.samples, context.seed))) for name in SPLITS}
    statistics: list[Tensor] = []
    if settings.reestimate and _batch_norms(model):
        drawn = sample_rows(splits["train"], settings.bn_samples, derive_seed(context.seed, "batch-norm"))
        generator = torch.Generator().manual_seed(derive_seed(context.seed, "batch-norm"))
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]  # rows of a folder come by class
        statistics = [inputs for inputs, _ in batches(splits["train"], drawn) if len(inputs) == min(size, len(drawn))]
    return _Line(rows, statistics, session.checkpoint.about.task)


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    modules = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in modules if module.track_running_stats]


@torch.no_grad()
def reestimate(model: MultiExitModel, batches: Sequence[Tensor]) -> None:
    """BatchNorm's running statistics as the plain mean over these batches of inputs; all else stays in evaluation mode."""
    layers = _batch_norms(model)
    kept = [
        (layer, layer.momentum, layer.num_batches_tracked.clone()) for layer in layers if layer.num_batches_tracked is not None
    ]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True
    for inputs in batches:
        model(inputs)
    for layer, momentum, count in kept:
        layer.momentum = momentum
        layer.training = False
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.copy_(count)


@torch.no_grad()
def measure_exits(model: MultiExitModel, batches: Sequence[tuple[Tensor, Tensor]], task: str) -> dict[str, list[float]]:
    """Mean `loss` and `score` of each exit over batches of inputs and targets."""
    kind = TASKS[task]
    sums = torch.zeros(2, model.num_exits, dtype=torch.float64)
    for inputs, targets in batches:
        for index, output in enumerate(model(inputs)):
            sums[0, index] += kind.losses(output.logits, targets, 0.0).sum(dtype=torch.float64).cpu()
            sums[1, index] += kind.points(output.logits, targets).sum(dtype=torch.float64).cpu()
    loss, score = (sums / sum(len(targets) for _, targets in batches)).tolist()
    return {"loss": loss, "score": score}


def _curves(points: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> Curves:
    return {name: {what: [point[name][what] for point in points] for what in ("loss", "score")} for name in SPLITS}


def barrier(losses: Sequence[float]) -> float:
    """max over λ of L(λ) − ((1 − λ)·L(0) + λ·L(1)), the λ being evenly spaced from 0 to 1: at least 0, as both ends give 0."""
    last = len(losses) - 1
    return max(loss - (losses[0] + (losses[-1] - losses[0]) * index / last) for index, loss in enumerate(losses))


def _summary(curves: Curves) -> dict[str, Any]:
    """Curves, and per split the barrier of each exit and of the mean loss over exits."""
    found = {}
    for name, values in curves.items():
        by_exit = [list(losses) for losses in zip(*values["loss"], strict=True)]
        mean = [math.fsum(losses) / len(losses) for losses in values["loss"]]
        barriers = {"barrier": [barrier(losses) for losses in by_exit], "barrier_of_mean": barrier(mean)}
        found[name] = {**values, **barriers, "mean_barrier": math.fsum(barriers["barrier"]) / len(by_exit)}  # type: ignore[arg-type]
    return found


def _matrix(pairs: Sequence[Mapping[str, Any]], labels: Sequence[str], path: str, split: str) -> list[list[float]]:
    """The mean barrier over exits of each two networks, 0 on the diagonal."""
    found = {(pair["first"], pair["second"]): pair["paths"][path][split]["mean_barrier"] for pair in pairs}
    return [[found.get((a, b), found.get((b, a), 0.0)) for b in labels] for a in labels]


def _records(pairs: Sequence[Mapping[str, Any]], lambdas: Sequence[float]) -> list[dict[str, Scalar]]:
    """A row per pair, path, split, point and exit."""
    return [
        {
            "first": pair["first"],
            "second": pair["second"],
            "path": path,
            "split": split,
            "lambda": share,
            "exit": index + 1,
            "loss": found["loss"][point][index],
            "score": found["score"][point][index],
            "barrier": found["barrier"][index],
        }
        for pair in pairs
        for path in PATHS
        for split, found in pair["paths"][path].items()
        for point, share in enumerate(lambdas)
        for index in range(len(found["barrier"]))
    ]


def _tables(pairs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Listing]:
    """Every pair's barriers, and of a single pair those of each exit."""
    columns = ("pair", *(f"{path}, {split}" for split in SPLITS for path in PATHS))
    rows = tuple((f"{pair['first']} – {pair['second']}", *_row(pair, "mean_barrier")) for pair in pairs)
    tables = [Listing("loss barrier on the line, mean over exits", columns, rows)]
    if len(labels) == 2:
        by_exit = zip(*_row(pairs[0], "barrier"), strict=True)
        exits = tuple((str(number), *map(_cell, values)) for number, values in enumerate(by_exit, 1))
        tables.append(Listing("the same by exit", ("exit", *columns[1:]), exits))
    return tables


def _row(pair: Mapping[str, Any], what: str) -> list[Any]:
    values = [pair["paths"][path][split][what] for split in SPLITS for path in PATHS]
    return [_cell(value) if what == "mean_barrier" else value for value in values]


def _cell(value: float) -> str:
    return f"{value:.4f}"


def _reading(values: Mapping[str, Any], labels: Sequence[str]) -> tuple[str, str]:
    pairs = values["pairs"]
    if len(labels) == 2:
        naive, matched = (pairs[0]["paths"][path]["test"]["mean_barrier"] for path in PATHS)
        said = (
            f"Between {labels[0]} and {labels[1]} the test loss rises by {naive:.3f} (mean over exits), matched by {matched:.3f}"
        )
        low, count = int(matched < _FLAT), 1
    else:
        means = [math.fsum(p["paths"][path]["test"]["mean_barrier"] for p in pairs) / len(pairs) for path in PATHS]
        nearest, farthest = (each(pairs, key=_matched) for each in (min, max))
        ends = " and ".join(f"{p['first']} – {p['second']} ({_matched(p):.3f})" for p in (nearest, farthest))
        said = (
            f"Over {len(pairs)} pairs the mean test barrier is {means[0]:.3f} and {means[1]:.3f} once matched; lowest and highest "
            f"matched are {ends}"
        )
        low, count = sum(_matched(pair) < _FLAT for pair in pairs), len(pairs)
    said += f"; {low} of {count} {'pair' if count == 1 else 'pairs'} stay below {_FLAT}, that is, lie in one basin."
    limits = (
        f"Weight matching finds a local optimum (best of {len(pairs[0]['matching']['orders'])} orders), so a barrier that is left "
        f"does not prove two basins, narrow networks keep one in any case, and only {values['samples']['test']} test rows and the "
        f"straight line were looked at."
    )
    return said, limits


def _matched(pair: Mapping[str, Any]) -> float:
    return float(pair["paths"]["matched"]["test"]["mean_barrier"])
