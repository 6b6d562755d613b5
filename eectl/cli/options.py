"""Options that several commands share, and how they complete. No torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

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
