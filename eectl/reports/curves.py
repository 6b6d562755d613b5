"""Draw a comparison of runs: a curve per row with a band over its seeds. Needs no display."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eectl.core.figures import COLOURS, DASHES, MARKERS, render, title
from eectl.evaluation.curve import check_plot_path
from eectl.evaluation.results import Evaluation
from eectl.exits.policy import COSTS
from eectl.models.losses import TASKS
from eectl.reports.comparison import Comparison
from eectl.reports.lookups import OVER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Band:
    """A row's curve: at each share of the plain cost, mean and std of the value over seeds (0 with one seed)."""

    shares: Any
    means: Any
    stds: Any


def band(evaluations: Sequence[Evaluation], *, num_points: int = 400) -> Band:
    """Average the curves of a row's seeds on one grid of costs.

    A network reaches only some costs, so a seed's curve is a step function: what it gives for a cost is the value of its dearest
    operating point within that cost. The grid begins where every seed has one, and ends at the dearest point of any.
    """
    curves = [(np.asarray(each.curve.mean_costs) / each.plain_cost, np.asarray(each.curve.values))
              for each in evaluations if each.curve is not None]  # fmt: skip
    assert len(curves) == len(evaluations)
    shares = np.linspace(max(costs[0] for costs, _ in curves), max(costs[-1] for costs, _ in curves), num_points)
    values = np.stack([curve[np.searchsorted(costs, shares + OVER, side="right") - 1] for costs, curve in curves])
    stds = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(shares)
    return Band(shares, values.mean(axis=0), stds)


def plot_comparison(path: Path, comparison: Comparison, *, paper: bool = False) -> dict[Path, bytes]:
    """Draw each row's curve with a band of ± one standard deviation over its seeds; returns what `path` is to hold.

    The curves are the whole sweep on the test split (paper, Appendix D), the markers the table's numbers at the budgets, at the
    mean cost they really had. `paper` leaves the title out. PNG, PDF or SVG by the suffix; raises EectlError for another.
    """
    check_plot_path(path)
    return render([path], lambda figure: _draw(figure, comparison, paper=paper))


def _draw(figure: "Figure", comparison: Comparison, *, paper: bool) -> None:
    scale = 1.0 if TASKS[comparison.task].predicts_number else 100.0
    figure.set_size_inches(7.2, 5.0)
    axes = figure.add_subplot()
    for index, (row, (colour, dashes)) in enumerate(zip(comparison.rows, _styles(comparison), strict=True)):
        found = band(row.evaluations)
        shares, means, stds = 100 * found.shares, scale * found.means, scale * found.stds
        name = " ".join(filter(None, (row.regime, row.label))) + f" ({len(row.seeds)})"
        marked = [(100 * cell.share, scale * cell.mean) for cell in row.cells if cell is not None]
        marker: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "ms": 5.5, "mec": "white", "mew": 0.7}
        line = {"color": colour, "ls": dashes, "lw": 1.5, "label": name, "drawstyle": "steps-post", "markevery": []}
        if len(row.seeds) > 1:
            axes.fill_between(shares, means - stds, means + stds, step="post", color=colour, alpha=0.18, lw=0, zorder=1)
        axes.plot(shares, means, **line, **marker, zorder=3)
        if marked:
            axes.plot(*zip(*marked, strict=True), color=colour, ls="none", **marker, zorder=4)
    _dress_comparison(axes, comparison, scale)
    columns = 3 if max(len(f"{row.label}{row.regime}") for row in comparison.rows) < 22 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3)
    chosen = "authors' lookup" if comparison.lookup == "average-first" else f"{comparison.protocol} thresholds"
    title(
        figure,
        f"{comparison.data}, {comparison.backbone}; lines: any threshold ({comparison.split} split), markers: {chosen}\n"
        "bands: ± one standard deviation over seeds (how many in brackets)",
        paper=paper,
    )


def _styles(comparison: Comparison) -> list[tuple[str, Any]]:
    """Return a colour and a dash pattern for each row.

    Colours tell regimes apart and dashes tell settings; where all rows have one regime, colours tell settings.
    """
    regimes = list(dict.fromkeys(row.regime for row in comparison.rows))
    labels = list(dict.fromkeys(row.label for row in comparison.rows))
    if len(regimes) == 1:
        return [(COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]) for index in range(len(labels))]
    return [
        (COLOURS[regimes.index(row.regime) % len(COLOURS)], DASHES[labels.index(row.label) % len(DASHES)])
        for row in comparison.rows
    ]


def _dress_comparison(axes: "Axes", comparison: Comparison, scale: float) -> None:
    name = TASKS[comparison.task].score_name
    axes.set_ylabel(f"{name}, %" if scale > 1 else f"{name}, lower is better")
    axes.set_xlabel(f"mean cost of a row, % of the plain backbone's {COSTS[comparison.cost]}")
    axes.set_xlim(left=0)
    axes.margins(y=0.05)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
