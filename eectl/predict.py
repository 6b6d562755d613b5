"""The one expensive pass: every exit's outputs on every row of a split, and their file. Chooses nothing and scores nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eectl.errors import EectlError
from eectl.files import read_tensors, write_tensors
from eectl.models.multi_exit import MultiExitModel

KIND, SCHEMA = "predictions", 1


class Batch(Protocol):
    """Rows of a split, in order."""

    @property
    def inputs(self) -> Tensor:
        """[row, …]"""

    @property
    def targets(self) -> Tensor:
        """[row]"""


@dataclass(frozen=True)
class Predictions:
    """Outputs of all exits on one split: logits [exit, row, class] in float32 and labels [row], on the CPU, in the split's order.

    `checkpoint` is the weights' digest, `split` and `fingerprint` name the rows, `task` is an entry of TASKS.
    """

    logits: Tensor
    labels: Tensor
    split: str
    fingerprint: str
    checkpoint: str
    task: str


def _as_it_is(inputs: Tensor) -> Tensor:
    return inputs


@torch.inference_mode()
def predict_rows(
    model: MultiExitModel,
    batches: Iterable[Batch],
    *,
    num_rows: int,
    prepare: Callable[[Tensor], Tensor] = _as_it_is,
) -> tuple[Tensor, Tensor]:
    """Logits [exit, row, class] in float32 and labels [row] of `num_rows` rows, on the CPU, in the order in which they come.

    `prepare` brings a batch's inputs to the network's device and normalises them. The network must be in eval mode.
    """
    assert not any(module.training for module in model.modules())
    logits = labels = torch.empty(0)
    start = 0
    for batch in batches:
        outputs = [output.logits.float() for output in model(prepare(batch.inputs))]
        if not start:
            logits = torch.empty(len(outputs), num_rows, outputs[0].shape[1])
            labels = torch.empty(num_rows, dtype=batch.targets.dtype)
        stop = start + len(batch.targets)
        assert len(outputs[0]) == len(batch.targets) and stop <= num_rows
        logits[:, start:stop] = torch.stack(outputs).to("cpu")
        labels[start:stop] = batch.targets
        start = stop
    assert start == num_rows, f"{start} rows came, {num_rows} were announced"
    return logits, labels


def make_predictions(logits: Tensor, labels: Tensor, *, split: str, fingerprint: str, checkpoint: str, task: str) -> Predictions:
    """Predictions from a whole split's rows; raises EectlError that names the exits whose outputs are not finite."""
    broken = [f"{number} ({bad} of {len(labels)} rows)" for number, bad in enumerate(map(_num_broken, logits), 1) if bad]
    if broken:
        raise EectlError(
            f"{split} split: outputs are not finite at exit {', '.join(broken)}; training diverged: train again with a smaller "
            "optimizer.lr, or with --set optimizer.clip_norm=1"
        )
    return Predictions(logits, labels, split, fingerprint, checkpoint, task)


def _num_broken(exit_logits: Tensor) -> int:
    return int((~exit_logits.isfinite()).any(dim=1).sum())


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions as one .safetensors file."""
    about: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "split": predictions.split, "fingerprint": predictions.fingerprint}
    about |= {"checkpoint": predictions.checkpoint, "task": predictions.task}
    write_tensors(path, {"logits": predictions.logits, "labels": predictions.labels}, about)


def load_predictions(path: Path) -> Predictions:
    """Read predictions; raises EectlError for a file that is something else."""
    tensors, about = read_tensors(path, kind=KIND, schema=SCHEMA)
    names = ("split", "fingerprint", "checkpoint", "task")
    return Predictions(tensors["logits"], tensors["labels"], **{name: about[name] for name in names})


def check_belongs(predictions: Predictions, checkpoint: str, *, path: Path) -> None:
    """Raise EectlError unless the predictions were made by the weights whose digest is `checkpoint`."""
    if predictions.checkpoint != checkpoint:
        raise EectlError(
            f"{path} was made by another checkpoint ({predictions.checkpoint[:12]}…, this one is {checkpoint[:12]}…); "
            "make it again with --save-predictions"
        )
