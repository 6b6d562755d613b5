"""Pictures of mode connectivity: the lines between two networks, or the barriers of all pairs as maps (paper's Figure 3)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eectl.analyses.question import Answer
from eectl.core.figures import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PATHS = {"naive": "as they are", "matched": "units matched"}
_LIGHT = 0.6  # cells below this share of the scale get white digits


def draw_connectivity(figure: "Figure", answer: Answer, labels: Sequence[str]) -> None:
    """Draw the Answer of `analyses.connectivity` into `figure`."""
    if len(labels) == 2:
        _draw_lines(figure, answer.values, labels)
    else:
        _draw_maps(figure, answer.values, labels)


def _draw_lines(figure: "Figure", values: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Loss above, score below; train left, test right; a thin line per exit and a bold one for their mean."""
    figure.set_size_inches(8.0, 6.2)
    pair, shares = values["pairs"][0], values["lambdas"]
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (what, name) in enumerate((("loss", "loss"), ("score", values["score"]))):
        for axes, split in zip(grid[row], ("train", "test"), strict=True):
            for index, path in enumerate(_PATHS):
                _draw_path(axes, shares, pair["paths"][path][split][what], index, _PATHS[path])
            axes.grid(axis="y", color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
            if row == 0:
                axes.set_title(f"{split}, {values['samples'][split]} rows", fontsize=10, loc="left")
        grid[row][0].set_ylabel(name)
    for axes in grid[1]:
        axes.set_xlabel("λ")
        axes.set_xticks([0, 0.5, 1], [f"0\n{_short(labels[0])}", "0.5", f"1\n{_short(labels[1])}"])
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _draw_path(axes: "Axes", shares: Sequence[float], curves: Sequence[Sequence[float]], index: int, name: str) -> None:
    style = line_style(index)
    for losses in zip(*curves, strict=True):
        axes.plot(shares, losses, color=style["color"], lw=0.7, alpha=0.4)
    means = [sum(values) / len(values) for values in curves]
    axes.plot(shares, means, label=f"{name} (bold: mean over exits)", **(style | {"lw": 2.2}))


def _draw_maps(figure: "Figure", values: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Mean barriers on both splits, as the networks are and matched, on one scale."""
    size = 1.5 + 0.62 * len(labels)
    figure.set_size_inches(2 * size + 1.4, 2 * size)
    maps = values["barriers"]
    highest = max(value for path in maps.values() for rows in path.values() for row in rows for value in row) or 1.0
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, split in zip(grid, ("train", "test"), strict=True):
        for axes, (path, name) in zip(line, _PATHS.items(), strict=True):
            rows = maps[path][split]
            image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=highest)
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    if x != y:
                        colour = "white" if value < _LIGHT * highest else "black"
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
            axes.set_title(f"{name}, {split}", fontsize=10, loc="left")
            axes.set_xticks(range(len(labels)), [_short(label) for label in labels], rotation=45, ha="right")
            axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(grid.flat), shrink=0.6, pad=0.02, label="loss barrier, mean over exits")


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"…{label[-23:]}"
