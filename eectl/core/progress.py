"""The progress of a long run for a person to see: a bar on a terminal, a line per epoch; all of it on stderr."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eectl.core.console import is_share, make_console, silent
from eectl.core.errors import visible


def make_bar(console: Console) -> Progress:
    """Return a bar that goes away at its end; stdout, which may be a file, stays as it is."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


class Display:
    """Shows how a run goes on. `quiet` shows nothing; `say` is called with each line, whether quiet or not."""

    def __init__(self, *, quiet: bool = False, say: Callable[[str], None] = silent) -> None:
        self._say = say
        self.console = make_console(stderr=True, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs, self._seconds = 0, 0.0
        self._score_name = "accuracy"
        self._has_header = False

    def say(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False)
        self._say(text)

    def start_phase(
        self, number: int, title: str, *, epochs: int, steps: int, done: int, score_name: str, seconds: float
    ) -> None:
        """Announce a phase, of which `done` steps are done and `seconds` spent; `score_name` says how its exits are scored."""
        self.close()
        self._epochs, self._score_name, self._seconds, self._has_header = epochs, score_name, seconds, False
        self.say(f"phase {number}: {title}; at most {epochs} epochs of {steps} steps")
        if self.console.is_terminal and not self.console.quiet:
            self._bar = make_bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task(f"phase {number}", total=epochs * steps, completed=done)

    def step(self) -> None:
        """Count a step that is done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def epoch(self, row: Mapping[str, Any], *, since_improvement: int) -> None:
        """Show an epoch that is done; `row` is its line of metrics.jsonl. A phase's first comes under a header."""
        if not self._has_header:
            self.say(epoch_header(len(row["validation_score"]), self._score_name))
            self._has_header = True
        seconds, self._seconds = row["seconds"] - self._seconds, row["seconds"]
        more = {"seconds": seconds, "since_improvement": since_improvement, "score_name": self._score_name}
        self.say(epoch_line(row, num_epochs=self._epochs, **more))

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar of `total` steps on a terminal, nothing elsewhere; yields what to call once per step."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda: None
            return
        with make_bar(self.console) as bar:
            task = bar.add_task(visible(what), total=total)
            yield lambda: bar.advance(task)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


SHOWN_EXITS = 5  # with more, a line would be longer than 80 columns


def shown_exits(num_exits: int) -> list[int]:
    """Return the exits (numbers from 1) that an epoch's line shows: all, or of many the first, the middle ones and the last."""
    if num_exits <= SHOWN_EXITS:
        return list(range(1, num_exits + 1))
    return [1 + round(place * (num_exits - 1) / (SHOWN_EXITS - 1)) for place in range(SHOWN_EXITS)]


def epoch_header(num_exits: int, score_name: str) -> str:
    """Return the lines above a phase's epochs, at most 80 columns wide."""
    unit = " in %" if is_share(score_name) else ""
    some = "" if num_exits <= SHOWN_EXITS else f"; all {num_exits} exits: metrics.jsonl"
    exits = "".join(f"{f'exit {number}':>8}" for number in shown_exits(num_exits))
    columns = f"{'epoch':>9}{'train loss':>11}{'lr':>9}{'s':>7}{exits}"
    return f"{f'validation {score_name}{unit}{some}':>{len(columns)}}\n{columns}"


def epoch_line(row: Mapping[str, Any], *, num_epochs: int, seconds: float, since_improvement: int, score_name: str) -> str:
    """Return an epoch's line: training loss (mean over the exits), last learning rate, seconds and scores.

    Args:
        row: the epoch's row of metrics.jsonl.
        since_improvement: epochs since any exit improved; `-3` at the end of the line says that it is three.
    """
    losses = [loss for loss in row["train_loss"] if loss is not None and loss == loss]  # an exit that no step trained has NaN
    loss = f"{sum(losses) / len(losses):.4g}" if losses else "-"
    scores = row["validation_score"]
    shown = (scores[number - 1] for number in shown_exits(len(scores)))
    cells = "".join(f"{100 * score:8.2f}" if is_share(score_name) else f"{_short(score):>8}" for score in shown)
    waited = f" -{since_improvement}" if since_improvement else ""
    epoch = f"{row['epoch']}/{num_epochs}"
    return f"{epoch:>9}{loss:>11}{row['lr']:>9.2g}{seconds:>7.{1 if seconds < 1000 else 0}f}{cells}{waited}"


def _short(error: float) -> str:
    """Return an error of a regression in at most 7 characters."""
    return f"{error:.4g}" if error == 0 or 1e-3 <= error < 1e4 else f"{error:.1e}"
