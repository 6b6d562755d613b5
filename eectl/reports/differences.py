"""Differences between runs: which may stand in one table, and what each row is called.

Reads recipes as plain data, so that a recipe which this version no longer takes can still be reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eectl.core.errors import EectlError
from eectl.evaluation.results import Evaluation
from eectl.exits.policy import COSTS
from eectl.models.checkpoint import Origin
from eectl.recipe.reading import flatten
from eectl.recipe.recipe import Recipe, start_of

# keys that never name a row: they differ between seeds, or say where a run was made and not what it is
_UNNAMED = frozenset({
    "seed", "regime", "phase", "init", "eval_batch_size", "compile", "deterministic", "channels_last", "cache_features",
    "checkpoint_activations", "data.root", "data.workers", "data.in_memory", "exits.placement", "backbone.pretrained",
    "backbone.weights",
})  # fmt: skip
# keys in which the runs of one table must agree
_MUST_AGREE = ("data.name", "data.split_seed", "data.image_size", "data.channels", "data.text", "data.target", "data.task")
_MUST_AGREE_BELOW = "backbone.name", "backbone.args"


def run_settings(origin: Origin, evaluation: Evaluation) -> dict[str, Any]:
    """Return a run's settings as flat keys such as `optimizer.lr`.

    They are the recipe's, this version's defaults for keys that it lacks, the exits the network really has, and how rows leave.
    """
    found = flatten(Recipe().model_dump(mode="json")) | flatten(origin.recipe)
    found = {key: value for key, value in found.items() if key not in _UNNAMED and value not in (None, {})}
    found.setdefault("backbone.start", start_of(origin.recipe.get("backbone", {})))
    found |= {"exits.after": list(origin.after), "exits.head": "+".join(dict.fromkeys(origin.heads)) or None}
    thresholds = evaluation.search + ("" if evaluation.metric == "score" else f", {evaluation.metric}")
    return found | {"criterion": evaluation.criterion, "thresholds": thresholds}


def check_comparable(runs: Sequence[tuple[str, Mapping[str, Any], Evaluation]]) -> None:
    """Raise EectlError where two of (name, settings, evaluation) do not belong in one table; it names both and the reason."""
    name, own, evaluation = runs[0]
    for other_name, other, other_evaluation in runs[1:]:
        both = f"{name} and {other_name} do not belong in one table"
        for key in [*own, *(key for key in other if key not in own)]:
            fixed = key in _MUST_AGREE or key.startswith(_MUST_AGREE_BELOW)
            if fixed and own.get(key) != other.get(key):
                raise EectlError(f"{both}: {key} is {_text(own.get(key))} and {_text(other.get(key))}; report them apart")
        facts = {
            "task": (evaluation.task, other_evaluation.task),
            "the split": (evaluation.split, other_evaluation.split),
            "the thresholds' protocol": (evaluation.protocol, other_evaluation.protocol),
            "the fingerprint of the test rows": (_short(evaluation.fingerprint), _short(other_evaluation.fingerprint)),
            "the number of test rows": (evaluation.num_rows, other_evaluation.num_rows),
            "the cost of a row": (_cost(evaluation), _cost(other_evaluation)),
        }
        if evaluation.cost == "macs":  # times are each network's own
            facts["the plain backbone's cost"] = evaluation.plain_cost, other_evaluation.plain_cost
        for what, (mine, theirs) in facts.items():
            if mine != theirs:
                raise EectlError(f"{both}: {what} is {mine} and {theirs}; report them apart, or evaluate them alike")


def _cost(evaluation: Evaluation) -> str:
    """Say what costs are counted in, and where times were measured."""
    return COSTS[evaluation.cost] + (f" on {evaluation.measured}" if evaluation.measured else "")


def _short(fingerprint: str | None) -> str:
    return f"{fingerprint[:12]}…" if fingerprint else "unknown"


def labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each run by the keys in which the runs differ, such as `lr=0.1, head=linear`; empty where none differs."""
    keys = list(dict.fromkeys(key for each in found for key in each))
    differing = [key for key in keys if any(each.get(key) != found[0].get(key) for each in found)]
    names = _names(differing)
    return [", ".join(f"{names[key]}={_text(each.get(key))}" for key in differing) for each in found]


def _names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest clear name of each key: its last word, and as many before it as tell it from the others.

    A `name` is called by its section: `optimizer`, not `optimizer.name`.
    """
    paths = {key: key.removesuffix(".name").split(".") for key in keys}
    names = {}
    for key, path in paths.items():
        others = [other for each, other in paths.items() if each != key]
        length = next((n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others)), len(path))
        names[key] = ".".join(path[-length:])
    return names


def _text(value: Any) -> str:
    """Write a setting's value in short: lists with commas, numbers without trailing zeros."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
