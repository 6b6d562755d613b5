"""Measure the loss landscape: every exit's loss on a random line or plane through the weights (paper, Appendix B)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.batch_norms import batch_norms, norm_batches, reestimate
from eectl.analyses.landscape.plane import moved_names, random_plane
from eectl.analyses.landscape.surfaces import (
    CURVATURE_STEP,
    DISTANCES,
    Point,
    column,
    differences,
    finite,
    flat,
    grid_coordinates,
    places,
    surface_records,
    surface_tables,
)
from eectl.analyses.question import Answer, Context, Subject, check_split, sample_batches, sample_rows
from eectl.analyses.settings import LandscapeSettings
from eectl.core.errors import EectlError
from eectl.evaluation.opened import preparing
from eectl.models.losses import task_of


@dataclass(frozen=True)
class _Surface:
    """One network's losses by point, float64 [exit] with the total (the mean over exits) last, and how they were taken."""

    losses: Mapping[Point, Tensor]
    rows: int
    batch_size: int
    label_smoothing: float
    num_moved: int
    plain: Tensor


def ask_landscape(subjects: Sequence[Subject], settings: LandscapeSettings, context: Context) -> Answer:
    """Measure each exit's mean loss, and their mean, on a grid around the weights, and how fast they rise.

    Without augmentation, in eval mode. Raises EectlError for settings out of range, and for a loss that is not finite at the
    weights themselves; elsewhere such losses are None.
    """
    _check_batch_norms(subjects, settings)
    coordinates = grid_coordinates(settings.points, settings.span)
    surfaces = [_measure(subject, coordinates, settings, context) for subject in subjects]
    networks = [_summary(subject, surface, coordinates, settings) for subject, surface in zip(subjects, surfaces, strict=True)]
    alike = differences(networks)
    return Answer(
        values={
            "coordinates": coordinates,
            "distances": [share * settings.span for share in DISTANCES],
            "curvature_step": CURVATURE_STEP,
            "total": "the mean over exits",
            "networks": networks,
            "differences": alike,
        },
        records=[record for one in networks for record in surface_records(one, coordinates, settings.dimensions)],
        tables=surface_tables(networks, alike, settings.span),
        reading=(_finding(networks, alike, settings), _limits(subjects[0], networks, settings, context.seed)),
        notes=_notes(subjects, networks, settings),
    )


def _check_batch_norms(subjects: Sequence[Subject], settings: LandscapeSettings) -> None:
    """Raise EectlError where statistics are to be taken anew and no network has any."""
    if settings.reestimate and not any(batch_norms(subject.session.checkpoint.model) for subject in subjects):
        raise EectlError("--reestimate: no network here has BatchNorm statistics; leave it out")


def _measure(subject: Subject, coordinates: Sequence[float], settings: LandscapeSettings, context: Context) -> _Surface:
    """Measure the losses at every point of the grid and where the table needs them; leave the network as it was."""
    checkpoint = subject.session.checkpoint
    model, size = checkpoint.model, context.rows_at_once(subject)
    split = check_split(subject.session, settings.split)
    rows = sample_rows(split, settings.samples, context.seed)
    batches = list(sample_batches(split, rows, size))  # kept: files are read once, not once per point
    prepare, task = preparing(subject.session), task_of(checkpoint.about.task, checkpoint.about.recipe)
    smoothing = float(checkpoint.about.recipe.get("label_smoothing", 0.0))
    seen = norm_batches(subject, settings.samples, context) if settings.reestimate else []

    @torch.inference_mode()
    def losses() -> Tensor:
        sums = torch.zeros(model.num_exits, dtype=torch.float64)
        for batch in batches:
            outputs = model(prepare(batch.inputs))
            own = torch.stack([task.losses(output.logits, batch.targets, smoothing) for output in outputs])
            sums += own.cpu().double().sum(dim=1)
        means = sums / len(rows)
        return torch.cat([means, means.mean(dim=0, keepdim=True)])

    names = moved_names(model, settings.only)
    plain = losses()
    _check_centre(subject, plain, settings.split)
    looked_at = places(coordinates, settings.dimensions)
    found: dict[Point, Tensor] = {}
    with (
        context.count(subject.label, len(looked_at)) as step,
        random_plane(model, names, seed=context.seed, dimensions=settings.dimensions) as move,
    ):
        for place in looked_at:
            move(*place)
            if seen:
                reestimate(model, map(prepare, seen))
            found[place] = losses()
            step()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    return _Surface(found, len(rows), size, smoothing, sum(sizes.get(name, 0) for name in names), plain)


def _check_centre(subject: Subject, plain: Tensor, split: str) -> None:
    broken = [str(number) for number, value in enumerate(plain[:-1].tolist(), 1) if not math.isfinite(value)]
    if broken:
        raise EectlError(
            f"{subject.session.checkpoint.path}: the loss of exit {', '.join(broken)} on {split} rows is not finite at the "
            "weights themselves; train again with a lower optimizer.lr"
        )


def _summary(subject: Subject, surface: _Surface, coordinates: Sequence[float], settings: LandscapeSettings) -> dict[str, Any]:
    """Return a network as JSON; `loss[i]`, or `loss[i][j]`, is at the i-th coordinate of direction 1 (j-th of 2)."""
    num_exits = len(surface.plain) - 1
    columns = [
        column(surface.losses, index, coordinates, settings.dimensions) | {"exit": index + 1 if index < num_exits else "total"}
        for index in range(num_exits + 1)
    ]
    centre = [finite(value) for value in surface.plain.tolist()]
    return {
        "label": subject.label,
        "after": list(subject.session.checkpoint.about.spec.after),
        "rows": surface.rows,
        "batch_size": surface.batch_size,
        "label_smoothing": surface.label_smoothing,
        "parameters_moved": surface.num_moved,
        "parameters": sum(parameter.numel() for parameter in subject.session.checkpoint.model.parameters()),
        "plain": {"exits": centre[:-1], "total": centre[-1]},
        "exits": columns[:-1],
        "total": columns[-1],
    }


def _finding(networks: Sequence[Mapping[str, Any]], alike: Sequence[Mapping[str, Any]], settings: LandscapeSettings) -> str:
    where = next((k for k in (1, 0) if all(one["total"]["rise"][k] is not None for one in networks)), None)
    if where is None:
        return f"A step of {DISTANCES[0] * settings.span:g} filter norms already leaves no finite loss in at least one network."
    step = DISTANCES[where] * settings.span
    rises = ", ".join(f"{one['total']['rise'][where]:.3g} in {one['label']}" for one in networks)
    first = ", ".join(
        f"{one['exits'][0]['rise'][where]:.3g} against {one['exits'][-1]['rise'][where]:.3g} in {one['label']}"
        for one in networks
        if len(one["exits"]) > 1
    )
    text = f"A random step of {step:g} filter norms raises the total loss by {rises}"
    text += f", the first exit's against the last's by {first}" if first else ""
    pairs = [each for each in alike if each["of"] == "first exit" and each["rms_log10"] is not None]
    if len(pairs) > 1:
        near, far = (choose(pairs, key=lambda each: float(each["rms_log10"])) for choose in (min, max))
        text += (
            f"; the first exit's surfaces are most alike in {' and '.join(near['networks'])} (r.m.s. of log₁₀ "
            f"{near['rms_log10']:.2g}) and least in {' and '.join(far['networks'])} ({far['rms_log10']:.2g})"
        )
    return text + "."


def _limits(subject: Subject, networks: Sequence[Mapping[str, Any]], settings: LandscapeSettings, seed: int) -> str:
    split = subject.session.data.splits[settings.split]
    drawn = "one random plane" if settings.dimensions == 2 else "one random line"
    parts = {"all": "", "heads": " through the heads' weights alone", "backbone": " through the backbone's weights alone"}
    return (
        f"From {drawn}{parts[settings.only]} (seed {seed}) and {networks[0]['rows']:,} {split.name} {split.noun} without "
        "augmentation: how much another plane differs, only other seeds tell, and as a distance is in each network's own norms, "
        "this cannot say which network generalises, nor whether two lie in one basin (mode-connectivity does)."
    )


def _notes(subjects: Sequence[Subject], networks: Sequence[Mapping[str, Any]], settings: LandscapeSettings) -> tuple[str, ...]:
    lost = {one["label"]: sum(value is None for value in flat(one["total"]["loss"])) for one in networks}
    without = [each.label for each in subjects if settings.reestimate and not batch_norms(each.session.checkpoint.model)]
    smoothings = {one["label_smoothing"] for one in networks}
    return (
        *(f"{label}: {n} points of the grid have no finite total loss and are left blank" for label, n in lost.items() if n),
        *(f"{label}: no BatchNorm, so nothing was re-estimated" for label in without),
        *(["the recipes' label smoothing differs, and so do the losses"] if len(smoothings) > 1 else ()),
        *(["the losses hold the recipe's label smoothing"] if len(smoothings) == 1 and any(smoothings) else ()),
    )
