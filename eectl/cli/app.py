"""The command line: parse, call one verb, print. Heavy imports stay inside the commands, so --help and TAB are quick."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from eectl import __version__
from eectl.cli.deploy import predict
from eectl.cli.explain import analyze
from eectl.cli.look import info, recipes, schema
from eectl.cli.measure import bench, calibrate_thresholds, evaluate, flops, report
from eectl.cli.train import attach_heads, train
from eectl.core.errors import EectlError, Interrupted, one_line, refused_by_system
from eectl.core.streams import standard_streams
from eectl.core.threads import settle_threads

LONGEST = 2000  # characters of a message: what a file or the user says may have any number

app = typer.Typer(
    name="eectl",
    help="Train, calibrate, measure and explain multi-exit neural networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the program; a user's mistake becomes one line on stderr and exit code 1, a bug keeps its traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports(frame):  # a library's C code would swallow an exception, or abort; and nothing is begun yet
            _say_stopped(Interrupted(number))
            os._exit(Interrupted(number).exit_code)
        raise Interrupted(number)

    settle_threads(os.environ)
    for number in (signal.SIGINT, signal.SIGTERM):  # while nothing is saved; training notes signals in its own way
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    with standard_streams():
        try:
            _run()
        except EectlError as error:
            _say_error(error)
            sys.exit(error.exit_code)
        except Interrupted as caught:
            _say_stopped(caught)
            sys.exit(caught.exit_code)


def _run() -> None:
    """Run the command; raises EectlError for whatever the operating system refuses, SystemExit when the command is done."""
    try:
        try:
            app(prog_name="eectl")
        except SystemExit:
            sys.stdout.flush()  # a full disk may show only now
            raise
    except BrokenPipeError:  # the reader of stdout, such as head, has what it wants
        sys.exit(1)
    except OSError as error:
        raise refused_by_system(error) from error


def _say_error(error: EectlError) -> None:
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" [process {rank}]"
    for message in error.messages:
        line = one_line(message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"  # what to do stands at its end
        print(f"eectl{process}: {line}", file=sys.stderr)


def _imports(frame: FrameType | None) -> bool:
    """Return whether a module is being imported there."""
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _say_stopped(caught: Interrupted) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"eectl: stopped by {caught}{caught.hint}", file=sys.stderr, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"eectl {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {  # by panel of --help
    "Train": {"train": train, "attach-heads": attach_heads},
    "Measure": {
        "calibrate-thresholds": calibrate_thresholds,
        "evaluate": evaluate,
        "report": report,
        "bench": bench,
        "flops": flops,
    },
    "Deploy": {"predict": predict},
    "Look": {"info": info, "recipes": recipes, "schema": schema},
}
for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(analyze, rich_help_panel="Explain")
