"""Draw gradient dominance: networks against exits as a map with its numbers, and the curves while training (Figure 2)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eectl.analyses.question import Answer
from eectl.core.figures import MARKERS, exit_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_dominance(figure: "Figure", answer: Answer, labels: Sequence[str]) -> None:
    """Draw a dominance answer into `figure`: maps for finished networks, curves for tracked runs."""
    if answer.values["tracked"]:
        _draw_tracked(figure, answer.values["runs"], answer.values["difference"])
    else:
        _draw_maps(figure, answer.values["networks"], labels)


def _draw_maps(figure: "Figure", networks: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    width = max(len(one["cosine"]["mean"]) for one in networks)
    figure.set_size_inches(max(5.5, 2.2 + 0.62 * width), 2.4 + 0.72 * len(networks))
    titles = {
        "cosine": "cosine of each exit's gradient with the total",
        "prefix_cosine": "the same over the blocks that the exit stands on",
    }
    scale, norm = _scale([value for one in networks for name in titles for value in one[name]["mean"]])
    for axes, (name, heading) in zip(figure.subplots(2, 1, sharex=True), titles.items(), strict=True):
        rows = [[*one[name]["mean"], *[float("nan")] * (width - len(one[name]["mean"]))] for one in networks]
        image = axes.imshow(rows, cmap=scale, norm=norm, aspect="auto")
        for y, (row, one) in enumerate(zip(rows, networks, strict=True)):
            for x, value in enumerate(row):
                if value == value:
                    spread = one[name]["sd"][x]
                    text = f"{value:.2f}" + (f"\n±{spread:.2f}" if spread == spread else "")
                    red, green, blue, _ = scale(norm(value))
                    colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
                    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_title(heading, fontsize=10, loc="left")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks(range(width), [str(index + 1) for index in range(width)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("exit (± standard deviation over batches)")
    figure.colorbar(image, ax=figure.axes[:2], shrink=0.9, pad=0.02)


def _scale(cosines: Sequence[float]) -> tuple[Any, Any]:
    """Return colours and their norm for the range of the cosines, to the next tenth; about 0 where some are negative."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    known = [value for value in cosines if value == value]
    low, high = math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10
    if low < 0:
        most = max(-low, high)
        return colormaps["RdBu_r"], Normalize(-most, most)
    return colormaps["YlGnBu"], Normalize(low, max(high, low + 0.1))


def _draw_tracked(figure: "Figure", runs: Sequence[Mapping[str, Any]], difference: Mapping[str, Sequence[float | None]]) -> None:
    """Draw a panel per run, two or three in a row, all on one scale, and one for the difference of two runs."""
    count = len(runs) + len(difference)
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    figure.set_size_inches(1.2 + 3.4 * columns, 1.0 + 3.0 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    most = max(len(run["mean_cosine"]) for run in runs)
    known = [value for run in runs for curve in run["cosine"] for value in curve if value is not None]
    low, high = min(known), max(known)
    edge = 0.06 * max(high - low, 0.01)
    for axes, run in zip(grid, runs, strict=False):
        _draw_run(axes, run, most)
        axes.set_ylim(low - edge, high + edge)
        axes.set_title(run["label"], fontsize=10, loc="left")
    for axes, (name, values) in zip(grid[len(runs) :], difference.items(), strict=False):
        _draw_difference(axes, name, values)
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[: len(runs) : columns]:
        axes.set_ylabel("cosine with the total gradient")
    widest = max(runs, key=lambda run: len(run["mean_cosine"]))
    handles = grid[list(runs).index(widest)].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(most, 10), frameon=False, fontsize=9, title="exit")


def _draw_run(axes: "Axes", run: Mapping[str, Any], most: int) -> None:
    """Draw a line per exit over the epochs of the tracked phases, one after the other; thin lines mark where phases begin."""
    from matplotlib.ticker import MaxNLocator

    places = _places(run)
    for index in range(len(run["mean_cosine"])):
        values = [float("nan") if curve[index] is None else curve[index] for curve in run["cosine"]]
        axes.plot(places, values, label=str(index + 1), **_exit_style(index, most))
    for place, before, after in zip(places[1:], run["phases"], run["phases"][1:], strict=False):
        if before != after:
            axes.axvline(place - 0.5, color="#b0b0b0", lw=0.8, ls=(0, (2, 3)))
    axes.set_xlabel("epoch" if len(set(run["phases"])) == 1 else "epoch, phases one after the other")
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def _places(run: Mapping[str, Any]) -> list[int]:
    """Return epochs, counted on through the tracked phases."""
    places, done, last = [], 0, 0
    for row, (phase, epoch) in enumerate(zip(run["phases"], run["epochs"], strict=True)):
        if row and phase != run["phases"][row - 1]:
            done += last
        places.append(done + epoch)
        last = epoch
    return places


def _exit_style(index: int, most: int) -> dict[str, Any]:
    """Return colour and marker of an exit's line; markers are for readers who see no colours."""
    return {"color": exit_colour(index, most), "marker": MARKERS[index % len(MARKERS)], "lw": 1.4, "ms": 4}


def _draw_difference(axes: "Axes", name: str, values: Sequence[float | None]) -> None:
    for index, value in enumerate(values):
        if value is not None:
            axes.bar(index + 1, value, color=_exit_style(index, len(values))["color"], width=0.75)
            axes.annotate(f"{value:+.2f}", (index + 1, value), xytext=(0, 3 if value >= 0 else -3), fontsize=7.5,
                          textcoords="offset points", ha="center", va="bottom" if value >= 0 else "top")  # fmt: skip
    axes.axhline(0, color="#6b6b6b", lw=0.8)
    axes.margins(y=0.12)
    axes.set_xticks(range(1, len(values) + 1))
    axes.set_xlabel("exit")
    axes.set_title(f"{name}, mean over epochs", fontsize=10, loc="left")
