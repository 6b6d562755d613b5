"""The progress of a long run for a person to see: a bar on a terminal, a line per epoch; all of it on stderr."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eectl.core.console import silent


class Display:
    """Shows how a run goes on. `quiet` shows nothing; `say` is called with each line, whether quiet or not."""

    def __init__(self, *, quiet: bool = False, say: Callable[[str], None] = silent) -> None:
        self._say = say
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = self._steps = 0

    def say(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False)
        self._say(text)

    def start_phase(self, number: int, title: str, *, epochs: int, steps: int, done: int) -> None:
        """Announce a phase, of which `done` steps are done."""
        self.close()
        self._epochs, self._steps = epochs, steps
        self.say(f"phase {number}: {title}; at most {epochs} epochs of {steps} steps")
        if self.console.is_terminal and not self.console.quiet:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"phase {number}", total=epochs * steps, completed=done)

    def step(self) -> None:
        """Count a step that is done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def epoch(self, row: Mapping[str, Any], *, since_improvement: int) -> None:
        """Show an epoch that is done; `row` is its line of metrics.jsonl."""
        scores = " ".join(f"{score:.4f}" for score in row["validation_score"])
        waited = f", {since_improvement} without improvement" if since_improvement else ""
        self.say(f"phase {row['phase']} epoch {row['epoch']}/{self._epochs}: validation {scores}{waited}")

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar of `total` steps on a terminal, nothing elsewhere; yields what to call once per step."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
