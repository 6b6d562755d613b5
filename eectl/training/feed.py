"""The source of a phase's batches: rows of the splits, augmented on the device, or what exits read of them, computed once.

Images are augmented in windows: several steps' batches in one go, each from its own step's seed, so a batch has the same bits in
any window and a resumed epoch goes on as if it had never stopped.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eectl.core.ahead import ahead
from eectl.core.distributed import World
from eectl.data import Augmenter, Batch, Dataset, Split, eval_batches, join_draws, train_batches
from eectl.models.losses import TASKS, Task
from eectl.models.multi_exit import MultiExitModel, Reads
from eectl.training.feature_cache import CachedSplit, cache_splits
from eectl.training.running import Execution

WINDOW_BYTES = 256 * 2**20  # of the float32 images of a window, of which there are two at a time, and a few of what made them
MOST_STEPS = 64  # in a window: launches are few by then, and drawing for more would keep the first step waiting


class TrainingBatch(NamedTuple):
    """A batch as the network takes it: images, augmented and laid out, texts, or what exits read of its rows; and its targets."""

    inputs: Tensor | Reads
    targets: Tensor


@dataclass(frozen=True)
class TrainingData:
    """The rows that train and that decide on early stopping, how a batch of them is augmented, and the task that they set.

    `repeats` is how often each image comes in a row of an epoch.
    """

    train: Split
    validation: Split
    augmenter: Augmenter
    task: Task
    input_shape: tuple[int, ...]
    repeats: int = 1


def training_data(data: Dataset) -> TrainingData:
    """Return what training takes from a data set."""
    info = data.info
    augmenter = Augmenter(info, data.augment, len(info.classes))
    return TrainingData(
        data.splits["train"], data.splits["validation"], augmenter, TASKS[info.task], info.input_shape, data.augment.repeats
    )


def window_length(input_shape: Sequence[int], batch_size: int, device: torch.device) -> int:
    """Return how many steps' batches of images, `batch_size` a process, are augmented in one go.

    A GPU waits for launches, which a window divides among its steps. A CPU does not, and finds a single batch in its caches.
    """
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_STEPS, WINDOW_BYTES // (4 * batch_size * math.prod(input_shape))))


@dataclass(frozen=True)
class Feed:
    """The batches of a phase, as its network takes them. `cached` holds what exits read of each split, or nothing.

    `window` is the number of steps whose images are augmented in one go; None: what `window_length` says.
    """

    data: TrainingData
    execution: Execution
    cached: dict[str, CachedSplit] = field(default_factory=dict)
    window: int | None = None

    def training(
        self, *, batch_size: int, seed: int, epoch: int, start: int, world: World, step_seed: Callable[[int], int]
    ) -> Iterator[TrainingBatch]:
        """Yield this process's part of each batch of an epoch, from batch `start` on, as the network takes it.

        `step_seed` gives the seed that batch number i of the epoch is augmented from. What augments draws from torch's global
        CPU generator, whenever a window is due: who draws from it too has to seed it before.
        """
        cached = self.cached.get("train")
        split = cached.split if cached else self.data.train
        whole = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start": start, "rank": world.rank, "world": world.size}
        if cached:
            for batch in train_batches(split, **whole):
                yield TrainingBatch(cached.take(batch.inputs), batch.targets)
        elif split.lengths is not None:
            for batch in train_batches(split, **whole):
                yield TrainingBatch(batch.inputs, batch.targets)
        else:
            window = self.window or window_length(self.data.input_shape, -(-batch_size // world.size), world.device)
            batches = train_batches(split, **whole, window=window, repeats=self.data.repeats)
            windows = self._windows(batches, start=start, step_seed=step_seed)
            yield from ahead(windows, world.device)

    def _windows(self, batches: Iterator[Batch], *, start: int, step_seed: Callable[[int], int]) -> Iterator[list[TrainingBatch]]:
        """Augment windows of batches, whose rows are [batch, row]; the first batch of them is number `start` of the epoch."""
        augmenter, generator = self.data.augmenter, torch.default_generator
        for window in batches:
            count, rows = window.rows.shape
            draws = []
            for number in range(start, start + count):
                generator.manual_seed(step_seed(number))
                draws.append(augmenter.draw(rows, window.inputs.shape[-2:]))
            start += count
            inputs, targets = augmenter.apply(window.inputs, window.targets, join_draws(draws))
            parts = torch.split(self.execution.laid_out(inputs), rows), torch.split(targets, rows)
            yield [TrainingBatch(*batch) for batch in zip(*parts, strict=True)]

    def validation(self, *, batch_size: int, world: World) -> Iterator[tuple[Tensor | Reads, Tensor]]:
        """Yield this process's part of the validation split: (inputs as the network takes them, targets)."""
        cached = self.cached.get("validation")
        split = cached.split if cached else self.data.validation
        for batch in eval_batches(split, batch_size=batch_size, rank=world.rank, world=world.size):
            yield (cached.take(batch.inputs) if cached else self._plain(batch.inputs)), batch.targets

    def keeping_reads(self, model: MultiExitModel, *, limit: float, batch_size: int, world: World) -> "tuple[Feed, str]":
        """Return a feed of what the exits read of all rows, computed now, and the amount in words.

        Where that takes more than `limit` bytes in a process, the feed is this one.
        """

        def read(inputs: Tensor) -> Reads:
            with torch.no_grad(), self.execution.autocast():
                return model.reads(self._plain(inputs))

        splits = {"train": self.data.train, "validation": self.data.validation}
        cached, amount = cache_splits(model, splits, read, limit=limit, batch_size=batch_size, world=world)
        return Feed(self.data, self.execution, cached), amount

    def _plain(self, inputs: Tensor) -> Tensor:
        return self.execution.laid_out(self.data.augmenter.eval(inputs))
