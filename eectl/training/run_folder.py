"""A training run's folder: its files, the resume state, the metrics, and the lock. Knows no model and no loop."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eectl.core import files
from eectl.core.errors import EectlError
from eectl.core.files import replacing
from eectl.core.tensor_files import read_tensors, write_tensors
from eectl.recipe.reading import dump_recipe, flatten, read_recipe
from eectl.recipe.recipe import Recipe
from eectl.training.metrics import append_row, keep_rows, read_rows
from eectl.training.resume import SavedState, State, StateError, checked_state

KIND = "resume-state"
SCHEMA = 2  # 1 had no digest, so that a damaged state could not be told from a whole one
SAVE_SHARE = 0.05  # saving the resume state may take this share of the time


class RunFolder:
    """The files of a run under one path.

    They are `recipe.yaml`, `metrics.jsonl`, `results.csv`, `curves.png`, `phase-N.safetensors`, `model.safetensors` and
    `resume/`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.table = path / "results.csv"
        self.picture = path / "curves.png"
        self.state = path / "resume" / "state.safetensors"
        self.saved_at = time.monotonic()
        self._save_seconds = 0.0

    def phase(self, number: int) -> Path:
        """Return the path of the checkpoint that phase `number` leaves."""
        return self.path / f"phase-{number}.safetensors"

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the folder for one run, and yield whether it holds a run already. The lock dies with the process.

        Raises EectlError where another process has it.
        """
        try:
            others = self._holds_a_recipe_only()
            self.state.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.state.parent / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise EectlError(f"{self.path}: cannot be written ({error.strerror}); name another folder with -o") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                fault = "another run is writing here; wait for it, or" if isinstance(error, BlockingIOError) else error.strerror
                raise EectlError(f"{self.path}: {fault} name another folder with -o") from error
            yield others or bool(self.results())
        finally:
            os.close(lock)

    def results(self) -> list[Path]:
        """Return the files that a run has left here so far."""
        own = [self.metrics, self.model, self.table, self.picture, self.state, self.path / "last-good.safetensors"]
        phases = [path for path in self.path.glob("phase-*.safetensors") if path.stem.removeprefix("phase-").isdecimal()]
        return [path for path in [*own, *phases] if path.exists()]

    def holds_a_run(self) -> bool:
        """Return whether a new run would replace something; a run that stopped before its first step left nothing.

        It holds for this moment only: `locked` answers for as long as a run has the folder.
        """
        return bool(self.results()) or self._holds_a_recipe_only()

    def _holds_a_recipe_only(self) -> bool:
        """Return whether there is a recipe.yaml that no run here wrote."""
        return self.recipe.exists() and not self.state.parent.exists()

    def finished(self) -> bool:
        """Return whether the run that was started here came to its end."""
        return self.model.exists() and not self.state.exists()

    def set_aside(self) -> None:
        """Move what an earlier run left to `replaced/`, where it stays until the new run has come to its end."""
        aside = self.path / "replaced"
        # the recipe moves last: where it is there, a replacement that did not come to its end gives way, and what it was to
        # replace stays; where it is not, moving was stopped halfway and goes on
        whole = (aside / self.recipe.name).exists()
        try:
            for path in [*self.results(), *([self.recipe] if self.recipe.exists() else [])]:
                aside.mkdir(exist_ok=True)
                if whole or (aside / path.name).exists():
                    path.unlink()
                else:
                    path.rename(aside / path.name)
            if aside.exists():
                _bring_to_disk(aside)
        except OSError as error:
            raise EectlError(f"{self.path}: cannot be changed ({error.strerror}); name another folder with -o") from error

    def remove_left_behind(self, phases: Sequence[int]) -> None:
        """Remove the temporary files that killed runs left here, which has these phases."""
        named = [self.recipe, self.metrics, self.model, self.table, self.picture, self.state, self.path / "last-good.safetensors"]
        with files.writing(self.path):
            for path in [*named, *map(self.phase, phases)]:
                files.remove_left_behind(path)

    def write_recipe(self, recipe: Recipe) -> None:
        """Store the resolved recipe."""
        with replacing(self.recipe) as temporary:
            temporary.write_text(dump_recipe(recipe), encoding="utf-8")

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise EectlError unless the run here has this recipe; names the keys that differ."""
        try:
            found = read_recipe(str(self.recipe)) if self.recipe.exists() else None
        except EectlError as error:
            raise EectlError(
                f"{str(error).splitlines()[0]}; this is the recipe of the run to go on with: put it back, or --overwrite to "
                "train again from the start"
            ) from error
        if found is None:
            raise EectlError(
                f"{self.path}: holds {self.results()[0].name} but no recipe.yaml, so no run to resume; give another -o"
            )
        there, here = (flatten(r.model_dump(mode="json")) for r in (found, recipe))
        differ = [
            f"{key} is {there.get(key)} there and {here.get(key)} here"
            for key in sorted(there | here)
            if there.get(key) != here.get(key)
        ]
        if differ:
            raise EectlError(f"{self.path}: --resume with another recipe: {'; '.join(differ)}; use the same, or another -o")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        append_row(self.metrics, row)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, one per epoch; raises EectlError for the first that is damaged."""
        return read_rows(self.metrics)

    def due(self) -> bool:
        """Return whether enough time has passed since the last save for the next to cost little."""
        return time.monotonic() - self.saved_at >= self._save_seconds / SAVE_SHARE

    def save_state(self, state: State) -> None:
        """Replace the resume state in one step; the rows of metrics.jsonl that it counts on are on the disk before it is."""
        started = time.monotonic()
        with files.writing(self.metrics):
            if self.metrics.exists():
                _bring_to_disk(self.metrics)
                _bring_to_disk(self.path)
        values = {"run": state.run, "phase": state.phase}
        write_tensors(self.state, state.tensors, {"kind": KIND, "schema": SCHEMA, **values})
        self.saved_at = time.monotonic()
        self._save_seconds = self.saved_at - started

    def load_state(self) -> SavedState | None:
        """Return the resume state, None if there is none; raises StateError for one that is damaged or of another form."""
        if not self.state.exists():
            return None
        try:
            tensors, found = read_tensors(
                self.state, kind=KIND, schema=SCHEMA, again="it cannot be gone on with", needs_digests=True
            )
            if found["schema"] != SCHEMA:
                raise StateError("is of another eectl, which can finish the run")
            return checked_state(tensors, {key: found.get(key) for key in ("run", "phase")})
        except (EectlError, StateError) as error:
            raise StateError(f"{self.state}: {str(error).removeprefix(f'{self.state}: ')}") from error

    def keep_rows(self, epochs: Sequence[tuple[int, int]]) -> int:
        """Cut metrics.jsonl to the rows of these epochs (phase and epoch); returns how many of them it does not have."""
        return keep_rows(self.metrics, epochs)

    def finish(self, last: Path) -> None:
        """End the run: copy the last phase's checkpoint to model.safetensors, and remove what only a resume would need."""
        with replacing(self.model) as temporary:
            shutil.copyfile(last, temporary)
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path / "replaced", ignore_errors=True)


def _bring_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        files.sync(handle)
    finally:
        os.close(handle)
