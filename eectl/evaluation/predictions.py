"""The one expensive pass over a split: every exit's outputs, reduced as they come, and the file that keeps them all.

Neither the pass nor reading the file holds more than some rows' logits in memory. Chooses nothing and scores no policy.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from eectl.core.capture import Capture, Recorder
from eectl.core.distributed import World, path_of_main
from eectl.core.errors import EectlError
from eectl.core.json_files import checked
from eectl.core.kinds import Text
from eectl.core.precision import FLOAT32
from eectl.core.tensor_files import read_metadata
from eectl.core.tensor_parts import TensorParts, join_parts, new_parts, open_parts
from eectl.data import Batch
from eectl.exits.criteria import Criterion
from eectl.exits.scores import Provenance, ScoredRows, keeps_outputs, reduce_rows, scored_from
from eectl.models.losses import TASKS, Task
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.choices import TaskName

KIND, SCHEMA = "predictions", 1
AGAIN = "make it again with --save-predictions"
BYTES_AT_ONCE = 24_000_000  # of logits that are read and reduced at a time: malloc gives fresh pages from 32 MiB on, every time
WORTH_BATCHES = 8  # in a pass: recording takes about the time of a few
_DTYPES = {"F32": torch.float32, "I64": torch.int64}


class Keeper:
    """Writes logits into a predictions file. Those of a GPU are copied while the next batch is computed, and then written."""

    def __init__(self, file: TensorParts) -> None:
        self._file = file
        self._waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    def keep(self, logits: Tensor, rows: Tensor) -> None:
        """Take the logits [exit, row, class], float32, of these rows of the split."""
        if logits.device.type != "cuda":
            self._write(logits.cpu(), rows)
            return
        host = torch.empty(logits.shape, pin_memory=True)  # torch keeps such memory and gives it out again
        host.copy_(logits, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self.finish()
        self._waiting = (host, rows, copied)

    def finish(self) -> None:
        """Write what is still on its way."""
        if self._waiting is not None:
            host, rows, copied = self._waiting
            copied.synchronize()
            self._write(host, rows)
            self._waiting = None

    def _write(self, logits: Tensor, rows: Tensor) -> None:
        for start, stop in _runs(rows):
            for index, exit_logits in enumerate(logits):
                self._file.write("logits", exit_logits[start:stop], at=(index, int(rows[start])))


def _runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the stretches of row numbers that rise by one, as positions from and up to."""
    cuts = (rows.diff() != 1).nonzero()[:, 0] + 1
    yield from pairwise([0, *cuts.tolist(), len(rows)])


def _as_it_is(inputs: Tensor) -> Tensor:
    return inputs


@torch.inference_mode()
def predict_rows(
    model: MultiExitModel,
    batches: Iterable[Batch],
    *,
    num_rows: int,
    criterion: Criterion,
    prepare: Callable[[Tensor], Tensor] = _as_it_is,
    keeper: Keeper | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Return the table [plane, exit, row] of `num_rows` rows (see `reduce_rows`), on the CPU, in the order in which they come.

    `prepare` brings a batch's inputs to the network's device and normalises them. The network must be in eval mode. No batch
    waits for the device; with a `keeper` each waits for the one before it. With a `recorder` the pass over a batch of images, all
    of one shape but the last, is recorded on the second and replayed from then on.
    """
    assert not any(module.training for module in model.modules())
    table = torch.empty(0)
    start = 0

    def run(inputs: Tensor) -> Tensor:
        return torch.stack([output.logits.float() for output in model(inputs)])

    capture = Capture(recorder, plain_calls=1)
    recorded = capture.function(run)
    for batch in batches:
        inputs = prepare(batch.inputs)
        logits = recorded(inputs) if inputs.is_floating_point() and num_rows >= WORTH_BATCHES * len(inputs) else run(inputs)
        keep = _keeps(logits, num_rows, criterion)
        part = reduce_rows(logits, batch.targets, criterion=criterion, keep=keep)
        if not start:
            table = part.new_empty(*part.shape[:2], num_rows)
        stop = start + len(batch.targets)
        assert part.shape[2] == stop - start and stop <= num_rows
        table[:, :, start:stop] = part
        if keeper is not None:
            keeper.keep(logits, batch.rows)
        start = stop
    assert start == num_rows, f"{start} rows came, {num_rows} were announced"
    if keeper is not None:
        keeper.finish()
    capture.close()
    return table.cpu()


def _keeps(logits: Tensor, num_rows: int, criterion: Criterion) -> bool:
    """Return whether the outputs of a split of `num_rows` rows, some of whose are `logits` [exit, row, output], are kept."""
    return keeps_outputs(criterion.task, num_exits=len(logits), num_rows=num_rows, num_outputs=logits.shape[2])


@contextmanager
def keeping(
    path: Path,
    made: Provenance,
    *,
    num_exits: int,
    num_outputs: int,
    labels: Tensor,
    world: World,
    overwrite: bool = True,
) -> Iterator[Keeper]:
    """Open a predictions file that all processes fill while the pass goes on; it is there when the block ends well in process 0.

    Process 0 makes it at its full size under another name and the others write their rows into it, so it must lie in a folder
    that all processes see. The block may end in process 0 only when all rows are written: let it gather something after them.
    Raises EectlError where the file cannot be written.
    """
    if not world.is_main:
        with join_parts(path_of_main(), of=path) as file:
            yield Keeper(file)
        return
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    layout = {"logits": ("F32", (num_exits, len(labels), num_outputs)), "labels": (kinds[labels.dtype], tuple(labels.shape))}
    metadata = {"kind": KIND, "schema": SCHEMA, **made.to_json()}
    with new_parts(path, layout, metadata, overwrite=overwrite) as (file, temporary):
        path_of_main(temporary)
        file.write("labels", labels)
        yield Keeper(file)


@dataclass(frozen=True)
class _Form:
    """The metadata of a predictions file, beside its tensors."""

    split: Text
    fingerprint: Text
    checkpoint: Text
    task: TaskName
    precision: Text = FLOAT32  # older files name none


def read_provenance(path: Path) -> Provenance:
    """Return whose outputs a predictions file holds; raises EectlError for a file that is something else, or damaged."""
    about = checked(_Form, read_metadata(path, kind=KIND, schema=SCHEMA, again=AGAIN), where=path, again=AGAIN)
    return Provenance(about.split, about.fingerprint, about.checkpoint, TASKS[about.task], about.precision)


def read_scored(path: Path, *, criterion: Criterion, shape: tuple[int, int, int] | None = None) -> ScoredRows:
    """Return what a criterion sees in a predictions file, read and reduced some rows at a time.

    Args:
        path: the file.
        criterion: how ready an exit is.
        shape: the exits, rows and outputs that the network and the split have. Default: as many as there are.

    Raises:
        EectlError: the file is something else, or damaged, or has outputs that are not finite.
    """
    made = read_provenance(path)
    with open_parts(path, again=AGAIN) as file:
        (kind, label_shape), (num_exits, num_rows, num_outputs) = _read_layout(file, made.task)
        if shape is not None and shape != (num_exits, num_rows, num_outputs):
            found = f"{num_exits} exits, {num_rows} rows and {num_outputs} outputs"
            raise EectlError(f"{path}: outputs of {found}, needed are {', '.join(map(str, shape))} of them; {AGAIN}")
        labels = torch.empty(label_shape, dtype=_DTYPES[kind])
        file.read("labels", labels)
        num_classes = num_outputs + (made.task.name == "ordinal")
        if kind == "I64" and not bool(((labels >= 0) & (labels < num_classes)).all()):
            raise EectlError(f"{path}: labels that are not of {num_classes} classes; {AGAIN}")
        if made.task.name == "multilabel" and not bool(((labels == 0) | (labels == 1)).all()):
            raise EectlError(f"{path}: labels that are neither 0 nor 1; {AGAIN}")
        at_once = max(BYTES_AT_ONCE // (4 * num_exits * num_outputs), 1)
        buffer = torch.empty(num_exits * at_once * num_outputs)
        table = torch.empty(0)
        for start in range(0, num_rows, at_once):
            targets = labels[start : start + at_once]
            logits = buffer[: num_exits * len(targets) * num_outputs].view(num_exits, len(targets), num_outputs)
            for index, exit_logits in enumerate(logits):
                file.read("logits", exit_logits, at=(index, start))
            part = reduce_rows(logits, targets, criterion=criterion, keep=_keeps(logits, num_rows, criterion))
            if not start:  # one table from the start: parts that are kept would lie between the buffers and keep them from reuse
                table = part.new_empty(*part.shape[:2], num_rows)
            table[:, :, start : start + len(targets)] = part
    return scored_from(table, labels, made, criterion=criterion)


def _read_layout(file: TensorParts, task: Task) -> tuple[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """Return the type and shape of a file's labels, and how many exits, rows and outputs it has."""
    logits, labels = (file.layout.get(name, ("", ())) for name in ("logits", "labels"))
    sizes = logits[1]
    has_several = task.name == "multilabel" or (task.predicts_number and sizes[2:] != (1,))
    wanted = "I64" if task.name in ("classification", "ordinal") else "F32", sizes[1:] if has_several else sizes[1:2]
    if set(file.layout) != {"logits", "labels"} or logits[0] != "F32" or labels != wanted or len(sizes) != 3 or not min(sizes):
        raise EectlError(f"{file.path}: its tensors are not the logits [exit, row, output] and labels of a {task.name}; {AGAIN}")
    return labels, sizes


def check_belongs(made: Provenance, checkpoint: str, *, path: Path) -> None:
    """Raise EectlError unless the outputs in `path` are those of the weights whose digest is `checkpoint`."""
    if made.checkpoint != checkpoint:
        raise EectlError(
            f"{path} was made by another checkpoint ({made.checkpoint[:12]}…, this one is {checkpoint[:12]}…); "
            "make it again with --save-predictions"
        )
