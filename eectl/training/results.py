"""The files that a run leaves for people beside its checkpoint: `results.csv` and `curves.png`, both made of metrics.jsonl."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.console import is_share
from eectl.core.errors import EectlError
from eectl.core.figures import line_style, render
from eectl.core.files import write_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
PER_EXIT = ("train_loss", "validation_loss", "validation_score")
SOMETIMES = ("validation_balanced",)  # in the rows of a run that stops by it


def write_results(csv_path: Path, picture: Path, rows: Sequence[Row], *, score_name: str, title: str) -> str | None:
    """Write the rows of metrics.jsonl as a table and as a picture, both or none; returns why where they could not be written.

    A run is not lost for want of them: its numbers are in metrics.jsonl.

    Args:
        score_name: what the score is: accuracy, F1 or MSE.
        title: stands above the picture.
    """
    try:
        write_all({csv_path: results_table(rows), **draw_curves(picture, rows, score_name=score_name, title=title)})
    except (EectlError, ImportError, OSError, RuntimeError, ValueError) as error:
        return f"{csv_path.name} or {picture.name} could not be written ({error}); the numbers are in metrics.jsonl"
    return None


def results_table(rows: Sequence[Row]) -> str:
    """Return one line per epoch: phase, epoch, step, lr, seconds, improved, and each exit's losses and score.

    Columns of exit k end in `_k`; those that a phase did not have are empty.
    """
    names = (*PER_EXIT, *(name for name in SOMETIMES if any(name in row for row in rows)))
    exits = range(1, 1 + max((len(row["validation_score"]) for row in rows), default=0))
    plain = ("phase", "epoch", "step", "lr", "seconds", "improved")
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow([*plain, *(f"{name}_{number}" for name in names for number in exits)])
    for row in rows:
        values = [row[name][number - 1] if number <= len(row[name]) else None for name in names for number in exits]
        table.writerow([*(row[name] for name in plain), *("" if value is None else value for value in values)])
    return file.getvalue()


def draw_curves(path: Path, rows: Sequence[Row], *, score_name: str, title: str) -> dict[Path, bytes]:
    """Draw each exit's validation loss and score over the epochs of all phases, with a line where a phase begins.

    Returns what `path` is to hold.
    """
    percent = is_share(score_name)
    num_exits = max(len(row["validation_score"]) for row in rows)

    def draw(figure: "Figure") -> None:
        figure.set_size_inches(7.2, 5.6)
        loss, score = figure.subplots(2, 1, sharex=True)
        for axes, name, scale in ((loss, "validation_loss", 1), (score, "validation_score", 100 if percent else 1)):
            for number in range(1, num_exits + 1):
                _line(axes, rows, name, number, num_exits, scale)
            _mark_phases(axes, rows, with_names=axes is loss)
        score.set_xlim(0.5, len(rows) + 0.5)
        score.xaxis.get_major_locator().set_params(integer=True)
        loss.set_ylabel("validation loss")
        score.set_ylabel(f"validation {score_name}{' (%)' if percent else ''}")
        score.set_xlabel("epoch, all phases counted")
        handles, labels = score.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
        figure.suptitle(title, fontsize=10)

    return render([path], draw)


def _line(axes: "Axes", rows: Sequence[Row], name: str, number: int, num_exits: int, scale: float) -> None:
    """Draw exit `number`, from 1; while no exits are attached, the only one is the network's own head, the last of all."""
    places: list[float] = []
    values: list[float] = []
    for index, row in enumerate(rows):
        if index and row["phase"] != rows[index - 1]["phase"]:  # a gap: a phase starts from the best weights of the one before
            places.append(math.nan)
            values.append(math.nan)
        own = number if len(row[name]) == num_exits else 1 if number == num_exits else 0
        value = row[name][own - 1] if own else None
        places.append(index + 1)
        values.append(math.nan if value is None else scale * value)
    label = f"exit {number}" + (" (own head)" if number == num_exits else "")
    every = max(1, len(rows) // 12)
    axes.plot(places, values, label=label, markevery=every, **line_style(number - 1))


def _mark_phases(axes: "Axes", rows: Sequence[Row], *, with_names: bool) -> None:
    for index, row in enumerate(rows):
        if index and row["phase"] == rows[index - 1]["phase"]:
            continue
        if index:
            axes.axvline(index + 0.5, color="0.6", lw=0.8)
        if with_names:
            axes.text(index + 0.6, 1.02, f"phase {row['phase']}", transform=axes.get_xaxis_transform(), fontsize=8, color="0.3")
