"""Networks and data for the benchmarks: what a shipped recipe says, on random images in memory, so no data set is needed.

The training loop is eectl's own; an epoch of it is timed from outside.
"""

import json
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from eectl.core.distributed import World
from eectl.core.precision import settings
from eectl.core.progress import Display
from eectl.data import DataInfo, Dataset, Split, data_info
from eectl.data.images import MemoryImages
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.reading import read_recipe
from eectl.recipe.recipe import Recipe
from eectl.training.feed import Feed, training_data
from eectl.training.loop import Journal, begin_phase, train_epoch
from eectl.training.network import first_network, planned_phases, resolve, with_exits
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution

# For --quick alone.
TOY = {
    "vit": [f"backbone.args.{change}" for change in ("depth=2", "dim=32", "mlp_dim=32", "heads=2")],
    "resnet20": ["data.image_size=8"],
    "resnet50": ["data.image_size=8"],
}


def recipe_for(name: str, *changes: str, quick: bool) -> Recipe:
    """A shipped recipe, joint training for one epoch without a warm-up; at toy size where `quick`."""
    recipe = read_recipe(name)
    toy = [*TOY[recipe.backbone.name], "batch_size=8", "exits.after=[0, 1]"] if quick else []
    return read_recipe(name, changes=["regime=joint", "epochs=1", "schedule.warmup=0", *toy, *changes])


def images(info: DataInfo, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, *info.input_shape), dtype=torch.uint8, generator=generator)


def dataset(recipe: Recipe, sizes: Mapping[str, int], device: torch.device) -> Dataset:
    """Random images of the recipe's shape and random classes, on the device; `sizes` are rows by split."""
    info = data_info(recipe.data)
    splits = {}
    for name, rows in sizes.items():
        targets = torch.arange(rows) % len(info.classes)
        inputs = MemoryImages(images(info, rows).to(device))
        splits[name] = Split(name, inputs, targets, np.arange(rows, dtype=np.uint64), device=device)
    return Dataset(info, splits, augment=recipe.data.augment)


def network(recipe: Recipe, info: DataInfo) -> tuple[MultiExitModel, Recipe]:
    """The recipe's network with its exits, freshly drawn, and the recipe with what it left open resolved."""
    plain = first_network(recipe, info)
    resolved = resolve(recipe, plain)
    return with_exits(plain, resolved.exits, seed=recipe.seed).model, resolved


class Steps(Display):
    """A quiet display that calls a function after each step of an epoch, with the number that are done."""

    def __init__(self, after_step: Callable[[int], None] = lambda done: None) -> None:
        super().__init__(quiet=True)
        self.done = 0
        self._after_step = after_step

    def step(self) -> None:
        self.done += 1
        self._after_step(self.done)


class Training:
    """A phase of eectl's own training that has begun, and goes on epoch by epoch: what is compiled and recorded once stays so.

    An epoch has everything in it that a run's has but saving, which a run bounds by a small share of its time.
    """

    def __init__(self, model: MultiExitModel, recipe: Recipe, data: Dataset, device: torch.device) -> None:
        self._rows, self._world = training_data(data), World(0, 1, device)
        (phase,) = planned_phases(recipe)
        fixed = phase_settings(recipe, phase, model, self._rows, num_processes=1)
        self._execution = make_execution(recipe, model.backbone, device)
        with self._set_up():
            self._phase = begin_phase(
                model, fixed, execution=self._execution, world=self._world, tracking=None, display=Display(quiet=True)
            )
        self._feed = Feed(self._rows, self._execution)

    def epoch(self, after_step: Callable[[int], None] = lambda done: None) -> float:
        """Train on the whole split and evaluate; the seconds until the losses and scores are there."""
        with tempfile.TemporaryDirectory() as name, self._set_up():
            folder = RunFolder(Path(name))
            folder.saved_at = time.monotonic() + 1e9
            started = time.perf_counter()
            train_epoch(self._phase, self._feed, journal=Journal(folder, Steps(after_step), {}))
            self._phase.validate(self._feed)
            self._phase.sums.take()
            seconds = time.perf_counter() - started
        progress = self._phase.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        return seconds

    def _set_up(self) -> AbstractContextManager[None]:
        execution = self._execution
        return settings(execution.precision, execution.device, deterministic=execution.deterministic, training=True)


def write_predictions(path: Path, *, rows: int, exits: int, classes: int) -> None:
    """A predictions file whose later exits are surer and more often right, written exit by exit."""
    generator = np.random.default_rng(0)
    labels, ease = generator.integers(classes, size=rows), generator.normal(size=(rows, 1)).astype(np.float32)
    about = {"kind": "predictions", "schema": 1, "split": "calibration", "task": "classification"}
    about |= {"fingerprint": "0", "checkpoint": "0"}
    size = 4 * exits * rows * classes
    tensors = {"logits": {"dtype": "F32", "shape": [exits, rows, classes], "data_offsets": [0, size]}}
    tensors["labels"] = {"dtype": "I64", "shape": [rows], "data_offsets": [size, size + 8 * rows]}
    header = json.dumps({"__metadata__": {"format": "pt", "eectl": json.dumps(about)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for number in range(exits):
            for start in range(0, rows, 5000):
                part = slice(start, min(start + 5000, rows))
                logits = generator.standard_normal((part.stop - start, classes), dtype=np.float32)
                strength = 3 + 5 * number / exits + 2 * ease[part]
                logits[np.arange(len(logits)), labels[part]] += strength[:, 0]
                file.write((logits * (1 + number / exits)).tobytes())
        file.write(labels.astype("<i8").tobytes())


def map_predictions(path: Path, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels as the file has them, without a copy in memory."""
    with path.open("rb") as file:
        offset = 8 + struct.unpack("<Q", file.read(8))[0]
    logits = np.memmap(path, "<f4", "c", offset, shape)
    labels = np.memmap(path, "<i8", "c", offset + logits.nbytes, shape[1])
    return torch.from_numpy(logits), torch.from_numpy(labels)
