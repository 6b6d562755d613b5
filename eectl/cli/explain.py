"""The `analyze` commands: one per question, made from `analyses.settings`. Heavy imports stay inside."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from eectl.analyses.settings import MOST_NUMBER, QUESTIONS, Question
from eectl.cli.options import (
    BatchSize,
    DataRoot,
    Device,
    Json,
    Overwrite,
    Paper,
    Quiet,
    among,
    complete_files,
    decimal,
    say,
    whole,
)
from eectl.core.seeds import MOST_SEED

analyze = typer.Typer(
    name="analyze",
    help="Answer one of the paper's five questions about checkpoints.",
    no_args_is_help=True,
)

Checkpoints = Annotated[
    list[Path], typer.Argument(metavar="CKPT…", help="checkpoint files", autocompletion=complete_files, show_default=False)
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="folder for QUESTION.json, .csv, .png and .pdf", show_default=False)]
Seed = Annotated[int, typer.Option(parser=whole(0, MOST_SEED), help="seed of the rows and of what else is drawn")]
Label = Annotated[
    list[str] | None,
    typer.Option(help="what to call a checkpoint, once for each in their order; default: its regime", show_default=False),
]
BEFORE = {"checkpoints": Checkpoints, "out": OutFolder}
AFTER: dict[str, tuple[Any, Any]] = {  # what every question takes beside its own options: annotation and default
    "label": (Label, None),
    "seed": (Seed, 0),
    "batch_size": (BatchSize, None),
    "device": (Device, "auto"),
    "data_root": (DataRoot, None),
    "paper": (Paper, False),
    "overwrite": (Overwrite, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
}


def _command(name: str, question: Question) -> Callable[..., None]:
    """Make the function that typer turns into a command: what all questions share, and a parameter per setting."""

    def command(checkpoints: Sequence[Path], label: Sequence[str] | None, json: bool, **given: Any) -> None:
        from eectl.analyses.analyze import analyze as answer
        from eectl.analyses.tables import show_answer
        from eectl.core.console import show_json

        analysis = answer(name, checkpoints, label=label or (), say=say, **given)
        if json:
            show_json(analysis.to_json())
        else:
            show_answer(analysis.answer.tables, analysis.answer.reading, analysis.answer.notes)

    own = sorted(fields(question.settings), key=lambda each: each.name == "split")  # the same for most questions, so it is last
    parameters = [Parameter(key, Parameter.KEYWORD_ONLY, annotation=kind) for key, kind in BEFORE.items()]
    parameters += [
        Parameter(each.name, Parameter.KEYWORD_ONLY, annotation=_annotation(each), default=each.default) for each in own
    ]
    parameters += [
        Parameter(key, Parameter.KEYWORD_ONLY, annotation=kind, default=default) for key, (kind, default) in AFTER.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = question.text
    return command


def _annotation(setting: "Field[Any]") -> Any:
    """Return the type and the typer option of a setting; one that is off by default has no --no-."""
    flags = [f"--{setting.name.replace('_', '-')}"] if setting.default is False else []
    if setting.default is True:
        flags = [f"--{setting.name}/--no-{setting.name}"]
    choices = setting.metadata["choices"]
    readers: dict[type, Callable[[object], Any]] = {
        int: whole(-MOST_NUMBER, setting.metadata["most"]),
        float: decimal(-MOST_NUMBER, MOST_NUMBER),
    }
    option = typer.Option(
        *flags,
        help=setting.metadata["help"],
        autocompletion=among(*choices) if choices else None,
        parser=readers.get(type(setting.default)),
    )
    return Annotated[type(setting.default), option]


for _name, _question in QUESTIONS.items():
    analyze.command(_name)(_command(_name, _question))
