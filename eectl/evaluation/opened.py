"""A checkpoint together with the data it was trained on: what every verb that measures a network starts from."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eectl.core.distributed import World, gather_rows
from eectl.core.errors import EectlError
from eectl.data import Augmenter, Dataset, Split, check_disjoint, eval_batches, eval_order, load_data
from eectl.evaluation.predictions import Keeper, check_belongs, keeping, predict_rows, read_scored, read_source
from eectl.exits.costs import Costs, measure_costs
from eectl.exits.criteria import find_criterion
from eectl.exits.scores import Scored, Source, scored_from
from eectl.models.checkpoint import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class Session:
    """A loaded network, its data and what each exit costs; `notes` say what the user should know about the data."""

    checkpoint: Checkpoint
    data: Dataset
    costs: Costs
    world: World
    notes: tuple[str, ...]


def open_session(
    path: Path, *, world: World, data_root: Path | None = None, needs: Sequence[str] = (), like: "Sequence[Session]" = ()
) -> Session:
    """Load a checkpoint and its data, elsewhere than recorded where `data_root` says so.

    Data that a session in `like` has read by the same recipe is taken from there.

    Raises EectlError where the classes or the calibration and training rows are not those the checkpoint was made with, or
    where calibration and test rows overlap, or a split that the caller `needs` is not there. A test split that differs from
    the recorded one is allowed and noted.
    """
    checkpoint = load_checkpoint(path)
    spec = checkpoint.about.data_spec
    read = (each.data for each in like if each.checkpoint.about.data_spec == spec)
    data = next(read, None) or load_data(spec.at(data_root), device=world.device)
    for name in needs:
        if name not in data.splits:
            what = f"a {name} file beside train" if data.info.kind == "text" else f"a folder {name}/<class>/ beside train/"
            raise EectlError(f"{spec.name}: there is no {name} split; add {what}")
    notes = [*data.notes, *_check_splits(checkpoint, data)]
    if checkpoint.about.untrained:
        notes.append(
            f"exits {', '.join(map(str, checkpoint.about.untrained))} were never trained; run eectl train --phase 3 --from {path}"
        )
    costs = measure_costs(checkpoint.model, checkpoint.about.spec.input_shape)
    checkpoint.model.to(world.device)
    return Session(checkpoint, data, costs, world, tuple(notes))


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
    if "test" in data.splits:
        check_disjoint(data.splits["calibration"], data.splits["test"])
        shared = check_disjoint(data.splits["train"], data.splits["test"])
        if shared:
            notes.append(
                f"{shared} of {len(data.splits['test'])} test {data.splits['test'].noun} are also in the training "
                "split (exact copies)"
            )
    return notes


def _as_read(split: Split) -> str:
    return split.noun if split.lengths is None else "texts, and take the same tokenizer"


def score_split(
    session: Session,
    name: str,
    *,
    criterion: str | None,
    file: Path | None = None,
    save_to: Path | None = None,
    batch_size: int | None = None,
) -> Scored:
    """What `criterion` (none: the task's default) sees in every exit's outputs on a split, on every process.

    From `file` where one is given, else by one pass over the split, on all processes, which writes the outputs to `save_to`.
    Raises EectlError for a file made by another checkpoint or from other rows, and for outputs that are not finite.
    """
    split, checkpoint, world = session.data.splits[name], session.checkpoint, session.world
    if file is not None:
        if save_to is not None:
            raise EectlError(
                f"--save-predictions {save_to} keeps what a pass gives, and --predictions stands in for the pass; leave one out"
            )
        read = read_source(file)
        check_belongs(read, checkpoint.digest, path=file)
        if read.fingerprint != split.fingerprint:
            raise EectlError(f"{file}: holds the {read.split} split, or other rows, where {name} is needed; make it again")
        return read_scored(file, criterion=criterion)
    if len(split) < world.size:
        raise EectlError(f"{name} has {len(split)} rows for {world.size} processes; start at most one process per row")
    source = Source(name, split.fingerprint, checkpoint.digest, checkpoint.about.task)
    num_exits, num_outputs = checkpoint.model.num_exits, checkpoint.about.spec.num_outputs
    shape = {"num_exits": num_exits, "num_outputs": num_outputs}
    with keeping(save_to, source, **shape, labels=split.labels, world=world) if save_to else nullcontext() as keeper:
        table = _pass(session, split, criterion, keeper, batch_size)
        if world.size > 1:
            table = gather_rows(table.permute(2, 0, 1).contiguous(), num_rows=len(split)).permute(1, 2, 0).contiguous()
        return scored_from(table, split.labels, source, criterion=criterion)


def _pass(session: Session, split: Split, criterion: str | None, keeper: Keeper | None, batch_size: int | None) -> Tensor:
    """The table [plane, exit, row] of this process's rows of a split, in the split's order."""
    checkpoint, world = session.checkpoint, session.world
    order = eval_order(split, rank=world.rank, world=world.size)
    size = batch_size or checkpoint.about.eval_batch_size
    try:
        table = predict_rows(
            checkpoint.model,
            eval_batches(split, batch_size=size, rank=world.rank, world=world.size),
            num_rows=len(order),
            criterion=find_criterion(criterion, task=checkpoint.about.task, num_exits=checkpoint.model.num_exits),
            task=checkpoint.about.task,
            prepare=preparing(session),
            keeper=keeper,
        )
    except torch.OutOfMemoryError as error:
        raise EectlError(f"out of memory on {world.device}; try --batch-size {max(size // 2, 1)} (it is {size})") from error
    return table if split.lengths is None else table[:, :, order.argsort()]  # texts come by length


def lies_channels_last(checkpoint: Checkpoint) -> bool:
    """Whether a network and its inputs lie in memory channels last, as they did in training."""
    wish = checkpoint.about.recipe.get("channels_last", "auto")
    return bool(checkpoint.model.backbone.prefers_channels_last if wish == "auto" else wish)


def preparing(session: Session) -> Callable[[Tensor], Tensor]:
    """What brings a batch's inputs into the form the network takes in evaluation; the network's weights come to lie like them."""
    checkpoint, info = session.checkpoint, session.data.info
    augmenter = Augmenter(info, checkpoint.about.data_spec.augment, len(info.classes))
    if not lies_channels_last(checkpoint):
        return augmenter.eval
    checkpoint.model.to(memory_format=torch.channels_last)
    return lambda images: augmenter.eval(images).contiguous(memory_format=torch.channels_last)
