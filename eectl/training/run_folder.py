"""A training run's folder: its files, the resume state, the metrics, and the lock. Knows no model and no loop."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.core.files import replacing
from eectl.core.json_files import clean_json
from eectl.core.tensor_files import read_metadata, read_tensors, write_tensors
from eectl.recipe.reading import dump_recipe, flatten, read_recipe
from eectl.recipe.recipe import Recipe

KIND = "resume-state"
SCHEMA = 1
SAVE_SHARE = 0.05  # saving the resume state may take this share of the time


@dataclass(frozen=True)
class State:
    """A run's resume state: tensors by name, and the rest as JSON-able values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


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
    def locked(self) -> Iterator[None]:
        """Hold the folder for one run; raises EectlError where another process has it. The lock dies with the process."""
        try:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.state.parent / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise EectlError(f"{self.path}: cannot be written ({error.strerror}); name another folder with -o") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EectlError(
                    f"{self.path}: another run is writing here; wait for it, or name another folder with -o"
                ) from error
            yield

    def results(self) -> list[Path]:
        """Return the files that a run has left here so far."""
        own = [self.metrics, self.model, self.table, self.picture, self.state, self.path / "last-good.safetensors"]
        phases = [path for path in self.path.glob("phase-*.safetensors") if path.stem.removeprefix("phase-").isdecimal()]
        return [path for path in [*own, *phases] if path.exists()]

    def holds_a_run(self) -> bool:
        """Return whether a new run would replace something; a run that stopped before its first step left nothing."""
        return bool(self.results()) or (self.recipe.exists() and not self.state.parent.exists())

    def finished(self) -> bool:
        """Return whether the run that was started here came to its end."""
        return self.model.exists() and not self.state.exists()

    def set_aside(self) -> None:
        """Move what an earlier run left to `replaced/`, where it stays until the new run has come to its end."""
        aside = self.path / "replaced"
        keeps = not aside.exists()  # else: a replacement that did not come to its end gives way, what it was to replace stays
        try:
            for path in [*self.results(), *([self.recipe] if self.recipe.exists() else [])]:
                aside.mkdir(exist_ok=True)
                if keeps:
                    path.rename(aside / path.name)
                else:
                    path.unlink()
        except OSError as error:
            raise EectlError(f"{self.path}: cannot be changed ({error.strerror}); name another folder with -o") from error

    def write_recipe(self, recipe: Recipe) -> None:
        """Store the resolved recipe."""
        with replacing(self.recipe) as temporary:
            temporary.write_text(dump_recipe(recipe), encoding="utf-8")

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise EectlError unless the run here has this recipe; names the keys that differ."""
        if not self.recipe.exists():
            raise EectlError(
                f"{self.path}: holds {self.results()[0].name} but no recipe.yaml, so no run to resume; give another -o"
            )
        there, here = (flatten(r.model_dump(mode="json")) for r in (read_recipe(str(self.recipe)), recipe))
        differ = [
            f"{key} is {there.get(key)} there and {here.get(key)} here"
            for key in sorted(there | here)
            if there.get(key) != here.get(key)
        ]
        if differ:
            raise EectlError(f"{self.path}: --resume with another recipe: {'; '.join(differ)}; use the same, or another -o")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean_json(row)) + "\n")
        except OSError as error:
            raise EectlError(f"{self.metrics}: cannot be written ({error.strerror}); free some space and --resume") from error

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, one per epoch."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def due(self) -> bool:
        """Return whether enough time has passed since the last save for the next to cost little."""
        return time.monotonic() - self.saved_at >= self._save_seconds / SAVE_SHARE

    def save_state(self, state: State) -> None:
        """Replace the resume state in one step; the rows of metrics.jsonl up to now belong to it."""
        started = time.monotonic()
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        write_tensors(self.state, state.tensors, {"kind": KIND, "schema": SCHEMA, "metrics_bytes": size, "values": state.values})
        self.saved_at = time.monotonic()
        self._save_seconds = self.saved_at - started

    def load_state(self) -> State | None:
        """Return the resume state, if there is one."""
        if not self.state.exists():
            return None
        tensors, metadata = read_tensors(self.state, kind=KIND, schema=SCHEMA)
        return State(tensors, metadata["values"])

    def rewind(self) -> None:
        """Drop the rows of metrics.jsonl that are younger than the resume state."""
        if self.finished() or not self.metrics.exists():
            return
        size = read_metadata(self.state, kind=KIND, schema=SCHEMA)["metrics_bytes"] if self.state.exists() else 0
        with open(self.metrics, "r+b") as file:
            file.truncate(min(size, self.metrics.stat().st_size))

    def finish(self, last: Path) -> None:
        """End the run: copy the last phase's checkpoint to model.safetensors, and remove what only a resume would need."""
        with replacing(self.model) as temporary:
            shutil.copyfile(last, temporary)
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path / "replaced", ignore_errors=True)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix.` in front of every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors: `index.key`; numbers become float64 scalars."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up what `optimizer_tensors` gave, each state laid out in memory as its parameter is.

    Fused optimizers on the CPU walk parameter and state side by side in memory: a channels-last parameter with a state that was
    read back contiguous would be updated with other elements' moments, in silence.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        whole["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(whole)
    for parameter in parameters:
        state = optimizer.state[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
