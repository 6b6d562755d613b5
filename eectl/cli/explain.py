"""The `analyze` commands of the command line: one per question, with its options. Heavy imports stay inside."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eectl.cli.options import BatchSize, DataRoot, Device, Json, Overwrite, Quiet, among, complete_files
from eectl.recipe.choices import MOVED_CHOICES, SPLIT_CHOICES, VIEW_CHOICES, described, listed

if TYPE_CHECKING:
    from eectl.analyses.question import Settings

analyze = typer.Typer(
    name="analyze",
    help="Answer one of the paper's five questions about checkpoints.",
    no_args_is_help=True,
)

Checkpoints = Annotated[
    list[Path], typer.Argument(metavar="CKPT…", help="checkpoint files", autocompletion=complete_files, show_default=False)
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="folder for QUESTION.json, .csv, .png and .pdf", show_default=False)]
Seed = Annotated[int, typer.Option(help="seed of the rows and of what else is drawn")]
Label = Annotated[
    list[str] | None,
    typer.Option(help="what to call a checkpoint, once for each in their order; default: its regime", show_default=False),
]
View = Annotated[str, typer.Option(help=f"{listed(VIEW_CHOICES)} or auto", autocompletion=among("auto", *VIEW_CHOICES))]
SplitName = Annotated[str, typer.Option(help=listed(SPLIT_CHOICES), autocompletion=among(*SPLIT_CHOICES))]


def _run(
    question: str,
    checkpoints: Sequence[Path],
    settings: "Settings",
    *,
    out: Path,
    seed: int,
    label: Sequence[str] | None,
    device: str,
    data_root: Path | None,
    batch_size: int | None,
    overwrite: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Answer, and print the answer."""
    from eectl.analyses.analyze import analyze_checkpoints
    from eectl.analyses.tables import show_answer
    from eectl.core.console import show_json

    report = analyze_checkpoints(
        question, checkpoints, settings, out=out, seed=seed, labels=label or (), device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, quiet=quiet, say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    if json:
        show_json(report.to_json())
    else:
        show_answer(report.answer.tables, report.answer.reading, report.answer.notes)


@analyze.command("gradient-dominance")
def gradient_dominance(
    checkpoints: Checkpoints,
    out: OutFolder,
    samples: Annotated[int, typer.Option(help="how many rows are looked at, in whole batches")] = 2000,
    split: SplitName = "train",
    train_mode: Annotated[bool, typer.Option("--train-mode", help="BatchNorm on the batch's statistics and dropout on, as in "
                                             "training")] = False,
    tracked: Annotated[bool, typer.Option("--tracked", help="draw what train --track gradient-dominance left beside the "
                                          "checkpoints")] = False,
    label: Label = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """How far each exit's gradient points the way of the sum that moves the shared weights (paper's Figure 2).

    Example: eectl analyze gradient-dominance joint/model.safetensors mixed/model.safetensors -o dominance
    """
    from eectl.analyses.dominance.dominance import DominanceSettings

    settings = DominanceSettings(split=split, samples=samples, train_mode=train_mode, tracked=tracked)
    _run(
        "gradient-dominance", checkpoints, settings, out=out, seed=seed, label=label, device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


@analyze.command("mode-connectivity")
def mode_connectivity(
    checkpoints: Checkpoints,
    out: OutFolder,
    points: Annotated[int, typer.Option(help="networks on each line, both ends included")] = 11,
    samples: Annotated[int, typer.Option(help="how many rows of train, and of test, each of them sees")] = 1000,
    bn_samples: Annotated[int, typer.Option(help="train rows for BatchNorm's statistics at each point")] = 1000,
    reestimate: Annotated[bool, typer.Option("--reestimate/--no-reestimate", help="take BatchNorm's statistics anew at each "
                                             "point, ends included")] = True,
    orders: Annotated[int, typer.Option(help="random orders in which matching is tried; the best is kept")] = 5,
    label: Label = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Losses on the line between each two networks, as they are and with their units matched (paper's Figure 3).

    Example: eectl analyze mode-connectivity joint-0/model.safetensors joint-1/model.safetensors -o connectivity
    """
    from eectl.analyses.connectivity.connectivity import ConnectivitySettings

    settings = ConnectivitySettings(points=points, samples=samples, bn_samples=bn_samples, orders=orders, reestimate=reestimate)
    _run(
        "mode-connectivity", checkpoints, settings, out=out, seed=seed, label=label, device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


@analyze.command("numerical-rank")
def numerical_rank(
    checkpoints: Checkpoints,
    out: OutFolder,
    samples: Annotated[int, typer.Option(help="how many rows are looked at")] = 10_000,
    features: Annotated[int, typer.Option(help="at most this many of a block's numbers, the same for every network")] = 2_000,
    view: View = "auto",
    tolerance: Annotated[float, typer.Option(help="what counts: eigenvalues of the covariance above this share of the "
                                             "largest")] = 1e-3,
    split: SplitName = "test",
    label: Label = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """How many dimensions each block's activations fill (paper's Figure 4).

    Views: flattened (auto, of images), pooled over space or tokens, class-token (auto, of texts).
    Example: eectl analyze numerical-rank disjoint/model.safetensors mixed/model.safetensors -o rank
    """
    from eectl.analyses.rank import RankSettings

    settings = RankSettings(split=split, samples=samples, features=features, view=view, tolerance=tolerance)
    _run(
        "numerical-rank", checkpoints, settings, out=out, seed=seed, label=label, device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


@analyze.command("mutual-information")
def mutual_information(
    checkpoints: Checkpoints,
    out: OutFolder,
    samples: Annotated[int, typer.Option(help="how many rows are looked at; time grows with their square")] = 5_000,
    dimensions: Annotated[int, typer.Option(help="random directions that activations are projected to")] = 8,
    noise: Annotated[float, typer.Option(help="variance of the noise, as a share of the activations' mean variance")] = 0.3,
    view: View = "auto",
    split: SplitName = "test",
    label: Label = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """What each block's activations say about the input and the label (paper's Figure 5), in nats.

    Views: pooled over space or tokens (auto, of images), class-token (auto, of texts), flattened.
    Example: eectl analyze mutual-information joint/model.safetensors mixed/model.safetensors -o information
    """
    from eectl.analyses.information import InformationSettings

    settings = InformationSettings(split=split, samples=samples, dimensions=dimensions, noise=noise, view=view)
    _run(
        "mutual-information", checkpoints, settings, out=out, seed=seed, label=label, device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


@analyze.command("loss-landscape")
def loss_landscape(
    checkpoints: Checkpoints,
    out: OutFolder,
    points: Annotated[int, typer.Option(help="points a side, an odd number: the weights lie in the middle")] = 11,
    span: Annotated[float, typer.Option(help="how far to go to each side; 1: as far as each filter's own norm")] = 1.0,
    dimensions: Annotated[int, typer.Option(help="1 for a line, 2 for a plane")] = 2,
    only: Annotated[str, typer.Option(help=f"which weights move: {described(MOVED_CHOICES)}",
                                      autocompletion=among(*MOVED_CHOICES))] = "all",
    reestimate: Annotated[bool, typer.Option("--reestimate", help="BatchNorm statistics anew at every point, from as many "
                                             "training rows")] = False,
    samples: Annotated[int, typer.Option(help="how many rows each loss is the mean of")] = 500,
    split: SplitName = "train",
    label: Label = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """How the exits' losses rise along random filter-normalised directions, the same for all exits (paper's Figure 6).

    Example: eectl analyze loss-landscape joint/model.safetensors disjoint/model.safetensors -o landscape --points 21
    """
    from eectl.analyses.landscape.landscape import LandscapeSettings

    settings = LandscapeSettings(
        split=split, samples=samples, points=points, span=span, dimensions=dimensions, only=only, reestimate=reestimate
    )
    _run(
        "loss-landscape", checkpoints, settings, out=out, seed=seed, label=label, device=device, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip
