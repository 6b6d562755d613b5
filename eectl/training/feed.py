"""The source of a phase's batches: rows of the splits, augmented on the device, or what exits read of them, computed once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eectl.core.distributed import World
from eectl.data import Augmenter, Batch, Dataset, Split, eval_batches, train_batches
from eectl.models.losses import TASKS, Task
from eectl.models.multi_exit import MultiExitModel, Reads
from eectl.training.feature_cache import CachedSplit, cache_splits
from eectl.training.running import Execution


@dataclass(frozen=True)
class TrainingData:
    """The rows that train and that decide on early stopping, how a batch of them is augmented, and the task that they set."""

    train: Split
    validation: Split
    augmenter: Augmenter
    task: Task
    input_shape: tuple[int, ...]


def training_data(data: Dataset) -> TrainingData:
    """Return what training takes from a data set."""
    info = data.info
    augmenter = Augmenter(info, data.augment, len(info.classes))
    return TrainingData(data.splits["train"], data.splits["validation"], augmenter, TASKS[info.task], info.input_shape)


@dataclass(frozen=True)
class Feed:
    """The batches of a phase, as its network takes them. `cached` holds what exits read of each split, or nothing."""

    data: TrainingData
    execution: Execution
    cached: dict[str, CachedSplit] = field(default_factory=dict)

    def training(self, *, batch_size: int, seed: int, epoch: int, start: int, world: World) -> Iterator[Batch]:
        """Yield this process's part of each batch of an epoch, from batch `start` on, as it lies in the split."""
        split = self.cached["train"].split if self.cached else self.data.train
        yield from train_batches(
            split, batch_size=batch_size, seed=seed, epoch=epoch, start=start, rank=world.rank, world=world.size
        )

    def inputs_and_targets(self, batch: Batch) -> tuple[Tensor | Reads, Tensor]:
        """Return a training batch as the network takes it: augmented, or what its exits read of these rows."""
        if self.cached:
            return self.cached["train"].take(batch.inputs), batch.targets
        inputs, targets = self.data.augmenter.train(batch.inputs, batch.targets)
        return self.execution.laid_out(inputs), targets

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
