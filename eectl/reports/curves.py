"""Picture of a comparison of runs: a curve per row with a band over its seeds. Draws what was computed, needs no display."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.figures import COLOURS, DASHES, MARKERS
from eectl.core.files import replacing
from eectl.evaluation.curve import check_plot_path
from eectl.exits.policy import COSTS
from eectl.models.losses import TASKS
from eectl.reports.compare import Comparison, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(path: Path, comparison: Comparison) -> None:
    """Draw each row's curve with a band of ± one standard deviation over its seeds, as PNG, PDF or SVG by the suffix.

    The curves are the whole sweep on the test split (paper, Appendix D), the marks the table's numbers at the budgets, at the
    mean cost they really had. All evaluations must have a curve. Raises EectlError for another suffix.
    """
    check_plot_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    scale = 100.0 if TASKS[comparison.task].score_name == "accuracy" else 1.0
    with matplotlib.rc_context({"font.size": 10, "axes.spines.right": False, "axes.spines.top": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 5.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for index, (row, (colour, dashes)) in enumerate(zip(comparison.rows, _styles(comparison), strict=True)):
            found = band(row.evaluations)
            shares, means, stds = 100 * found.shares, scale * found.means, scale * found.stds
            name = " ".join(filter(None, (row.regime, row.label))) + f" ({len(row.seeds)})"
            marks = [(100 * cell.share, scale * cell.mean) for cell in row.cells if cell is not None]
            line: dict[str, Any] = {"color": colour, "ls": dashes, "lw": 1.5, "label": name, "drawstyle": "steps-post"}
            line |= {"marker": MARKERS[index % len(MARKERS)], "ms": 5, "mec": "white", "mew": 0.7, "markevery": []}
            if len(row.seeds) > 1:
                axes.fill_between(shares, means - stds, means + stds, step="post", color=colour, alpha=0.18, lw=0, zorder=1)
            axes.plot(shares, means, **line, zorder=3)
            if marks:
                axes.plot(*zip(*marks, strict=True), color=colour, **_mark(line), zorder=4)
        _dress_comparison(axes, comparison, scale)
        columns = 3 if max(len(f"{row.label}{row.regime}") for row in comparison.rows) < 22 else 2
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower())


def _mark(line: dict[str, Any]) -> dict[str, Any]:
    return {"ls": "none"} | {name: line[name] for name in ("marker", "ms", "mec", "mew")}


def _styles(comparison: Comparison) -> list[tuple[str, Any]]:
    """A colour and a dash pattern for each row: colours tell regimes apart and dashes settings, or colours what there is."""
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
    chosen = "authors' lookup" if comparison.lookup == "average-first" else f"{comparison.protocol} thresholds"
    axes.set_title(
        f"{comparison.data}, {comparison.backbone}; lines: any threshold ({comparison.split} split), marks: {chosen}\n"
        "bands: ± one standard deviation over seeds (how many in brackets)",
        fontsize=9,
        loc="left",
    )
    axes.set_xlim(left=0)
    axes.margins(y=0.05)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
