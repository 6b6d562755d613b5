"""The pass over a split: order, types, finiteness, and the file."""

from types import SimpleNamespace

import pytest
import torch
from toy_exits import WIDTH, toy_model, toy_predictions

from eectl.errors import EectlError
from eectl.files import write_tensors
from eectl.predict import check_belongs, load_predictions, make_predictions, predict_rows, save_predictions

ABOUT = {"split": "test", "fingerprint": "f", "checkpoint": "digest", "task": "classification"}


def batches_of(inputs, targets, size):
    return [SimpleNamespace(inputs=x, targets=y) for x, y in zip(inputs.split(size), targets.split(size), strict=True)]


@pytest.mark.parametrize("size", [1, 5, 11, 100])
def test_rows_keep_their_order(size):
    model = toy_model()
    pixels, labels = torch.randint(256, (11, WIDTH), dtype=torch.uint8), torch.arange(11) % 4
    batches = batches_of(pixels, labels, size)
    rows = predict_rows(model, batches, num_rows=11, prepare=lambda x: x.float() / 255)
    result = make_predictions(*rows, **ABOUT)
    with torch.no_grad():
        expected = torch.stack([output.logits for output in model(pixels.float() / 255)])
    torch.testing.assert_close(result.logits, expected)
    assert torch.equal(result.labels, labels) and result.labels.dtype == torch.int64
    assert not result.logits.requires_grad


def test_non_finite_outputs_name_the_exit():
    logits = torch.zeros(3, 4, 2)
    logits[1, 2, 0] = torch.nan
    logits[2, :, 1] = torch.inf
    with pytest.raises(EectlError, match=r"test split: outputs are not finite at exit 2 \(1 of 4 rows\), 3 \(4 of 4 rows\)"):
        make_predictions(logits, torch.zeros(4), **ABOUT)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_file(tmp_path, task):
    path = tmp_path / "test.safetensors"
    predictions = toy_predictions(task=task)
    save_predictions(path, predictions)
    read = load_predictions(path)
    assert torch.equal(read.logits, predictions.logits) and torch.equal(read.labels, predictions.labels)
    assert read.labels.dtype == predictions.labels.dtype
    for name in ("split", "fingerprint", "checkpoint", "task"):
        assert getattr(read, name) == getattr(predictions, name)
    check_belongs(read, "digest", path=path)
    with pytest.raises(
        EectlError, match=r"test\.safetensors was made by another checkpoint \(digest…, this one is 012345678901…\)"
    ):
        check_belongs(read, "0123456789012345", path=path)


def test_foreign_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": torch.zeros(1)}, {"kind": "checkpoint", "schema": 1})
    with pytest.raises(EectlError, match="not a predictions of eectl's"):
        load_predictions(path)
