"""Options that several commands share, and how a shell completes them. The names come from `recipe.choices`; no torch."""

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from eectl.core.errors import one_line, visible
from eectl.core.numbers import decimal_number, whole_number
from eectl.recipe.choices import (
    CRITERION_CHOICES,
    CRITERION_FAMILIES,
    DEFAULT_CRITERION,
    DEVICE_CHOICES,
    PRECISION_CHOICES,
    completions,
    listed,
)

MOST_ROWS = 10**6  # at once
MOST_COUNT = 10**9  # of anything else


def starting_with(names: Iterable[str], incomplete: str) -> list[str]:
    """Return the names that begin with what was typed so far."""
    return [name for name in names if name.startswith(incomplete)]


def among(*names: str) -> Callable[[str], list[str]]:
    """Return a completion that offers these names."""

    def complete(incomplete: str) -> list[str]:
        return starting_with(names, incomplete)

    return complete


def places_starting_with(incomplete: str) -> list[str]:
    """Return the files, and the folders with a slash, that begin like this; none where the system does not let us look."""
    base = Path(incomplete)
    folder = base if incomplete.endswith("/") else base.parent
    with suppress(OSError):
        names = [f"{path}/" if path.is_dir() else str(path) for path in sorted(folder.glob("*"))]
        return starting_with(names, incomplete)
    return []


def complete_files(incomplete: str) -> list[str]:
    """Return the checkpoints and folders that begin like this."""
    return [name for name in places_starting_with(incomplete) if name.endswith(("/", ".safetensors"))]


def whole(least: int, most: int) -> Callable[[object], int]:
    """Return what reads an option as a whole number from `least` to `most`, in the digits 0 to 9."""

    def read(text: object) -> int:
        number = whole_number(text, least=least, most=most)
        if number is None:
            raise typer.BadParameter(f"{visible(str(text))[:60]!r} is not a whole number from {least} to {most:,}")
        return number

    read.__name__ = "integer"  # what --help calls the value
    return read


def decimal(least: float, most: float) -> Callable[[object], float]:
    """Return what reads an option as a number from `least` to `most`, in the digits 0 to 9."""

    def read(text: object) -> float:
        number = decimal_number(text)
        if number is None or not least <= number <= most:
            raise typer.BadParameter(f"{visible(str(text))[:60]!r} is not a number from {least:g} to {most:g}")
        return number

    read.__name__ = "float"
    return read


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="a checkpoint file", autocompletion=complete_files, show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="where to write", show_default=False)]
Device = Annotated[
    str, typer.Option(help=f"{listed(DEVICE_CHOICES)} (cuda:N is one of several GPUs)", autocompletion=among(*DEVICE_CHOICES))
]
Precision = Annotated[
    str | None,
    typer.Option(
        help=f"what the network computes in: {listed(PRECISION_CHOICES)}; default: what it was trained in",
        autocompletion=among(*PRECISION_CHOICES),
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="the folder with the data; default: the recipe's data.root", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]
Paper = Annotated[bool, typer.Option("--paper", help="draw plots without a title, for papers")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]
Budgets = Annotated[str, typer.Option(help="percentages of the plain backbone's cost")]
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"when a row leaves: {listed(CRITERION_CHOICES)} (any difference-N); default: "
        f"{DEFAULT_CRITERION['classification']}, for regression {DEFAULT_CRITERION['regression']}",
        autocompletion=among(*CRITERION_CHOICES, *completions(CRITERION_FAMILIES)),
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(parser=whole(1, MOST_ROWS), help="rows at once; default: the recipe's eval_batch_size", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="show no progress on stderr")]


def complete_recipes(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that begin like this."""
    from eectl.recipe.reading import shipped_recipes

    return starting_with(shipped_recipes(), incomplete)


def complete_published(incomplete: str) -> list[str]:
    """Return the numbers of the paper's tables, and of their variants as TABLE:VARIANT."""
    from eectl.reports.published import published_tables

    tables = published_tables().values()
    names = [name for each in tables for name in (each.number, *(f"{each.number}:{one}" for one in each.variants if one))]
    return starting_with(names, incomplete)


def complete_runs(incomplete: str) -> list[str]:
    """Return the run folders, checkpoints and evaluations that begin like this."""
    return [name for name in places_starting_with(incomplete) if name.endswith(("/", ".safetensors", ".json"))]


def complete_recipes_and_files(incomplete: str) -> list[str]:
    """Return the names of shipped recipes, the checkpoints and the folders that begin like this."""
    return complete_recipes(incomplete) + complete_files(incomplete)


def say(text: str) -> None:
    """Print a line on stderr."""
    print(one_line(text), file=sys.stderr)
