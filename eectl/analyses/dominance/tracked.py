"""Read gradient dominance as `train --track` measured it: Figure 2's curves from runs' metrics, and how two runs differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eectl.analyses.question import Answer, Subject
from eectl.analyses.tables import Listing, Scalar
from eectl.core.errors import EectlError
from eectl.training.run_folder import RunFolder

_EXITS_ACROSS = 8  # columns that fit 80 characters beside a label


def ask_tracked(subjects: Sequence[Subject]) -> Answer:
    """Read per epoch and exit what the runs of the checkpoints tracked; for two runs, also the difference of their means.

    Raises EectlError for a run that tracked nothing.
    """
    runs = [_read(subject) for subject in subjects]
    means = {run["label"]: run["mean_cosine"] for run in runs}
    prefixes = {run["label"]: run["mean_prefix_cosine"] for run in runs}
    difference = _difference(runs)
    tables = [
        *exit_listing("cosine of the exit's gradient with the total, mean over epochs", means | difference),
        *exit_listing("the same over the blocks that the exit stands on", prefixes),
    ]
    return Answer(
        values={"tracked": True, "runs": runs, "difference": difference},
        records=[record for run in runs for record in _records(run)],
        tables=tables,
        reading=(_finding(means, difference), _limits(runs)),
        notes=tuple(f"{run['label']}: {note}" for run in runs for note in run["notes"]),
    )


def _read(subject: Subject) -> dict[str, Any]:
    """Read one run's curves: `cosine` and `prefix_cosine` [epoch][exit], None for an exit that did not take part."""
    rows = tracked_epochs(subject.session.checkpoint.path)
    kept = [row for row in rows if row["gradient_dominance"]["batches"]]
    num_exits = subject.session.checkpoint.model.num_exits
    found = [row["gradient_dominance"] for row in kept]
    curves = {name: [_spread(each, name, num_exits) for each in found] for name in ("cosine", "prefix_cosine")}
    return {
        "label": subject.label,
        "metrics": str(RunFolder(subject.session.checkpoint.path.parent).metrics),
        "phases": [row["phase"] for row in kept],
        "epochs": [row["epoch"] for row in kept],
        "batches": [each["batches"] for each in found],
        "every": [each["every"] for each in found],
        **curves,
        "norms": [_spread(each, "norms", num_exits) for each in found],
        "mean_cosine": _means(curves["cosine"]),
        "mean_prefix_cosine": _means(curves["prefix_cosine"]),
        "notes": [f"{len(rows) - len(kept)} of {len(rows)} epochs had no measured batch"] if len(kept) < len(rows) else [],
    }


def tracked_epochs(checkpoint: Path) -> list[dict[str, Any]]:
    """Read the epochs that the run of a checkpoint tracked; raises EectlError where it tracked nothing."""
    folder = RunFolder(checkpoint.parent)
    if not folder.metrics.exists():
        raise EectlError(
            f"{checkpoint}: no metrics.jsonl beside it; name a checkpoint in its run's folder, or leave --tracked out"
        )
    rows = [row for row in folder.rows() if row.get("gradient_dominance")]
    if not rows:
        raise EectlError(f"{folder.metrics}: nothing was tracked; train with --track gradient-dominance, or leave --tracked out")
    if not any(row["gradient_dominance"]["batches"] for row in rows):
        raise EectlError(f"{folder.metrics}: no epoch was long enough to measure a batch; train with a smaller --track-every")
    return rows


def _spread(found: Mapping[str, Any], name: str, num_exits: int) -> list[Any]:
    """Put the values of the exits that took part at their places among all."""
    given = dict(zip(found["exits"], found[name], strict=True))
    return [given.get(number) for number in range(1, num_exits + 1)]


def _means(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean over epochs, [exit]; None for an exit that never took part."""
    columns = [[value for value in column if value is not None] for column in zip(*curves, strict=True)]
    return [sum(column) / len(column) if column else None for column in columns]


def _difference(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return, for two runs with as many exits, the second's means less the first's, under a name for the difference."""
    if len(runs) != 2 or len(runs[0]["mean_cosine"]) != len(runs[1]["mean_cosine"]):
        return {}
    first, second = runs
    pairs = zip(first["mean_cosine"], second["mean_cosine"], strict=True)
    differences = [None if one is None or other is None else other - one for one, other in pairs]
    return {f"{second['label']} − {first['label']}": differences}


def _records(run: Mapping[str, Any]) -> list[dict[str, Scalar]]:
    return [
        {
            "label": run["label"],
            "phase": run["phases"][row],
            "epoch": run["epochs"][row],
            "exit": index + 1,
            "cosine": cosine,
            "prefix_cosine": run["prefix_cosine"][row][index],
            "batches": run["batches"][row],
        }
        for row, curve in enumerate(run["cosine"])
        for index, cosine in enumerate(curve)
    ]


def exit_listing(title: str, rows: Mapping[str, Sequence[float | None]]) -> list[Listing]:
    """Make tables with a row per label and a column per exit, as many columns as fit 80 characters."""
    width = max(map(len, rows.values()))
    tables = []
    for start in range(0, width, _EXITS_ACROSS):
        numbers = range(start, min(start + _EXITS_ACROSS, width))
        cells = tuple((label, *(_cell(values, index) for index in numbers)) for label, values in rows.items())
        tables.append(Listing(title, ("exit", *(str(index + 1) for index in numbers)), cells))
    return tables


def _cell(values: Sequence[float | None], index: int) -> str | None:
    value = values[index] if index < len(values) else None
    return None if value is None else f"{value:.3f}"


def leader(values: Sequence[float | None]) -> int:
    """Return the number of the exit with the highest value."""
    known = {number: value for number, value in enumerate(values, 1) if value is not None and value == value}
    return max(known, key=lambda number: known[number])


def leaders(rows: Mapping[str, Sequence[float | None]]) -> str:
    """Name the highest exit of each row: `exit 3 of 8 in joint (0.71), …`."""
    best = {label: leader(values) for label, values in rows.items()}
    return ", ".join(f"exit {k} of {len(rows[label])} in {label} ({rows[label][k - 1]:.2f})" for label, k in best.items())


def _finding(means: Mapping[str, Sequence[float | None]], difference: Mapping[str, Sequence[float | None]]) -> str:
    said = f"Over the tracked epochs the sum that moved the backbone pointed most the way of {leaders(means)}"
    for name, values in difference.items():
        first, last = (f"{value:+.2f}" if value is not None else "unknown" for value in (values[0], values[-1]))
        said += f"; {name} is {first} for the first exit and {last} for the last"
    return said + "."


def _limits(runs: Sequence[Mapping[str, Any]]) -> str:
    counts = ", ".join(f"{sum(run['batches'])} batches in {run['label']}" for run in runs)
    return (
        f"Measured were {counts}, each run is one seed, and a cosine shows agreement and not cause; an early "
        "exit's is below 1 by construction, as it has no gradient past its own block: compare the second table."
    )
