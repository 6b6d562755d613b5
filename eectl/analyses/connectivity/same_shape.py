"""Check that networks differ in their weights alone, and note those that grew from one start. Runs no network."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from eectl.analyses.question import Subject
from eectl.core.errors import EectlError
from eectl.models.multi_exit import MultiExitModel


def check_alike(subjects: Sequence[Subject]) -> list[str]:
    """Check that networks can lie on one line; return a note where exits are left out because some network has none.

    Raises EectlError that names the first fact in which two networks differ.
    """
    first = subjects[0]
    bare = [subject for subject in subjects if not _spec(subject).after]
    for other in subjects[1:]:
        facts = zip(_facts(first, heads=not bare), _facts(other, heads=not bare), strict=True)
        for (name, one), (_, another) in facts:
            if one != another:
                raise EectlError(
                    f"mode-connectivity: {first.session.checkpoint.path} has {name} {one}, {other.session.checkpoint.path} has "
                    f"{another}; give networks that differ in their weights alone"
                )
    if bare and len(bare) < len(subjects):
        names = ", ".join(subject.label for subject in bare)
        return [f"{names}: no exits, so the others' were left out and only the networks' own heads are compared"]
    return []


def _spec(subject: Subject) -> Any:
    return subject.session.checkpoint.about.spec


def _facts(subject: Subject, *, heads: bool) -> list[tuple[str, Any]]:
    spec, about = _spec(subject), subject.session.checkpoint.about
    facts = [
        ("backbone", spec.backbone.name),
        ("task", about.task),
        ("input shape", list(spec.input_shape)),
        ("outputs", spec.num_outputs),
    ]
    if heads:
        facts += [("exits after", list(spec.after)), ("exit heads", list(spec.heads)), ("ensembles", spec.combine)]
    model = subject.session.checkpoint.model
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(model, heads=heads).items()}
    return [*facts, ("backbone arguments", dict(spec.backbone.args)), ("weights", shapes)]


def _tensors(model: MultiExitModel, *, heads: bool) -> Mapping[str, Any]:
    return model.state_dict() if heads else model.backbone.state_dict()


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
