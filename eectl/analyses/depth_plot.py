"""Draw what changes with depth: rank and information by block, a line per network, filled markers where an exit follows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eectl.analyses.question import Answer
from eectl.core.figures import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rank(figure: "Figure", answer: Answer, labels: Sequence[str]) -> None:
    """Draw the numerical and the effective rank against the block."""
    figure.set_size_inches(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    for axes, key, name in ((left, "rank", "numerical rank"), (right, "effective_rank", "effective rank")):
        _draw_lines(axes, answer.values["networks"], key)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    _finish(figure, left, labels)


def draw_information(figure: "Figure", answer: Answer, labels: Sequence[str]) -> None:
    """Draw I(X;Z) with its bounds and log n, and I(Y;Z) with what chance gives, against the block."""
    figure.set_size_inches(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    networks = answer.values["networks"]
    for index, one in enumerate(networks):
        low, high = ([min(block[key], one["most"]) for block in one["blocks"]] for key in ("lower", "upper"))
        left.fill_between(range(len(low)), low, high, color=line_style(index)["color"], alpha=0.1, lw=0)
        chance = [block["label_by_chance"] for block in one["blocks"]]
        right.plot(chance, color=line_style(index)["color"], lw=0.8, ls=":")
    _draw_lines(left, networks, "sampled")
    _draw_lines(right, networks, "label")
    _draw_ceiling(left, networks[0]["most"], "log n")
    _draw_ceiling(right, networks[0]["most_label"], "H(Y)")
    left.set_ylabel("I(X;Z), nats (band: bounds)")
    right.set_ylabel("I(Y;Z), nats (dotted: labels shuffled)")
    _finish(figure, left, labels)


def _draw_ceiling(axes: "Axes", value: float, name: str) -> None:
    axes.axhline(value, color="#6b6b6b", lw=0.9, ls="--")
    axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, -10), textcoords="offset points",
                  ha="right", fontsize=8, color="#6b6b6b")  # fmt: skip
    axes.set_ylim(0, 1.05 * value)


def _draw_lines(axes: "Axes", networks: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw a line per network; markers are filled where an exit follows the block and hollow elsewhere."""
    from matplotlib.ticker import MaxNLocator

    for index, one in enumerate(networks):
        style = line_style(index)
        values = [block[key] for block in one["blocks"]]
        exits = [block in one["after"] or block == len(values) - 1 for block in range(len(values))]
        line = {name: style[name] for name in ("color", "ls", "lw")}
        axes.plot(values, label=one["label"], marker=style["marker"], ms=style["ms"], mfc="white", **line)
        places = [block for block, is_exit in enumerate(exits) if is_exit]
        axes.plot(places, [values[block] for block in places], style["marker"], color=style["color"], ms=style["ms"])
    axes.set_xlabel("block (filled markers: an exit follows)")
    axes.grid(axis="y", color="#e3e3e3", lw=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure: "Figure", axes: "Axes", labels: Sequence[str]) -> None:
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles, list(labels), loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
