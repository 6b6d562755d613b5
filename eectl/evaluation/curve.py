"""The picture of an evaluation: accuracy against mean cost. Draws what was computed and needs no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.errors import EectlError
from eectl.core.figures import render, title
from eectl.evaluation.results import Evaluation
from eectl.exits.policy import COSTS
from eectl.models.losses import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FORMATS = ("png", "pdf", "svg")
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1601f", "#6b6b6b"
_LABEL_GAP = 2.2  # % of the width below which an exit's number would touch its neighbour's


def check_plot_path(path: Path) -> None:
    """Raise EectlError for a suffix that is not one of PLOT_FORMATS; worth asking before the expensive pass."""
    if path.suffix[1:].lower() not in PLOT_FORMATS:
        raise EectlError(f"--plot {path}: allowed are files that end in .{', .'.join(PLOT_FORMATS)}")


def plot_curve(path: Path, result: Evaluation, *, paper: bool = False) -> dict[Path, bytes]:
    """Draw accuracy (or MSE) against the mean cost in % of the plain backbone; returns what `path` is to hold.

    The line is the whole sweep on the same split: a diagnostic, since nobody may choose on it. Budgets are vertical lines, dots
    the exits on their own, diamonds the policies. `paper` leaves the title out. PNG, PDF or SVG by the suffix; raises EectlError
    for another.
    """
    check_plot_path(path)
    return render([path], lambda figure: _draw(figure, result, paper=paper))


def _draw(figure: "Figure", result: Evaluation, *, paper: bool) -> None:
    scale = 1.0 if TASKS[result.task].predicts_number else 100.0
    axes = figure.add_subplot()
    shares = [100 * cost / result.plain_cost for cost in result.curve.mean_costs]
    values = [scale * value for value in result.curve.values]
    axes.plot(shares, values, color=_BLUE, lw=1.2, alpha=0.55, label=f"any threshold ({result.split} split)", zorder=2)
    _draw_exits(axes, result, scale)
    _draw_policies(axes, result, scale)
    _dress(axes, result, scale)
    title(figure, _title(result), paper=paper)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _title(result: Evaluation) -> str:
    recipe = result.origin.recipe
    what = "".join(f"{recipe[section]['name']}, " for section in ("data", "backbone") if section in recipe)
    return f"{what}{result.split} split, {result.num_rows:,} rows, {result.criterion}"


def _draw_exits(axes: "Axes", result: Evaluation, scale: float) -> None:
    shares = [100 * entry.cost / result.plain_cost for entry in result.exits]
    values = [scale * entry.value for entry in result.exits]
    axes.plot(shares, values, "o", color=_GREY, ms=5, label="every row at one exit", zorder=3)
    shift = -11 if TASKS[result.task].higher_is_better else 11  # the curve runs on the better side of the dots
    style: dict[str, Any] = {"fontsize": 8, "color": _GREY, "ha": "center", "va": "center", "textcoords": "offset points"}
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85}
    for index in readable(shares, _LABEL_GAP * max(shares) / 100):
        axes.annotate(str(index + 1), (shares[index], values[index]), xytext=(0, shift), **style)


def readable(places: Sequence[float], gap: float) -> list[int]:
    """Return the indexes whose labels keep `gap` between each other; the last one is always among them."""
    kept: list[int] = []
    for index in reversed(range(len(places))):
        if all(abs(places[index] - places[other]) >= gap for other in kept):
            kept.append(index)
    return kept


def _draw_policies(axes: "Axes", result: Evaluation, scale: float) -> None:
    reached = [entry for entry in result.budgets if entry.budget is not None and entry.value is not None]
    shares = [100 * (entry.mean_cost or 0) / result.plain_cost for entry in reached]
    values = [scale * (entry.value or 0) for entry in reached]
    axes.plot(shares, values, "D", color=_ORANGE, ms=6.5, mec="white", mew=0.8, label=f"{result.protocol} for a budget", zorder=4)


def _dress(axes: "Axes", result: Evaluation, scale: float) -> None:
    budgets = [entry.budget for entry in result.budgets if entry.budget is not None]
    for budget in budgets:
        axes.axvline(budget, color=_ORANGE, lw=0.8, ls=(0, (2, 3)), zorder=1)
    dearest = 100 * result.exits[-1].cost / result.plain_cost
    axes.set_xlim(0, 1.03 * max([dearest, *(budget for budget in budgets if budget <= 1.5 * dearest)]))
    axes.margins(y=0.12)
    top = axes.secondary_xaxis("top")
    shown = [budgets[index] for index in readable(budgets, 11 * dearest / 100) if budgets[index] <= axes.get_xlim()[1]]
    top.set_xticks(shown, [f"{budget:g} %" for budget in shown], color=_ORANGE, fontsize=9)
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    axes.spines["top"].set_visible(False)
    name = TASKS[result.task].score_name
    axes.set_ylabel(f"{name}, %" if scale > 1 else f"{name}, lower is better")
    axes.set_xlabel(f"mean cost of a row, % of the plain backbone's {COSTS[result.cost]} (budgets on top)")
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
