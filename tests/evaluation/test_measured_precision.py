"""The precision of what is measured: the checkpoint's unless --precision says otherwise, recorded, and noted where it differs."""

import json

import pytest
import running
import torch
from conftest import small_recipe
from safetensors.torch import load_file

from eectl.core import precision
from eectl.core.distributed import World
from eectl.core.errors import EectlError
from eectl.core.tensor_files import read_metadata
from eectl.data import Augmenter
from eectl.evaluation.evaluate import evaluate
from eectl.evaluation.opened import open_session
from eectl.models.checkpoint import load_checkpoint, read_about, save_checkpoint
from eectl.recipe.augment_section import AugmentSection
from eectl.training.train import train

MOVED = "and this computes in float32: scores move a little"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A network trained in bf16, and the same one from before phases said their precision."""
    folder = tmp_path_factory.mktemp("precision")
    train(small_recipe("precision=bf16", "epochs=1"), out=folder / "run", device="cpu", quiet=True)
    (folder / "m.safetensors").write_bytes((folder / "run" / "model.safetensors").read_bytes())
    loaded = load_checkpoint(folder / "m.safetensors")
    for entry in loaded.about.history:
        entry.pop("precision", None)
    save_checkpoint(folder / "old.safetensors", loaded.model, loaded.about)
    return folder


@pytest.fixture
def eectl(work):
    """Run a line of the program in the work folder; (stdout, stderr)."""
    return lambda line, code=0: running.eectl(*line.split(" "), "--device", "cpu", cwd=work, code=code)


def naive(path, size, **options):
    """All exits' logits [exit, row, class] of the test split, `size` rows at a time, under an autocast of one's own."""
    session = open_session(path, world=World(0, 1, torch.device("cpu")), needs=("test",))
    split, info = session.data.splits["test"], session.data.info
    model, prepare = session.checkpoint.model.to(memory_format=torch.channels_last), Augmenter(info, AugmentSection(), 10).eval
    found = []
    for rows in torch.arange(len(split)).split(size):
        images = prepare(split.rows(rows)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, **options):
            found.append(torch.stack([output.logits.float() for output in model(images)]))
    return torch.cat(found, dim=1)


def test_a_pass_is_what_autocast_gives(work, eectl):
    eectl("evaluate m.safetensors --batch-size 50 --save-predictions low.safetensors")
    eectl("evaluate m.safetensors --batch-size 50 --save-predictions full.safetensors --precision float32")
    low, full = (load_file(work / name)["logits"] for name in ("low.safetensors", "full.safetensors"))
    assert torch.equal(low, naive(work / "m.safetensors", 50))
    assert torch.equal(full, naive(work / "m.safetensors", 50, enabled=False)) and not torch.equal(low, full)
    assert read_metadata(work / "low.safetensors", kind="predictions", schema=1)["precision"] == "bf16"


def test_the_precision_of_the_last_phase_counts(work):
    assert read_about(work / "m.safetensors").precision == "bf16"
    assert read_about(work / "old.safetensors").precision == "float32"


def test_it_is_said_and_recorded(work, eectl):
    out, err = eectl("evaluate m.safetensors")
    assert "calibrated thresholds, bf16" in out and "move" not in err
    out, err = eectl("evaluate old.safetensors")
    assert "float32" not in out and "bf16" not in out and "move" not in err
    assert json.loads(eectl("evaluate m.safetensors --json")[0])["precision"] == "bf16"
    assert json.loads(eectl("evaluate old.safetensors --json")[0])["precision"] == "float32"
    out, err = eectl("evaluate m.safetensors --precision auto --json")  # on a CPU
    assert json.loads(out)["precision"] == "float32" and f"note: m.safetensors was trained in bf16, {MOVED}" in err
    _, err = eectl("evaluate m.safetensors --precision tf32")
    assert f"was trained in bf16, {MOVED}" in err  # a CPU has no TF32


def test_thresholds_of_another_precision_are_noted(work, eectl):
    _, err = eectl("calibrate-thresholds m.safetensors -o low.json")
    assert json.loads((work / "low.json").read_text())["precision"] == "bf16" and "move" not in err
    assert "move" not in eectl("evaluate m.safetensors --policy low.json")[1]
    assert f"note: low.json was made in bf16, {MOVED}" in eectl("evaluate m.safetensors --policy low.json --precision float32")[1]
    content = json.loads((work / "low.json").read_text())
    del content["precision"], content["digest"]  # as older files have it
    (work / "older.json").write_text(json.dumps(content))
    assert "older.json was made in float32, and this computes in bf16" in eectl("evaluate m.safetensors --policy older.json")[1]


def test_predictions_of_another_precision_are_noted(work, eectl):
    eectl("evaluate m.safetensors --save-predictions kept.safetensors --precision float32")
    eectl("calibrate-thresholds m.safetensors -o full.json --save-predictions cal.safetensors --precision float32")
    out, err = eectl("evaluate m.safetensors --predictions kept.safetensors --policy full.json --json")
    assert json.loads(out)["precision"] == "float32"  # the outputs' own
    assert "kept.safetensors was made in float32, and this computes in bf16" in err and "full.json was made" not in err
    _, err = eectl("calibrate-thresholds m.safetensors --predictions cal.safetensors -o again.json")
    assert "cal.safetensors was made in float32, and this computes in bf16" in err
    assert json.loads((work / "again.json").read_text())["precision"] == "float32"


def test_bench_says_in_what_it_timed(work, eectl):
    eectl("calibrate-thresholds m.safetensors --budgets 100 -o timed.json --precision float32")
    out, err = eectl("bench m.safetensors --policy timed.json --batch-size 16 --seconds 0.01 -o bench.json")
    assert "normalised, bf16, channels_last" in out and "timed.json was made in float32, and this computes in bf16" in err
    assert json.loads((work / "bench.json").read_text())["precision"] == "bf16"
    line = "calibrate-thresholds m.safetensors --cost latency --budgets 100 -o time.json --overwrite"
    assert "was measured" not in eectl(line)[1]
    assert json.loads((work / "time.json").read_text())["measured"].endswith("batches of 16, bf16")
    _, err = eectl(f"{line} --precision float32")
    assert "bench.json was measured in bf16, and scores are computed in float32 here" in err


@pytest.mark.parametrize("verb", ["evaluate", "bench", "calibrate-thresholds"])
def test_a_name_that_is_none(eectl, verb):
    out, err = eectl(f"{verb} m.safetensors --precision bf61", code=1)
    assert out == "" and err.count("\n") == 1
    assert "unknown precision 'bf61' (did you mean 'bf16'?); known: auto, float32, tf32, bf16" in err


def test_a_device_without_bf16(work, monkeypatch):
    monkeypatch.setattr(precision, "_has_bf16", lambda _: False)
    with pytest.raises(EectlError, match="precision bf16: cpu does not have it, only float32; try --precision float32"):
        evaluate(work / "m.safetensors", device="cpu")
    assert evaluate(work / "m.safetensors", device="cpu", precision="float32").precision == "float32"
