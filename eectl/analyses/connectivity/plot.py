"""Draw mode connectivity: the lines between two networks, or the barriers of all pairs as maps (paper's Figure 3)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eectl.analyses.question import Answer
from eectl.core.console import is_share
from eectl.core.figures import DASHES, exit_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PATHS = {"naive": "as they are", "matched": "units matched"}
_STYLES: dict[str, Any] = {"naive": DASHES[1], "matched": DASHES[0]}
_LIGHT = 0.6  # cells below this share of the scale get white digits


def draw_connectivity(figure: "Figure", answer: Answer, labels: Sequence[str]) -> None:
    """Draw a connectivity answer into `figure`: lines for two networks, maps for more."""
    if len(labels) == 2:
        _draw_lines(figure, answer.values, labels)
    else:
        _draw_maps(figure, answer.values, labels)


def _draw_lines(figure: "Figure", values: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Draw loss above and score below, train left and test right: a thin line per exit, a bold one for their mean."""
    figure.set_size_inches(8.0, 6.6)
    pair, shares = values["pairs"][0], values["lambdas"]
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    name, scale = (f"{values['score']}, %", 100.0) if is_share(values["score"]) else (f"{values['score']}, lower is better", 1.0)
    for row, (what, label, factor) in enumerate((("loss", "loss", 1.0), ("score", name, scale))):
        for axes, split in zip(grid[row], ("train", "test"), strict=True):
            for path in _PATHS:
                curves = [[factor * value for value in point] for point in pair["paths"][path][split][what]]
                _draw_path(axes, shares, curves, path)
            axes.grid(axis="y", color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
            if row == 0:
                axes.set_title(f"{split}, {values['samples'][split]} rows", fontsize=10, loc="left")
        grid[row][0].set_ylabel(label)
    for axes in grid[1]:
        axes.set_xlabel("λ, the share of the second network")
        axes.set_xticks([0, 0.5, 1], [f"0\n{_short(labels[0])}", "0.5", f"1\n{_short(labels[1])}"], fontsize=8)
        for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            tick.set_horizontalalignment(side)
    _draw_legend(figure, num_exits=len(pair["paths"]["naive"]["test"]["loss"][0]), moved=pair["matching"]["moved"])


def _draw_path(axes: "Axes", shares: Sequence[float], curves: Sequence[Sequence[float]], path: str) -> None:
    num_exits = len(curves[0])
    for index, values in enumerate(zip(*curves, strict=True)):
        axes.plot(shares, values, color=exit_colour(index, num_exits), ls=_STYLES[path], lw=1.0)
    if num_exits > 1:
        axes.plot(shares, [sum(point) / num_exits for point in curves], color="black", ls=_STYLES[path], lw=2.0)


def _draw_legend(figure: "Figure", *, num_exits: int, moved: int) -> None:
    """Say which colour is which exit, and which dash is which line; where no unit moved, that the two lines are one."""
    from matplotlib.lines import Line2D

    paths = [Line2D([], [], color="black", ls=_STYLES[path], lw=1.2, label=name) for path, name in _PATHS.items()]
    mean = [Line2D([], [], color="black", lw=2.0, label="mean over exits")] if num_exits > 1 else []
    exits = [Line2D([], [], color=exit_colour(index, num_exits), lw=1.4, label=f"exit {index + 1}") for index in range(num_exits)]
    same = None if moved else "matching changed nothing: no unit moved, so both lines are the same"
    handles = [*paths, *mean, *exits]
    figure.legend(handles=handles, title=same, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9,
                  handlelength=3, title_fontsize=9)  # fmt: skip


def _draw_maps(figure: "Figure", values: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Draw the mean barriers on both splits, as the networks are and matched, on one scale."""
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
            same = path == "matched" and not any(pair["matching"]["moved"] for pair in values["pairs"])
            axes.set_title(f"{name}, {split}" + (" (none moved)" if same else ""), fontsize=10, loc="left")
            axes.set_xticks(range(len(labels)), [_short(label) for label in labels], rotation=45, ha="right")
            axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(grid.flat), shrink=0.6, pad=0.02, label="loss barrier, mean over exits")


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"…{label[-23:]}"
