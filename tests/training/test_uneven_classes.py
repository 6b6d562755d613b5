"""Classes of uneven size: weighted losses against torch's, balanced accuracy against scikit-learn's, and what is said of them."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import eectl, refused
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import Augmenter, Dataset, load_data, train_batches
from eectl.models.checkpoint import load_checkpoint
from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import Recipe
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.training.test_train import rows, same, torchrun, weights

CPU = torch.device("cpu")
SIZES = {"ant": 200, "bee": 40, "cow": 15}
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"  # no BatchNorm


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("uneven") / "photos"
    generator = np.random.default_rng(0)
    for part, share in (("train", 1.0), ("test", 0.4)):
        for number, (name, size) in enumerate(SIZES.items()):
            folder = root / part / name
            folder.mkdir(parents=True)
            for row in range(round(share * size)):
                pixels = generator.integers(0, 180, (8, 8, 3)) + 25 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{row}.png")
    return root


@pytest.fixture
def uneven(photos):
    """A small network on those images; changes go on top."""

    def make(*changes: str) -> Recipe:
        base = {"data": {"name": "folder", "root": str(photos)}, "exits": {"after": [0]}, "regime": "joint", "epochs": 1}
        base |= {"batch_size": 40, "channels_last": False, "cache_features": 0}
        return make_recipe(base, where="test", changes=[VIT, *changes])

    return make


def by_hand(recipe: Recipe, data: Dataset, loss: nn.Module) -> dict[str, torch.Tensor]:
    """The weights after an epoch of plain SGD, written out."""
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    augmenter = Augmenter(data.info, recipe.data.augment, len(data.info.classes))
    order = derive_seed(recipe.seed, "order", 2)
    for batch in train_batches(data.splits["train"], batch_size=recipe.batch_size, seed=order, epoch=0):
        outputs = model(augmenter.eval(batch.inputs))
        (sum(loss(output.logits, batch.targets) for output in outputs) / len(outputs)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return dict(model.state_dict())


def test_steps_are_those_of_torchs_weighted_cross_entropy(uneven, tmp_path):
    recipe = uneven("class_weights=balanced", "label_smoothing=0.1", "optimizer={name: sgd, lr: 0.1, momentum: 0}",
                    "schedule.name=constant")  # fmt: skip
    data = load_data(recipe.data, device=CPU)
    labels = data.splits["train"].labels.numpy()
    by_class = torch.tensor(compute_class_weight("balanced", classes=np.unique(labels), y=labels), dtype=torch.float32)
    assert max(by_class) / min(by_class) > 10
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    found = weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in by_hand(recipe, data, nn.CrossEntropyLoss(weight=by_class, label_smoothing=0.1)).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    plain = by_hand(recipe, data, nn.CrossEntropyLoss(label_smoothing=0.1))
    assert max((found[name] - tensor).abs().max() for name, tensor in plain.items()) > 1e-2


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_weigh_as_one_does(uneven, tmp_path):
    """The mean is over the rows of both: 31 rows a batch, whose weights differ between the halves."""
    recipe = uneven("class_weights=balanced", "metric=balanced", "batch_size=31", "epochs=2", "optimizer.name=sgd",
                    "optimizer.lr=0.05")  # fmt: skip
    train(recipe, out=tmp_path / "one", device="cpu", quiet=True)
    done = torchrun("train", tmp_path / "one" / "recipe.yaml", "--device", "cpu", "-q", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        assert other["validation_balanced"] == pytest.approx(row["validation_balanced"])


@pytest.fixture(scope="module")
def balanced_run(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("balanced") / "run"
    base = {"data": {"name": "folder", "root": str(photos)}, "exits": {"after": [0]}, "regime": "joint", "epochs": 4}
    recipe = make_recipe(base, where="test", changes=[VIT, "metric=balanced", "class_weights=balanced", "optimizer.lr=0.02"])
    said: list[str] = []
    train(recipe, out=folder, device="cpu", say=said.append)
    assert any("class 'ant' has 160 training images, 'cow' 11;" in line and "class_weights=balanced" in line for line in said)
    return folder


def test_training_stops_by_the_balanced_accuracy(balanced_run):
    loaded = load_checkpoint(balanced_run / "model.safetensors")
    entry = loaded.about.history[-1]
    split = load_data(loaded.about.data_spec, device=CPU).splits["validation"]
    data = load_data(loaded.about.data_spec, device=CPU)
    inputs = Augmenter(data.info, loaded.about.data_spec.augment, 3).eval(split.rows(torch.arange(len(split))))
    with torch.no_grad():
        predicted = [output.logits.argmax(1).numpy() for output in loaded.model(inputs)]
    expected = [balanced_accuracy_score(split.labels.numpy(), each) for each in predicted]
    assert entry["validation"]["balanced"] == pytest.approx(expected)
    per_epoch = [row["validation_balanced"] for row in rows(balanced_run)]
    assert list(entry["best"].values()) == pytest.approx([max(each) for each in zip(*per_epoch, strict=True)])
    header = (balanced_run / "results.csv").read_text().splitlines()[0]
    assert header.endswith("validation_score_1,validation_score_2,validation_balanced_1,validation_balanced_2")


def test_a_run_that_stops_by_it_goes_on_to_the_same_weights(uneven, tmp_path, monkeypatch):
    recipe = uneven("metric=balanced", "class_weights=balanced", "epochs=4")
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", lambda _: steps.append(1) or len(steps) % 8 or os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    train(recipe, out=tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


def test_thresholds_follow_the_recipe_and_evaluate_shows_what_counts_classes_alike(balanced_run, tmp_path):
    path = balanced_run / "model.safetensors"
    out, _ = eectl("calibrate-thresholds", path, "-o", tmp_path / "p.json", "--device", "cpu", columns=80)
    assert json.loads((tmp_path / "p.json").read_text())["metric"] == "balanced" and "balanced accuracy" in out
    eectl("calibrate-thresholds", path, "-o", tmp_path / "q.json", "--metric", "score", "--device", "cpu")
    assert json.loads((tmp_path / "q.json").read_text())["metric"] == "score"
    assert "metric" in refused("calibrate-thresholds", path, "-o", tmp_path / "r.json", "--metric", "f1")
    line = ["evaluate", path, "--device", "cpu"]
    out, _ = eectl(*line, "--policy", tmp_path / "p.json", "--save-predictions", tmp_path / "kept", columns=80)
    assert "macro-F1" in out and max(map(len, out.splitlines())) <= 80
    assert "chosen by balanced accuracy" in " ".join(out.split())
    found = json.loads(eectl(*line, "--json")[0])
    assert found["metric"] == "balanced"
    kept, labels = (weights(tmp_path / "kept")[name] for name in ("logits", "labels"))
    for entry, logits in zip(found["exits"], kept, strict=True):
        predicted = logits.argmax(1)
        assert entry["balanced"] == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert entry["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_a_dry_run_counts_classes(photos):
    line = ["train", "digits", "--data", photos, "--set", "data.image_size=8", "--dry-run", "--device", "cpu"]
    out, said = eectl(*line)
    counts = load_data(make_recipe({"data": {"name": "folder", "root": str(photos)}}, where="x").data, device=CPU).splits
    for name, split in counts.items():
        sizes = torch.bincount(split.labels).tolist()
        assert f"{name}: {', '.join(f'{each} {size}' for each, size in zip(SIZES, sizes, strict=True))}" in " ".join(out.split())
    assert "note: class 'ant' has" in said


@pytest.mark.parametrize("key", ["metric", "class_weights"])
def test_numbers_have_no_classes_to_balance(key):
    with pytest.raises(EectlError, match=f"{key}: balanced is for classes, and the target is a number"):
        make_recipe({"data": {"name": "glue/stsb", "tokenizer": "x"}, key: "balanced"}, where="x")
    with pytest.raises(EectlError, match="l2w learns a weight for each row"):
        make_recipe({"class_weights": "balanced", "loss_weights": "l2w"}, where="x")
