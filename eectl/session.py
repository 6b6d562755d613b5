"""A checkpoint together with the data it was trained on: what every verb that measures a network starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eectl.checkpoint import Checkpoint, load_checkpoint
from eectl.costs import Costs, measure_costs
from eectl.data import Augmenter, Dataset, Split, check_disjoint, eval_batches, eval_order, load_data
from eectl.distributed import World, gather_rows
from eectl.errors import EectlError
from eectl.predict import Predictions, check_belongs, load_predictions, make_predictions, predict_rows


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
    data = next(read, None) or load_data(
        spec if data_root is None else spec.model_copy(update={"root": data_root}), device=world.device
    )
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


def split_predictions(session: Session, name: str, *, file: Path | None = None, batch_size: int | None = None) -> Predictions:
    """Every exit's outputs on a split: from `file` where one is given, else by one pass over the split, on all processes.

    Raises EectlError for a file made by another checkpoint or from other rows.
    """
    split, checkpoint, world = session.data.splits[name], session.checkpoint, session.world
    if file is not None:
        read = load_predictions(file)
        check_belongs(read, checkpoint.digest, path=file)
        if read.fingerprint != split.fingerprint:
            raise EectlError(f"{file}: holds the {read.split} split, or other rows, where {name} is needed; make it again")
        return read
    if len(split) < world.size:
        raise EectlError(f"{name} has {len(split)} rows for {world.size} processes; start at most one process per row")
    task = checkpoint.about.task
    augmenter = Augmenter(session.data.info, checkpoint.about.data_spec.augment, len(session.data.info.classes))
    size = batch_size or checkpoint.about.eval_batch_size
    order = eval_order(split, rank=world.rank, world=world.size)
    try:
        logits, labels = predict_rows(
            checkpoint.model,
            eval_batches(split, batch_size=size, rank=world.rank, world=world.size),
            num_rows=len(order),
            prepare=augmenter.eval,
        )
    except torch.OutOfMemoryError as error:
        raise EectlError(f"out of memory on {world.device}; try --batch-size {max(size // 2, 1)} (it is {size})") from error
    if split.lengths is not None:  # texts come by length
        back = order.argsort()
        logits, labels = logits[:, back], labels[back]
    if world.size > 1:
        by_row = gather_rows(logits.transpose(0, 1).contiguous().to(world.device), num_rows=len(split))
        logits = by_row.cpu().transpose(0, 1).contiguous()
        labels = gather_rows(labels.to(world.device), num_rows=len(split)).cpu()
    return make_predictions(logits, labels, split=name, fingerprint=split.fingerprint, checkpoint=checkpoint.digest, task=task)
