"""Options that several commands share, and how they complete. No torch."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from eectl.recipe.budgets import DEFAULT_BUDGETS

CRITERIA = ("max-softmax", "entropy", "margin", "patience", "difference", "difference-2")  # exiting.CRITERIA, which needs torch


def starting_with(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def among(*names: str) -> Callable[[str], list[str]]:
    """A completion from a fixed list."""

    def complete(incomplete: str) -> list[str]:
        return starting_with(names, incomplete)

    return complete


def complete_files(incomplete: str) -> list[str]:
    """Checkpoints and folders that begin like this."""
    base = Path(incomplete)
    folder = base if incomplete.endswith("/") else base.parent
    names = (f"{path}/" if path.is_dir() else str(path) for path in sorted(folder.glob("*")) if folder.is_dir())
    return [name for name in names if name.startswith(incomplete) and name.endswith(("/", ".safetensors"))]


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="a checkpoint file", autocompletion=complete_files, show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="where to write", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps", autocompletion=among("auto", "cpu", "cuda", "mps"))]
DataRoot = Annotated[Path | None, typer.Option(help="where the data lies, if not where the recipe says", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]
Budgets = Annotated[str, typer.Option(help="percentages of the plain backbone's cost")]
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(CRITERIA)} (any difference-N); none: max-softmax, for regression difference",
        autocompletion=among(*CRITERIA),
        show_default=False,
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="rows at once; none: the recipe's", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]


HEADS = ("linear", "mlp-1024", "mlp-2048", "sdn", "ztw", "ztw-arithmetic", "gpf", "gpf-lancopku")


PLACEMENTS = ("every-1", "every-2", "every-3", "dense-sparse", "sparse-dense")


BUDGETS = DEFAULT_BUDGETS


def complete_regimes(incomplete: str) -> list[str]:
    from eectl.recipe.regimes import REGIMES

    return starting_with(REGIMES, incomplete)


def complete_recipes(incomplete: str) -> list[str]:
    from eectl.recipe.reading import shipped_recipes

    return starting_with(shipped_recipes(), incomplete)


def complete_published(incomplete: str) -> list[str]:
    """The paper's tables, and their variants as TABLE:VARIANT."""
    from eectl.reports.published import published_tables

    tables = published_tables().values()
    names = [name for each in tables for name in (each.number, *(f"{each.number}:{one}" for one in each.variants if one))]
    return starting_with(names, incomplete)


def complete_runs(incomplete: str) -> list[str]:
    """Run folders, checkpoints and evaluations that begin like this."""
    base = Path(incomplete)
    folder = base if incomplete.endswith("/") else base.parent
    names = (f"{path}/" if path.is_dir() else str(path) for path in sorted(folder.glob("*")) if folder.is_dir())
    return [name for name in names if name.startswith(incomplete) and name.endswith(("/", ".safetensors", ".json"))]


def complete_recipes_and_files(incomplete: str) -> list[str]:
    return complete_recipes(incomplete) + complete_files(incomplete)


def say(text: str) -> None:
    print(text, file=sys.stderr)
