"""Measure gradient dominance of finished networks over batches of a split; `tracked` reads what training measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.dominance.tracked import ask_tracked, exit_listing, leader, leaders, tracked_epochs
from eectl.analyses.question import Answer, Context, Subject, check_split, sample_batches, sample_rows
from eectl.analyses.settings import DominanceSettings, check_count
from eectl.analyses.tables import Scalar
from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import Split
from eectl.evaluation.opened import preparing
from eectl.models.checkpoint import About
from eectl.models.losses import task_of
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.weighting import exit_weights
from eectl.training.gradient_dominance import Dominance, dominance, gram_matrices, shared_parameters


@dataclass(frozen=True)
class _Measured:
    """One network's Gram matrices, float64 [batch, segment, exit, exit], and what they were taken with."""

    grams: Tensor
    weights: list[float]
    weighting: str
    batch_size: int


def check_dominance(paths: Sequence[Path], abouts: Sequence[About], settings: DominanceSettings) -> None:  # noqa: ARG001
    """Raise EectlError, before anything is loaded, for a run that tracked nothing where --tracked asks for it."""
    if settings.tracked:
        for path in paths:
            tracked_epochs(path)


def ask_dominance(subjects: Sequence[Subject], settings: DominanceSettings, context: Context) -> Answer:
    """Measure the cosine of each exit's gradient with the weighted sum of all, on the backbone's parameters (paper §3.1).

    The mean and the standard deviation over batches, without augmentation. Raises EectlError for too few samples and for
    gradients that are 0 or not finite.
    """
    if settings.tracked:
        return ask_tracked(subjects)
    measured = [_measure(subject, settings, context) for subject in subjects]
    found = [_summary(subject, each, settings) for subject, each in zip(subjects, measured, strict=True)]
    rows = {subject.label: one["cosine"]["mean"] for subject, one in zip(subjects, found, strict=True)}
    prefixes = {subject.label: one["prefix_cosine"]["mean"] for subject, one in zip(subjects, found, strict=True)}
    notes = [f"{one['label']}: {one['note']}" for one in found if one["note"]]
    return Answer(
        values={"tracked": False, "networks": found},
        records=[record for one in found for record in _records(one, max(len(other["cosine"]["mean"]) for other in found))],
        tables=[
            *exit_listing("cosine of the exit's gradient with the total, mean over batches", rows),
            *exit_listing("the same over the blocks that the exit stands on", prefixes),
        ],
        reading=(_finding(rows, prefixes), _limits(found, subjects[0].session.data.splits[settings.split], settings)),
        notes=tuple(notes),
    )


def _measure(subject: Subject, settings: DominanceSettings, context: Context) -> _Measured:
    """Run a forward pass, and a backward pass per exit, for every batch; leave the network as it was."""
    checkpoint = subject.session.checkpoint
    model, recipe = checkpoint.model, checkpoint.about.recipe
    split = check_split(subject.session, settings.split)
    rows = sample_rows(split, settings.samples, context.seed)
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "gradient-dominance"))
    rows = rows[torch.randperm(len(rows), generator=generator)]  # rows of a folder come by class, those of a batch do not
    size = min(context.batch_size or int(recipe.get("batch_size", checkpoint.about.eval_batch_size)), len(rows))
    if settings.train_mode:
        check_count(size, 2, option="--batch-size", why="BatchNorm takes no statistics of one row")
    weighting, weights = _weights(subject)
    task, smoothing = task_of(checkpoint.about.task, checkpoint.about.recipe), float(recipe.get("label_smoothing", 0.0))
    prepare, segments, grams = preparing(subject.session), shared_parameters(model), []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _set_mode(model, train=settings.train_mode)
    num_batches = len(rows) // size
    device = subject.session.world.device
    with context.count(subject.label, num_batches) as step, torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, batch in enumerate(sample_batches(split, rows[: num_batches * size], size)):
            torch.manual_seed(derive_seed(context.seed, "gradient-dominance", number))  # dropout's, in train mode
            outputs = model(prepare(batch.inputs), equilibrium=weighting == "equilibrium")
            losses = [task.loss(output.logits, batch.targets, smoothing) for output in outputs]
            grams.append(gram_matrices(losses, segments).cpu().double())
            step()
    _set_mode(model, train=False)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    found = _Measured(torch.stack(grams), weights, weighting, size)
    _check(subject, found)
    return found


def _set_mode(model: MultiExitModel, *, train: bool) -> None:
    everything = range(1, model.num_exits + 1) if train else ()
    model.train_parts(everything, everything, combine=train)


def _weights(subject: Subject) -> tuple[str, list[float]]:
    """Return how the recipe weighs the exits when all of them train (at the end of a ramp), by name and as numbers."""
    about, model = subject.session.checkpoint.about, subject.session.checkpoint.model
    named = about.recipe.get("loss_weights", "auto")
    scheme = model.default_weights if named == "auto" else named
    exits = range(1, model.num_exits + 1)
    weights = exit_weights(
        tuple(scheme) if isinstance(scheme, list) else scheme,
        num_exits=model.num_exits,
        taking_part=exits,
        slope=float(about.recipe.get("weight_slope", 0.4)),
        shares=subject.session.costs.backbone_shares,
    )
    return scheme if isinstance(scheme, str) else "as listed", weights


def _check(subject: Subject, found: _Measured) -> None:
    """Raise EectlError for gradients without a direction."""
    path, count = subject.session.checkpoint.path, len(found.grams)
    squares = found.grams.sum(dim=1).diagonal(dim1=1, dim2=2)  # [batch, exit]
    for number, own in enumerate(squares.T, 1):
        if not own.isfinite().all():
            raise EectlError(f"{path}: the gradient of exit {number} is not finite; train again with a lower optimizer.lr")
        if not own.any():
            raise EectlError(
                f"{path}: exit {number}'s gradient on the backbone is 0 on all {count} batches, so it has no direction; if the "
                f"exit was never trained, do so first: eectl train --phase 3 --from {path}"
            )
    weights = torch.tensor(found.weights, dtype=torch.float64)
    if not (weights @ found.grams.sum(dim=1) @ weights).any():
        raise EectlError(f"{path}: the weighted sum of all exits' gradients is 0 on all {count} batches; nothing to compare with")


def _summary(subject: Subject, measured: _Measured, settings: DominanceSettings) -> dict[str, Any]:
    """Return everything about one network, as JSON."""
    weights = torch.tensor(measured.weights, dtype=torch.float64)
    exits = range(1, len(weights) + 1)
    each = [dominance(grams, weights, exits) for grams in measured.grams]
    undefined = sum(bool(one.cosine.isnan().any()) for one in each)
    return {
        "label": subject.label,
        "after": list(subject.session.checkpoint.about.spec.after),
        "loss_weights": measured.weighting,
        "weights": measured.weights,
        "mode": "train" if settings.train_mode else "eval",
        "rows": len(measured.grams) * measured.batch_size,
        "batch_size": measured.batch_size,
        "batches": len(measured.grams),
        "cosine": _moments(each, "cosine"),
        "prefix_cosine": _moments(each, "prefix"),
        "norms": torch.stack([one.norms for one in each]).mean(dim=0).tolist(),
        "pairs": torch.stack([one.pairs for one in each]).nanmean(dim=0).tolist(),
        "gram": measured.grams.mean(dim=0).tolist(),
        "note": _note(measured.weighting, undefined, len(each)),
    }


def _note(weighting: str, undefined: int, batches: int) -> str:
    notes = []
    if weighting == "l2w":
        notes.append("l2w's weights of rows are not in the checkpoint, so the exits are weighted as they start: alike")
    if undefined:
        notes.append(f"a gradient was 0 on {undefined} of {batches} batches, which its means leave out")
    return "; ".join(notes)


def _moments(each: Sequence[Dominance], name: str) -> dict[str, list[float]]:
    """Return mean and sample standard deviation over batches, [exit]; the latter is NaN for a single batch."""
    values = torch.stack([getattr(one, name) for one in each])
    count = (~values.isnan()).sum(dim=0)
    mean = values.nanmean(dim=0)
    variance = (values - mean).square().nansum(dim=0) / (count - 1)
    return {"mean": mean.tolist(), "sd": torch.where(count > 1, variance.sqrt(), torch.nan).tolist()}


def _records(one: Mapping[str, Any], num_segments: int) -> list[dict[str, Scalar]]:
    """Return the CSV's rows, one per exit; norms by segment, None past a shallower network's last."""
    return [
        {
            "label": one["label"],
            "exit": index + 1,
            "after": one["after"][index] if index < len(one["after"]) else None,
            "weight": one["weights"][index],
            "cosine": one["cosine"]["mean"][index],
            "cosine_sd": one["cosine"]["sd"][index],
            "prefix_cosine": one["prefix_cosine"]["mean"][index],
            "prefix_cosine_sd": one["prefix_cosine"]["sd"][index],
            "batches": one["batches"],
            "rows": one["rows"],
        }
        | {f"norm_segment_{k + 1}": own[k] if k < len(own) else None for k in range(num_segments)}
        for index, own in enumerate(one["norms"])
    ]


def _finding(rows: Mapping[str, Sequence[float]], prefixes: Mapping[str, Sequence[float]]) -> str:
    alike = all(leader(rows[label]) == leader(prefixes[label]) for label in rows)
    ending = "the same exits lead" if alike else f"most the way of {leaders(prefixes)}"
    return (
        f"The sum that would move the backbone now points most the way of {leaders(rows)}; over the blocks that each exit "
        f"stands on alone, {ending}."
    )


def _limits(found: Sequence[Mapping[str, Any]], split: Split, settings: DominanceSettings) -> str:
    sizes = " or ".join(dict.fromkeys(f"{one['batches']} batches of {one['batch_size']}" for one in found))
    mode = "train mode" if settings.train_mode else "eval mode"
    return (
        f"From {sizes} {split.name} {split.noun} in {mode} at finished weights, where gradients are small: this cannot say what "
        "formed the weights (--tracked does), and an exit's cosine is below 1 by construction, as it has no gradient past its "
        "own block."
    )
