"""Draw loss landscapes: contours and a surface per network on one scale, or lines where there is one direction."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eectl.core.figures import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 4  # below and above this much of the smallest loss, levels would crowd
_CLOSE = 50  # the largest loss is less than this many times the smallest
_EDGE, _CENTRE, _APART = 0.86, 0.24, 0.34  # of the span: how labels of contours keep off the edges, the centre and each other
_MAP = "viridis"


def draw_landscape(figure: "Figure", answer: Any, labels: Sequence[str]) -> None:
    """Draw a landscape's answer into `figure`: the total, the first, the middle and the last exit of each network."""
    networks, coordinates = answer.values["networks"], answer.values["coordinates"]
    if isinstance(networks[0]["total"]["loss"][0], list):
        _draw_planes(figure, networks, coordinates, labels)
    else:
        _draw_lines(figure, networks, coordinates, labels)


def _columns(network: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Return a network's panels, loss by title; the other exits are in the JSON alone."""
    exits = network["exits"]
    count = len(exits)
    chosen = dict.fromkeys((0, (count - 1) // 2, count - 1)) if count > 1 else ()
    titles = {"total (mean over exits)" if count > 1 else "loss": network["total"]["loss"]}
    return titles | {f"exit {index + 1} of {count}": exits[index]["loss"] for index in chosen}


def _draw_planes(
    figure: "Figure", networks: Sequence[Mapping[str, Any]], coordinates: Sequence[float], labels: Sequence[str]
) -> None:
    from matplotlib.colors import LogNorm

    columns = [_columns(network) for network in networks]
    levels = _levels([loss for each in columns for loss in each.values()])
    norm = LogNorm(levels[0], levels[-1])
    across = max(map(len, columns)) + 1
    figure.set_size_inches(0.9 + 2.45 * across, 0.9 + 2.5 * len(networks))
    grid = figure.add_gridspec(len(networks), across, width_ratios=[1] * (across - 1) + [1.25])
    flat = []
    for row, (each, label) in enumerate(zip(columns, labels, strict=True)):
        for column, (title, loss) in enumerate(each.items()):
            axes = figure.add_subplot(grid[row, column])
            image = _contours(axes, coordinates, loss, levels, norm)
            axes.set_title(title if column else f"{label}\n{title}", fontsize=9, loc="left")
            flat.append(axes)
            if row == len(columns) - 1:
                axes.set_xlabel("direction 1", fontsize=9)
            if column == 0:
                axes.set_ylabel("direction 2", fontsize=9)
        relief = figure.add_subplot(grid[row, across - 1], projection="3d")
        _surface(relief, coordinates, next(iter(each.values())), levels, norm)
        relief.set_title(next(iter(each)).partition(" ")[0] + " in relief", fontsize=9, y=1.0)
        flat.append(relief)
    bar = figure.colorbar(image, ax=flat, shrink=0.7, pad=0.02, aspect=30, location="right")
    bar.set_ticks(levels, labels=[f"{level:g}" for level in levels])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label("mean loss, log scale; white: not finite", fontsize=8)


def _levels(surfaces: Sequence[Sequence[Any]]) -> list[float]:
    """Return round levels (1, 2, 5, 10, …) around all losses, at most _DECADES of them; denser where losses are close."""
    known = [value for surface in surfaces for row in surface for value in row if value is not None and value > 0]
    low, high = (min(known), max(known)) if known else (0.1, 1.0)
    high = min(high, low * 10**_DECADES)
    mantissas = (1, 2, 5) if high > _CLOSE * low else (1, 1.4, 2, 3, 4, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
    first = max((index for index, step in enumerate(steps) if step <= low), default=0)
    last = next((index for index, step in enumerate(steps) if step >= high), len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _masked(loss: Sequence[Any], levels: Sequence[float]) -> Any:
    """Return losses as an array [direction 2, direction 1]: not finite is masked, off the scale lies at its end."""
    import numpy as np

    values = np.array([[float("nan") if value is None else value for value in row] for row in loss], dtype=np.float64).T
    return np.ma.masked_invalid(np.clip(values, levels[0], levels[-1]))


def _contours(axes: "Axes", coordinates: Sequence[float], loss: Sequence[Any], levels: Sequence[float], norm: Any) -> Any:
    values = _masked(loss, levels)
    image = axes.contourf(coordinates, coordinates, values, levels=levels, norm=norm, cmap=_MAP)
    lines = axes.contour(coordinates, coordinates, values, levels=levels, colors="white", linewidths=0.6)
    axes.clabel(lines, fmt="%g", fontsize=6.5, manual=_label_places(lines.allsegs, coordinates[-1]))
    axes.plot(0, 0, "+", color="#d55e00", ms=7, mew=1.4)
    axes.set_aspect("equal")
    ends = [coordinates[0], 0, coordinates[-1]]
    axes.set_xticks(ends)
    axes.set_yticks(ends)
    axes.tick_params(labelsize=8)
    return image


def _label_places(contours: Sequence[Sequence[Any]], span: float) -> list[tuple[float, float]]:
    """Choose where contours are labelled: at most once each, off the edges and the centre, and apart from each other.

    `contours` has the lines of each level as arrays [point, (x, y)]. Levels that find no such place go without; the colour bar
    has all of them.
    """
    import numpy as np

    chosen: list[tuple[float, float]] = []
    for lines in contours:
        points = np.concatenate([np.empty((0, 2)), *lines])
        inside = (np.abs(points) < _EDGE * span).all(axis=1) & (np.hypot(*points.T) > _CENTRE * span)
        points = points[inside]
        if not len(points):
            continue
        distances = np.min([np.hypot(*(points - place).T) for place in chosen], axis=0) if chosen else points[:, 1]
        best = int(distances.argmax())
        if not chosen or distances[best] > _APART * span:
            chosen.append((float(points[best, 0]), float(points[best, 1])))
    return chosen


def _surface(axes: Any, coordinates: Sequence[float], loss: Sequence[Any], levels: Sequence[float], norm: Any) -> None:
    """Draw the first panel once more, in relief, on the same scale."""
    import matplotlib
    import numpy as np

    values = np.ma.filled(np.log10(_masked(loss, levels)), np.nan)
    x, y = np.meshgrid(coordinates, coordinates)
    faces = (values[1:, 1:] + values[1:, :-1] + values[:-1, 1:] + values[:-1, :-1]) / 4  # its colour would be a corner's
    colours = matplotlib.colormaps[_MAP](norm(10**faces))
    axes.plot_surface(x, y, values, facecolors=colours, rstride=1, cstride=1, linewidth=0, antialiased=True, shade=False)
    axes.set_zlim(np.log10(levels[0]), np.log10(levels[-1]))
    decades = [level for level in levels if f"{level:e}".startswith("1.0")] or [levels[0], levels[-1]]
    axes.set_zticks(np.log10(decades), [f"{level:g}" for level in decades])
    axes.set_xticks([coordinates[0], 0, coordinates[-1]])
    axes.set_yticks([coordinates[0], 0, coordinates[-1]])
    axes.tick_params(labelsize=7, pad=-2)
    axes.tick_params(axis="z", pad=2)
    axes.set_box_aspect(None, zoom=0.92)  # the labels of the axes are cut off otherwise
    axes.view_init(elev=28, azim=-60)


def _draw_lines(
    figure: "Figure", networks: Sequence[Mapping[str, Any]], coordinates: Sequence[float], labels: Sequence[str]
) -> None:
    """Draw a panel for the total and for each chosen exit by its place, a line per network."""
    columns = [_columns(network) for network in networks]
    count = max(map(len, columns))
    figure.set_size_inches(1.0 + 2.9 * count, 3.9)
    grid = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for index, (each, label) in enumerate(zip(columns, labels, strict=True)):
        for axes, loss in zip(grid, each.values(), strict=False):
            values = [float("nan") if value is None else value for value in loss]
            axes.plot(coordinates, values, **line_style(index), label=label)
    fullest = max(columns, key=len)
    alike = len({len(network["exits"]) for network in networks}) == 1
    places = ["total (mean over exits)", "first exit", "middle exit", "last exit"]
    for axes, title in zip(grid, fullest if alike else places, strict=False):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yscale("log")
        axes.set_xlabel("distance along the direction")
        axes.grid(axis="y", color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
    grid[0].set_ylabel("mean loss, log scale")
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
