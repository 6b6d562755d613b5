"""The panel Deploy of `eectl --help`: predict. Heavy imports stay inside."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eectl.cli.options import (
    MOST_COUNT,
    BatchSize,
    Checkpoint,
    Device,
    Json,
    Overwrite,
    Precision,
    Quiet,
    decimal,
    places_starting_with,
    say,
    whole,
)
from eectl.recipe.budgets import MOST_BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eectl.deploy.model import Model
    from eectl.deploy.predict import Predicted
    from eectl.deploy.rows_out import RowOut


def predict(
    checkpoint: Checkpoint,
    inputs: Annotated[list[str], typer.Argument(metavar="FILES|FOLDER|-", help="images, folders of them, or text files (.csv, "
                                                ".tsv, .jsonl, .parquet); - reads a text, or an image's path, a line",
                                                autocompletion=places_starting_with, show_default=False)],
    policy: Annotated[Path | None, typer.Option(help="thresholds from calibrate-thresholds; default: the plain network answers",
                                                show_default=False)] = None,
    budget: Annotated[float | None, typer.Option(parser=decimal(0, MOST_BUDGET), help="which of the policy's budgets to keep, in "
                                                 "% of the plain backbone's cost; default: the only one it has",
                                                 show_default=False)] = None,
    top: Annotated[int, typer.Option(parser=whole(0, MOST_COUNT), help="how many of the likeliest classes to give")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the answers", metavar="FILE.jsonl|FILE.csv",
                                             show_default=False)] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "--column", metavar="COLUMN", help="the column of the texts, twice "
                                                   "for pairs; default: the recipe's", show_default=False)] = None,
    tokenizer: Annotated[str | None, typer.Option(help="a folder that stands in for the recipe's tokenizer",
                                                  show_default=False)] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Answer new images or texts: class (or value), probability, exit and cost.

    A table on a terminal, a line of JSON per input in a pipe. An input that cannot be read is said on stderr, the others still
    come out, and the exit code is 1.
    Example: eectl predict model.safetensors photos/ --policy policy.json --budget 50 -o answers.csv
    """
    from eectl.core.console import show_json
    from eectl.deploy.predict import predict as run

    is_table = out is None and not json and sys.stdout.isatty()
    each = None if json or out is not None else _table() if is_table else _lines()
    try:
        done = run(
            checkpoint, inputs, policy=policy, budget=budget, top=top, out=out, text=text or (), batch_size=batch_size,
            device=device, precision=precision, tokenizer=tokenizer, overwrite=overwrite, quiet=quiet or is_table, each=each,
            say=lambda line: say(f"eectl: {line}"),
        )  # fmt: skip
        if json:
            show_json(done.to_json())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    if not quiet:
        _say_done(done, checkpoint, out)
    if done.failed:
        raise typer.Exit(1)


def _table() -> "Callable[[Sequence[RowOut], Model], None]":
    """Return what prints rows as a table as they come."""
    from eectl.core.console import make_console
    from eectl.deploy.rows_out import AnswerTable

    tables: list[AnswerTable] = []

    def show(rows: "Sequence[RowOut]", model: "Model") -> None:
        if not tables:
            tables.append(AnswerTable(make_console(), classes=model.classes, is_text=model.is_text))
        for row in rows:
            tables[0].take(row)
        tables[0].flush()

    return show


def _lines() -> "Callable[[Sequence[RowOut], Model], None]":
    """Return what prints rows as lines of JSON."""
    from eectl.deploy.rows_out import json_writer

    stream = sys.stdout
    write = json_writer(stream)

    def show(rows: "Sequence[RowOut]", _: "Model") -> None:
        for row in rows:
            write(row)
        stream.flush()

    return show


def _say_done(done: "Predicted", checkpoint: Path, out: Path | None) -> None:
    """Say how many were answered, where they left and what that cost."""
    if out is not None:
        say(f"{out}: {done.num_rows:,} rows written")
    if done.failed:
        say(f"{len(done.failed):,} of {len(done.failed) + done.num_rows:,} inputs could not be read")
    if done.budget is None:
        early = f"; for early exit calibrate {checkpoint} and give --policy" if len(done.left) > 1 else ""
        say(f"no policy, so the plain network answered at its last exit{early}")
    elif done.mean_cost is not None:
        exits = ", ".join(f"{count:,} at {number}" for number, count in enumerate(done.left, 1) if count)
        say(f"left at exits: {exits}; mean cost {done.mean_cost:.1%} of the plain backbone's")
    if done.full_sizes:
        sizes = ", ".join(map(str, done.full_sizes))
        say(f"at batch size {sizes} all exits ran and the policy chose among them: early exit was slower here")
