"""Tell experiment trackers (`--track-to`) of a run: the rows of metrics.jsonl, the recipe, and the final evaluation.

Only process 0 logs. No training depends on it: a tracker that fails is left out from then on, with a note. After a resume each
log goes on with the first row that it does not have.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from eectl.core.console import silent
from eectl.core.errors import EectlError, lookup, one_line
from eectl.core.json_files import checked, read_json, write_json
from eectl.recipe.choices import TRACKER_CHOICES
from eectl.training.log_adapters import LOG_ADAPTERS, ExperimentLog, LoggedRun

KIND, SCHEMA = "experiment-logs", 1
DEFAULT = "tensorboard"


class LogState(BaseModel):
    """How far a run is logged by a tracker: the name of its run there, the last step, and whether the final evaluation is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")] = ""
    step: Annotated[int, Field(ge=0, le=2**53)] = 0
    is_whole: bool = False


def choose_trackers(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the trackers to log to: those asked for, each once, or TensorBoard where it is installed.

    Raises EectlError for an unknown one, and for one that is not installed.
    """
    if not names:
        return (DEFAULT,) if _is_installed(DEFAULT) else ()
    for name in names:
        lookup(TRACKER_CHOICES, name, what="--track-to")
    if "none" in names:
        if len(set(names)) > 1:
            raise EectlError(f"--track-to {' --track-to '.join(names)}: none excludes others; leave out one or the other")
        return ()
    for name in names:
        if not _is_installed(name):
            raise EectlError(f"--track-to {name}: not installed; pip install 'eectl[{name}]', or leave it out")
    return tuple(dict.fromkeys(names))


def _is_installed(module: str) -> bool:
    """Return whether there is such a package; a folder of that name, as trackers make beside a program, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


class ExperimentLogs:
    """The logs of a run that are open; without any, nothing happens.

    `state_path` keeps how far each tracker is, beside the resume state.
    """

    def __init__(self, state_path: Path | None = None, *, say: Callable[[str], None] = silent) -> None:
        self._path, self._say = state_path, say
        self._logs: dict[str, ExperimentLog] = {}
        self._states: dict[str, LogState] = {}
        self._phase, self._before, self._step = 0, 0, 0

    def open(self, name: str, run: LoggedRun, *, state: LogState, is_asked_for: bool) -> None:
        """Open a tracker's log where `state` says that it stopped."""

        def begin() -> None:
            adapter = LOG_ADAPTERS[name]
            assert adapter is not None
            self._logs[name] = adapter(run)
            self._states[name] = state.model_copy(update={"key": self._logs[name].key})

        self._guarded(name, begin)
        if is_asked_for and name in self._logs:
            self._say(f"--track-to {name}: {self._logs[name].place}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl; rows come in their order, and a log that has one already takes it once."""
        if row["phase"] != self._phase:
            self._phase, self._before = row["phase"], self._step
        self._step = self._before + row["step"]
        behind = [name for name in self._logs if self._states[name].step < self._step]
        for name in behind:
            self._log(name, numbers_of(row), is_whole=False)
        if behind:
            self._save()

    def final(self, validation: Mapping[str, Any]) -> None:
        """Log the evaluation of the network that the run leaves: of each measure a list by exit."""
        left = [name for name in self._logs if not self._states[name].is_whole]
        for name in left:
            self._log(name, {f"final/{key}": value for key, value in numbers_of(validation).items()}, is_whole=True)
        if left:
            self._save()

    def close(self, *, finished: bool) -> None:
        """End all logs."""
        for name, log in list(self._logs.items()):
            self._guarded(name, lambda log=log: log.close(finished=finished))  # type: ignore[misc]
        self._logs = {}

    def _log(self, name: str, values: Mapping[str, float], *, is_whole: bool) -> None:
        self._guarded(name, lambda: self._logs[name].log(self._step, values))
        if name in self._logs:
            self._states[name] = self._states[name].model_copy(update={"step": self._step, "is_whole": is_whole})

    def _save(self) -> None:
        """Write down how far each tracker is."""
        if self._path is None:
            return
        states = {name: state.model_dump() for name, state in self._states.items()}
        try:
            write_json(self._path, {"kind": KIND, "schema": SCHEMA, "logs": states})
        except EectlError as error:
            self._say(f"--track-to: {error}; after a --resume some steps may be logged twice")
            self._path = None

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        """Do something with a tracker; where that fails, say so once and go on without it."""
        try:
            action()
        except Exception as error:  # of a library's, of any kind: no run is worth less than its log
            self._logs.pop(name, None)
            fault = one_line(str(error))[:300] or type(error).__name__
            self._say(f"--track-to {name}: failed ({fault}); training goes on without it, its numbers are in metrics.jsonl")


@contextmanager
def experiment_logs(
    trackers: Sequence[str],
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] | None,
    are_asked_for: bool,
    say: Callable[[str], None],
) -> Iterator[ExperimentLogs]:
    """Open the logs of a run for the block, and close them after it.

    Args:
        trackers: their names.
        folder: the run's.
        recipe: the resolved one, as plain data.
        rows: what is in metrics.jsonl of a run that goes on; None: a new run.
        are_asked_for: whether to say where the logs are.
        say: takes notes.
    """
    path = folder / "resume" / "logs.json"
    logs = ExperimentLogs(path, say=say)
    states = _read_states(path, say) if rows is not None and trackers else {}
    for name in trackers:
        state = states.get(name, LogState())
        run = LoggedRun(folder, recipe, key=state.key, step=state.step)
        logs.open(name, run, state=state, is_asked_for=are_asked_for)
    for row in rows or ():
        logs.epoch(row)
    finished = False
    try:
        yield logs
        finished = True
    finally:
        logs.close(finished=finished)


def _read_states(path: Path, say: Callable[[str], None]) -> dict[str, LogState]:
    """Return how far each tracker is; nothing where that is not known."""
    if not path.exists():
        return {}
    try:
        found = read_json(path, kind=KIND, schema=SCHEMA).get("logs")
        return checked(dict[str, LogState], found, where=path, again="take it away")
    except EectlError as error:
        say(f"{error}; trackers begin new logs")
        return {}


def numbers_of(row: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Return the finite numbers of a row by name: those of a list by exit, as `validation_loss/exit_1`.

    The lists of gradient dominance follow its own `exits`; norms are by segment too.
    """
    exits = row.get("exits")
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{above}{key}/")
        elif isinstance(value, list | tuple):
            names = exits if isinstance(exits, list) and len(exits) == len(value) else range(1, len(value) + 1)
            for number, item in zip(names, value, strict=True):
                parts = {f"/segment_{at}": each for at, each in enumerate(item, 1)} if isinstance(item, list) else {"": item}
                found |= {f"{above}{key}/exit_{number}{end}": each for end, each in parts.items()}
        else:
            found[f"{above}{key}"] = value
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value) and key != "step" and not key.startswith(f"{above}exits/")
    }
