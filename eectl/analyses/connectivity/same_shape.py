"""Check that networks differ in their weights alone, and note those that grew from one start. Runs no network."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from eectl.analyses.question import Subject
from eectl.analyses.settings import ConnectivitySettings
from eectl.core.errors import EectlError
from eectl.models.checkpoint import About
from eectl.models.multi_exit import MultiExitModel


def check_headers(paths: Sequence[Path], abouts: Sequence[About], settings: ConnectivitySettings) -> None:  # noqa: ARG001
    """Raise EectlError, before anything is loaded, that names the first fact in which two checkpoints' networks differ."""
    heads = all(about.spec.after for about in abouts)
    for path, about in zip(paths[1:], abouts[1:], strict=True):
        _compare(paths[0], _facts(abouts[0], heads=heads), path, _facts(about, heads=heads))


def check_alike(subjects: Sequence[Subject]) -> list[str]:
    """Check that networks' tensors have the same shapes; return a note where exits are left out because a network has none.

    Raises EectlError that names the first two networks that differ.
    """
    checkpoints = [subject.session.checkpoint for subject in subjects]
    bare = [subject for subject in subjects if not subject.session.checkpoint.about.spec.after]
    first = checkpoints[0]
    for other in checkpoints[1:]:
        mine, theirs = _shapes(first.model, heads=not bare), _shapes(other.model, heads=not bare)
        every = dict.fromkeys([*mine, *theirs])
        own, others = ([(name, shapes.get(name)) for name in every] for shapes in (mine, theirs))
        _compare(first.path, own, other.path, others)
    if bare and len(bare) < len(subjects):
        names = ", ".join(subject.label for subject in bare)
        return [f"{names}: no exits, so the others' were left out and only the networks' own heads are compared"]
    return []


def _compare(path: Path, facts: Sequence[tuple[str, Any]], other: Path, others: Sequence[tuple[str, Any]]) -> None:
    for (name, one), (_, another) in zip(facts, others, strict=True):
        if one != another:
            raise EectlError(
                f"mode-connectivity: {path} has {name} {one}, {other} has {another}; give networks that differ in their "
                "weights alone"
            )


def _facts(about: About, *, heads: bool) -> list[tuple[str, Any]]:
    """Return what a checkpoint's header says of its network's shape, by name."""
    spec = about.spec
    facts = [
        ("backbone", spec.backbone.name),
        ("task", about.task),
        ("input shape", list(spec.input_shape)),
        ("outputs", spec.num_outputs),
    ]
    if heads:
        facts += [("exits after", list(spec.after)), ("exit heads", list(spec.heads)), ("ensembles", spec.combine)]
    return [*facts, ("backbone arguments", dict(spec.backbone.args))]


def _shapes(model: MultiExitModel, *, heads: bool) -> dict[str, list[int]]:
    tensors = model.state_dict() if heads else model.backbone.state_dict()
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def without_heads(subjects: Sequence[Subject]) -> list[MultiExitModel]:
    """Return the networks, without their attached exits where one of them has none."""
    models = [subject.session.checkpoint.model for subject in subjects]
    if all(model.after for model in models):
        return models
    return [MultiExitModel(model.backbone).eval() for model in models]


def common_starts(subjects: Sequence[Subject]) -> list[str]:
    """Note networks that are no independent runs: grown from one checkpoint, or begun with one seed's weights."""
    kin, twins = [], []
    for one, other in combinations(subjects, 2):
        if _ancestors(one) & _ancestors(other):
            kin.append(f"{one.label} and {other.label}")
        elif _recipe_seed(one) == _recipe_seed(other):
            twins.append(f"{one.label} and {other.label}")
    notes = []
    if kin:
        notes.append(f"{'; '.join(kin)}: grown from one checkpoint, so a low barrier between them is near trivial")
    if twins:
        notes.append(f"{'; '.join(twins)}: of one seed, so they began with the same weights and are no independent runs")
    return notes


def _recipe_seed(subject: Subject) -> Any:
    return subject.session.checkpoint.about.recipe["seed"]


def _ancestors(subject: Subject) -> set[str]:
    """Return what identifies the checkpoints that a network grew from.

    They are its own digest, its parent's, and its first phase, whose validation losses tell apart any two that were not one.
    """
    checkpoint = subject.session.checkpoint
    found = {checkpoint.digest} | ({checkpoint.about.parent} if checkpoint.about.parent else set())
    history = checkpoint.about.history
    if history and history[0].get("phase") == 1:
        found.add(repr(sorted((key, value) for key, value in history[0].items() if key not in ("regime", "seconds"))))
    return found
