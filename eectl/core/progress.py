"""What a person sees while training runs: a bar on a terminal, a line per epoch elsewhere; all of it on stderr."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """Progress of a run. `quiet` shows nothing (every process but the first, or the user's wish)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = self._steps = 0

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def start_phase(self, number: int, title: str, *, epochs: int, steps: int, done: int) -> None:
        """A phase begins; `done` steps of it are behind us."""
        self.close()
        self._epochs, self._steps = epochs, steps
        self.say(f"phase {number}: {title}; at most {epochs} epochs of {steps} steps")
        if self.console.is_terminal and not self.console.quiet:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"phase {number}", total=epochs * steps, completed=done)

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def epoch(self, row: Mapping[str, Any], *, since_improvement: int) -> None:
        """One epoch is done; `row` is its line of metrics.jsonl."""
        scores = " ".join(f"{score:.4f}" for score in row["validation_score"])
        waited = f", {since_improvement} without improvement" if since_improvement else ""
        self.say(f"phase {row['phase']} epoch {row['epoch']}/{self._epochs}: validation {scores}{waited}")

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps on a terminal, nothing elsewhere; gives what to call once per step."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
