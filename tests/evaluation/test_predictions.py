"""The pass over a split and its file: order, types, what is kept of rows that come in any order, and memory."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tape import Tape
from toy_exits import WIDTH, score, toy_model, toy_outputs

from eectl.core.distributed import World
from eectl.core.errors import EectlError
from eectl.core.tensor_files import read_metadata, write_tensors
from eectl.evaluation import predictions as predict
from eectl.evaluation.predictions import check_belongs, keeping, predict_rows, read_provenance, read_scored
from eectl.exits.criteria import find_criterion
from eectl.exits.scores import Provenance
from eectl.models.losses import TASKS

ALONE = World(0, 1, torch.device("cpu"))
MADE = Provenance("test", "f", "digest", TASKS["classification"])
MAX_SOFTMAX = find_criterion("max-softmax", task=TASKS["classification"], num_exits=3)


def write(path, logits, labels, *, task="classification", parts=None):
    """A predictions file, from rows in the order of `parts`, lists of row numbers."""
    made = Provenance("test", "f", "digest", TASKS[task])
    with keeping(path, made, num_exits=len(logits), num_outputs=logits.shape[2], labels=labels, world=ALONE) as keeper:
        for rows in parts or [range(len(labels))]:
            rows = torch.tensor(list(rows))
            keeper.keep(logits[:, rows], rows)
        keeper.finish()


@pytest.mark.parametrize("size", [1, 5, 11, 100])
def test_rows_keep_their_order(size, tmp_path):
    model = toy_model()
    pixels, labels = torch.randint(256, (11, WIDTH), dtype=torch.uint8), torch.arange(11) % 4
    batches = [SimpleNamespace(inputs=pixels[rows], targets=labels[rows], rows=rows) for rows in torch.arange(11).split(size)]
    with keeping(tmp_path / "p", MADE, num_exits=3, num_outputs=4, labels=labels, world=ALONE) as keeper:
        table = predict_rows(
            model,
            batches,
            num_rows=11,
            criterion=MAX_SOFTMAX,
            prepare=lambda x: x.float() / 255,
            keeper=keeper,
        )
    with torch.no_grad():
        expected = torch.stack([output.logits for output in model(pixels.float() / 255)])
    torch.testing.assert_close(table[0], expected.softmax(dim=2).amax(dim=2))
    assert torch.equal(table[1].bool(), expected.argmax(dim=2) == labels)
    assert torch.equal(table[3].long(), expected.argmax(dim=2))
    torch.testing.assert_close(table[4:].movedim(0, 2), expected.softmax(dim=2))
    assert table.shape == (4 + 4, 3, 11) and not table.requires_grad
    torch.testing.assert_close(load_file(tmp_path / "p")["logits"], expected)


def test_a_recorded_pass_gives_and_keeps_the_same(tmp_path):
    torch.manual_seed(0)
    model, tape = toy_model(), Tape()
    pixels, labels = torch.rand(35, WIDTH), torch.arange(35) % 4
    batches = [SimpleNamespace(inputs=pixels[rows], targets=labels[rows], rows=rows) for rows in torch.arange(35).split(4)]
    tables = {}
    for name, recorder in {"plain": None, "recorded": tape}.items():
        with keeping(tmp_path / name, MADE, num_exits=3, num_outputs=4, labels=labels, world=ALONE) as keeper:
            tables[name] = predict_rows(model, batches, num_rows=35, criterion=MAX_SOFTMAX, keeper=keeper, recorder=recorder)
    assert torch.equal(tables["plain"], tables["recorded"]) and tape.replays == 7  # of 9 batches: one plain, one of three rows
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "recorded").read_bytes()


PARTS = {
    "in-order": [range(8), range(8, 13)],
    "one-by-one": [[row] for row in range(13)],
    "by-length": [[12, 3, 4, 5, 0], [1, 2, 7, 6], [11, 10, 8, 9]],
    "strided": [[0, 2, 4], [6, 8, 10, 12], [1, 3, 5, 7, 9, 11]],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_file_has_every_row_in_its_place(tmp_path, task, parts):
    logits, labels = toy_outputs(num_rows=13, task=task)
    write(tmp_path / "p", logits, labels, task=task, parts=parts)
    read = load_file(tmp_path / "p")
    assert torch.equal(read["logits"], logits) and torch.equal(read["labels"], labels) and read["labels"].dtype == labels.dtype
    about = {"split": "test", "fingerprint": "f", "checkpoint": "digest", "task": task, "precision": "float32"}
    assert read_metadata(tmp_path / "p", kind="predictions", schema=1) == {"kind": "predictions", "schema": 1, **about}
    assert read_provenance(tmp_path / "p").to_json() == about


@pytest.mark.parametrize("rows_at_once", [0, 1, 6, 12, 13, 14])
@pytest.mark.parametrize("criterion", ["max-softmax", "entropy", "margin", "patience", "difference", "difference-2"])
def test_reading_by_parts(tmp_path, monkeypatch, rows_at_once, criterion):
    task = "regression" if criterion.startswith("difference") else "classification"
    logits, labels = toy_outputs(num_exits=4, num_rows=13, task=task, num_classes=5)
    write_tensors(
        tmp_path / "p", {"logits": logits, "labels": labels}, {"kind": "predictions", "schema": 1, **MADE.to_json(), "task": task}
    )
    monkeypatch.setattr(predict, "BYTES_AT_ONCE", rows_at_once * logits[:, 0].numel() * 4)
    rule = find_criterion(criterion, task=TASKS[task], num_exits=4)
    found, expected = read_scored(tmp_path / "p", criterion=rule), score(logits, labels, criterion=criterion, task=task)
    for name, value in vars(expected).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(getattr(found, name), value), name


def test_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "test.safetensors"
    logits, labels = toy_outputs()
    write(path, logits, labels)
    words = r"test\.safetensors was made by another checkpoint \(digest…, this one is 012345678901…\)"
    check_belongs(read_provenance(path), "digest", path=path)
    with pytest.raises(EectlError, match=words):
        check_belongs(read_provenance(path), "0123456789012345", path=path)
    logits[1, 7, 0] = torch.nan
    write(path, logits, labels)
    with pytest.raises(EectlError, match=r"not finite at exit 2 \(1 of 200 rows\)"):
        read_scored(path, criterion=MAX_SOFTMAX)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EectlError, match="cut short"):
        read_scored(path, criterion=MAX_SOFTMAX)
    write_tensors(path, {"w": torch.zeros(1)}, {"kind": "checkpoint", "schema": 1})
    with pytest.raises(EectlError, match="not a predictions of eectl's"):
        read_scored(path, criterion=MAX_SOFTMAX)


def peak(act):
    """By how many bytes this process's peak memory is above what it had before."""
    Path("/proc/self/clear_refs").write_text("5")

    def read(name):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line)

    before = read("VmRSS")
    act()
    return read("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_memory_does_not_grow_with_the_file(tmp_path):
    labels, model = torch.zeros(5000, dtype=torch.int64), toy_model(num_outputs=4000)
    rows = torch.arange(5000).split(100)
    batches = (SimpleNamespace(inputs=torch.ones(len(each), WIDTH), targets=labels[each], rows=each) for each in rows)

    def whole_pass():
        with keeping(tmp_path / "p", MADE, num_exits=3, num_outputs=4000, labels=labels, world=ALONE) as keeper:
            predict_rows(model, batches, num_rows=5000, criterion=MAX_SOFTMAX, keeper=keeper)

    pass_peak = peak(whole_pass)
    assert (tmp_path / "p").stat().st_size > 240_000_000
    assert pass_peak < 80_000_000
    assert peak(lambda: read_scored(tmp_path / "p", criterion=MAX_SOFTMAX)) < 80_000_000
