"""Common parts of all pictures: line styles that readers with any colour vision tell apart, the title, and rendering."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.errors import visible
from eectl.core.streams import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette (jfly.uni-koeln.de/color), which readers with any colour vision tell apart; yellow is too pale for lines
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)))
MARKERS = "osD^vPX"  # all of them can be filled


def line_style(index: int) -> dict[str, Any]:
    """Return colour, dash and marker of the `index`-th line of a picture, as keywords of matplotlib's `plot`."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "lw": 1.4,
        "ms": 4.5,
    }


def exit_colour(index: int, num_exits: int) -> tuple[float, float, float, float]:
    """Return the colour of the `index`-th of ordered exits: dark for the first to bright for the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * index / max(num_exits - 1, 1))


def title(figure: "Figure", text: str, *, paper: bool) -> None:
    """Put a title above everything in the figure; with `paper` leave it out, as a caption will say it."""
    if not paper:
        figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def render(paths: Sequence[Path], draw: "Callable[[Figure], None]") -> dict[Path, bytes]:
    """Draw one figure and return what each of the files holds, in the format of its suffix; nothing is written.

    `draw` gets an empty figure of 7.2 × 4.6 inches, may resize it, and fills it. Needs no display. Names in it may come from
    files of anyone's: they are drawn as they are, and no `$` in them begins a formula.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.right": False, "axes.spines.top": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
        draw(figure)
        _take_words_as_they_are(figure)
        pictures = {}
        for path in paths:
            picture = io.BytesIO()  # so that matplotlib meets no full disk, which it would hide
            figure.savefig(picture, format=path.suffix[1:].lower())
            pictures[path] = picture.getvalue()
        return pictures


def _take_words_as_they_are(figure: "Figure") -> None:
    """Let no text of a figure be a formula, or hold what its file cannot; powers on a logarithmic axis are matplotlib's own."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    formulas = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter):  # words for ticks, which it sets each time the axis is drawn
                axis.set_major_formatter(FuncFormatter(lambda value, place, words=formatter: _drawable(words(value, place))))
            if axis.get_scale() == "log":
                formulas |= set(axis.get_ticklabels(which="both"))
    for text in figure.findobj(Text):
        if text not in formulas:
            text.set_parse_math(False)
            text.set_text(_drawable(text.get_text()))


def _drawable(text: str) -> str:
    return spelled(visible(text), "utf-8")
