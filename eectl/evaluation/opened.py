"""A checkpoint and the data it was trained on, opened together: where every verb that measures a network starts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eectl.core.capture import recorder_for
from eectl.core.distributed import World, gather_rows, joined
from eectl.core.errors import EectlError, out_of_memory
from eectl.core.precision import FLOAT32, autocast, note_on_precision, resolve_precision, settings
from eectl.data import Augmenter, Dataset, Split, eval_batches, eval_order, load_data, place_of
from eectl.evaluation.predictions import Keeper, check_belongs, keeping, predict_rows, read_provenance, read_scored
from eectl.exits.costs import Costs, measure_costs
from eectl.exits.criteria import Criterion, find_criterion
from eectl.exits.policy import CostTable, Policies, ThresholdMetric
from eectl.exits.scores import Provenance, ScoredRows, scored_from
from eectl.models.checkpoint import Checkpoint, about_in, load_checkpoint, read_checkpoint_metadata
from eectl.models.losses import TASKS, Task


@dataclass(frozen=True)
class Header:
    """Facts of a checkpoint's file, known before its weights are read.

    They are the weights' digest, the task, how many exits there are, the precision in which the last phase trained, the size and
    fingerprint of each split, what thresholds make the best of unless something else is asked for, and the network's outputs.
    """

    digest: str
    task: Task
    num_exits: int
    precision: str
    splits: Mapping[str, Mapping[str, Any]]
    metric: ThresholdMetric = "score"
    num_outputs: int = 1

    def criterion(self, name: str | None, policies: Policies | None = None, *, path: Path | None = None) -> Criterion:
        """Return the criterion to measure with: that of `policies` read from `path`, else the one called `name`.

        Raises:
            EectlError: the criterion does not fit the network, or the policies are another's.
        """
        if policies is not None and path is not None:
            labels = self.num_outputs if self.task.name == "multilabel" else None
            policies.check(self.digest, num_exits=self.num_exits, splits=self.splits, path=path, num_labels=labels)
            name = policies.criterion.name
        return find_criterion(name, task=self.task, num_exits=self.num_exits)


def read_header(path: Path) -> Header:
    """Return what a checkpoint's file says, so that requests can be checked before anything is loaded."""
    metadata = read_checkpoint_metadata(path)
    about = about_in(path, metadata)
    num_exits = len(about.spec.after) + 1
    metric: ThresholdMetric = "balanced" if about.recipe.get("metric") == "balanced" else "score"
    return Header(
        metadata["weights"], TASKS[about.task], num_exits, about.precision, about.splits, metric, about.spec.num_outputs
    )


@contextmanager
def measuring(device: str, precision: str) -> Iterator[tuple[World, str]]:
    """Join torchrun's processes on a device and set torch up for a precision; when the block ends all is as it was.

    Gives this process's place and the precision that the device resolves the asked one to. Raises EectlError for a device or a
    precision that is not there.
    """
    with joined(device, hint="nothing was written: give the same command again") as world:
        found = resolve_precision(precision, world.device)
        with settings(found, world.device):
            yield world, found


@dataclass(frozen=True)
class Session:
    """A loaded network, its data and what each exit costs in MACs; passes over the data are computed in `precision`.

    `notes` say what the user should know about the data, and about a precision that is not the one of training.
    """

    checkpoint: Checkpoint
    data: Dataset
    costs: Costs
    world: World
    notes: tuple[str, ...]
    precision: str = FLOAT32

    @property
    def task(self) -> Task:
        """The kind of problem that the network solves."""
        return TASKS[self.checkpoint.about.task]

    @property
    def channels_last(self) -> bool:
        """True where the network and its inputs lie in memory channels last, as they did in training."""
        return self.checkpoint.channels_last

    @property
    def macs(self) -> CostTable:
        """The costs of a row in MACs."""
        return CostTable(self.costs.exits, self.costs.plain)


def open_session(
    path: Path,
    *,
    world: World,
    precision: str | None = None,
    data_root: Path | None = None,
    needs: Sequence[str] = (),
    like: "Sequence[Session]" = (),
) -> Session:
    """Load a checkpoint and its data.

    A test split that differs from the recorded one is allowed and noted.

    Args:
        path: The checkpoint.
        world: This process and its device.
        precision: What passes are computed in, resolved; default: float32, and no note where training was not.
        data_root: Where the data lies; default: where the recipe says.
        needs: Splits that must be there.
        like: Sessions from which data read by the same recipe is taken.

    Raises:
        EectlError: the classes or the calibration and training rows are not those the checkpoint was made with, test rows that
            differ from the recorded ones are among them, or a split is missing.
    """
    checkpoint = load_checkpoint(path)
    spec = checkpoint.about.data_spec
    read = (each.data for each in like if each.checkpoint.about.data_spec == spec)
    data = next(read, None) or load_data(spec.at(data_root), device=world.device)
    for name in needs:
        if name not in data.splits:
            carve = ", or train with --set data.test=0.15, which carves one" if name == "test" else ""
            raise EectlError(f"{spec.name}: there is no {name} split; add {place_of(name, spec)}{carve}")
    notes = [*data.notes, *_check_splits(checkpoint, data)]
    if checkpoint.about.untrained:
        notes.append(
            f"exits {', '.join(map(str, checkpoint.about.untrained))} were never trained; run eectl train --phase 3 --from {path}"
        )
    if precision is not None:
        notes += note_on_precision(f"{path} was trained", checkpoint.about.precision, precision)
    costs = measure_costs(checkpoint.model, checkpoint.about.spec.input_shape)
    checkpoint.model.to(world.device)
    return Session(checkpoint, data, costs, world, tuple(notes), precision or FLOAT32)


def _check_splits(checkpoint: Checkpoint, data: Dataset) -> list[str]:
    about, path = checkpoint.about, checkpoint.path
    if list(about.data["classes"]) != list(data.info.classes):
        raise EectlError(
            f"{path}: made for the {len(about.data['classes'])} classes of {about.data['name']}, the data here has "
            f"{len(data.info.classes)} classes or other names; name the right folder with --data-root"
        )
    notes = []
    for name, split in data.splits.items():
        recorded = about.splits.get(name, {}).get("fingerprint")
        if recorded == split.fingerprint:
            continue
        if name != "test":
            raise EectlError(
                f"{path}: the {name} split is not the one recorded when it was trained ({split.fingerprint[:12]}… for "
                f"{str(recorded)[:12]}…), so rows may have moved between splits; point --data-root at the same {_as_read(split)}"
            )
        notes.append("the test split is not the one recorded when the checkpoint was trained")
    if notes:  # training has let the recorded test rows pass, not these
        data.copies.check()
    return notes + data.copies.of_test()


def _as_read(split: Split) -> str:
    return split.noun if split.lengths is None else "texts, and take the same tokenizer"


def score_split(
    session: Session,
    name: str,
    *,
    criterion: Criterion,
    file: Path | None = None,
    save_to: Path | None = None,
    overwrite: bool = True,
    batch_size: int | None = None,
) -> ScoredRows:
    """Return what a criterion sees in every exit's outputs on a split, on every process.

    Args:
        session: The network and its data.
        name: The split.
        criterion: How ready an exit is.
        file: Predictions to take it from; default: one pass over the split, on all processes.
        save_to: Where the pass writes the outputs.
        overwrite: Whether a file that came there meanwhile gives way.
        batch_size: Rows at once; default: the recipe's.

    Raises:
        EectlError: the file was made by another checkpoint or from other rows, or outputs are not finite.
    """
    split, checkpoint, world = session.data.splits[name], session.checkpoint, session.world
    if file is not None:
        if save_to is not None:
            raise EectlError(
                f"--save-predictions {save_to} keeps what a pass gives, and --predictions stands in for the pass; leave one out"
            )
        read = read_provenance(file)
        check_belongs(read, checkpoint.digest, path=file)
        if read.fingerprint != split.fingerprint:
            raise EectlError(f"{file}: holds the {read.split} split, or other rows, where {name} is needed; make it again")
        sizes = (checkpoint.model.num_exits, len(split), checkpoint.about.spec.num_outputs)
        return read_scored(file, criterion=criterion, shape=sizes)
    if len(split) < world.size:
        raise EectlError(f"{name} has {len(split)} rows for {world.size} processes; start at most one process per row")
    made = Provenance(name, split.fingerprint, checkpoint.digest, session.task, session.precision)
    num_exits, num_outputs = checkpoint.model.num_exits, checkpoint.about.spec.num_outputs
    shape = {"num_exits": num_exits, "num_outputs": num_outputs}
    with (
        keeping(save_to, made, **shape, labels=split.labels, world=world, overwrite=overwrite) if save_to else nullcontext()
    ) as keeper:
        table = _pass(session, split, criterion, keeper, batch_size)
        if world.size > 1:
            table = gather_rows(table.permute(2, 0, 1).contiguous(), num_rows=len(split)).permute(1, 2, 0).contiguous()
        return scored_from(table, split.labels, made, criterion=criterion)


@contextmanager
def pass_kept(save_to: Path | None) -> Iterator[None]:
    """Add to an EectlError of the block, in which outputs are written, that the pass before it need not be made again."""
    try:
        yield
    except EectlError as error:
        if save_to is None:
            raise
        raise EectlError(f"{error}; the pass is kept: give --predictions {save_to} in place of another") from error


def _pass(session: Session, split: Split, criterion: Criterion, keeper: Keeper | None, batch_size: int | None) -> Tensor:
    """Return the table [plane, exit, row] of this process's rows of a split, in the split's order."""
    checkpoint, world = session.checkpoint, session.world
    order = eval_order(split, rank=world.rank, world=world.size)
    size = batch_size or checkpoint.about.eval_batch_size
    try:
        with autocast(session.precision, world.device, keeps_casts=True):
            table = predict_rows(
                checkpoint.model,
                eval_batches(split, batch_size=size, rank=world.rank, world=world.size),
                num_rows=len(order),
                criterion=criterion,
                prepare=preparing(session),
                keeper=keeper,
                recorder=recorder_for(world.device),
            )
    except torch.OutOfMemoryError as error:
        raise out_of_memory(world.device, "--batch-size ", size) from error
    return table if split.lengths is None else table[:, :, order.argsort()]  # texts come by length


def preparing(session: Session) -> Callable[[Tensor], Tensor]:
    """Return a function that brings a batch's inputs into the form that the network takes in evaluation.

    The network's weights come to lie in memory as the inputs do.
    """
    checkpoint, info = session.checkpoint, session.data.info
    augmenter = Augmenter(info, checkpoint.about.data_spec.augment, len(info.classes))
    if not session.channels_last:
        return augmenter.eval
    checkpoint.model.to(memory_format=torch.channels_last)
    return lambda images: augmenter.eval(images).contiguous(memory_format=torch.channels_last)
