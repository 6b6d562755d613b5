"""Phases on a frozen backbone: no graph in it, and where nothing random touches the inputs it sees every row once."""

import signal

import pytest
import torch
from toy_text import TOY, make_rows, write_csv, write_tokenizer

from eectl.core.errors import Interrupted
from eectl.data import load_data
from eectl.models import build as models
from eectl.models.adapters.cifar_resnet import CifarResNetBackbone
from eectl.models.checkpoint import read_about
from eectl.recipe.augment_section import AugmentSection
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.training.test_train import rows, same, torchrun, weights

VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 4, heads: 2, dropout: 0.2}}"
MSDNET = (
    "backbone={name: msdnet, args: {blocks: 3, base: 1, step: 1, channels: 4, growth: 2, growth_factors: [1, 2], "
    "bottleneck_factors: [1, 2]}}"
)
STOP = signal.SIGINT
STILL = ("data.augment={}", "regime=disjoint", "batch_size=20", "eval_batch_size=64")
KEPT = "the frozen backbone runs once: what heads read of {} rows takes "
CASES = {
    "sdn": ("loss_weights=sdn-ramp", "distillation.teacher=next", "label_smoothing=0.1"),
    "linear": (VIT, "exits.after=[0, 2]", "loss_weights=[1, 3, 1]", "optimizer.clip_norm=0.1", "exits.head=linear"),
    "gpf": (VIT, "exits.after=[0, 2]", "exits.head=gpf-8", "distillation.teacher=last"),
    "ztw": ("exits.head=ztw", "phases={1: {epochs: 1}, 4: {batch_size: 20}}"),
    "ztw-tokens": (VIT, "exits.after=[0, 1, 2]", "exits.head=ztw-arithmetic", "phases={1: {epochs: 1}, 4: {batch_size: 20}}"),
    "msdnet": (MSDNET, "exits.after=[0, 1]", "loss_weights=equilibrium"),
    "bf16": ("precision=bf16", "exits.head=mlp-8"),
}


@pytest.fixture
def seen(monkeypatch):
    """The rows that the backbone is given, one number per call of its stem; `clear` it before a phase."""
    seen, stem = [], CifarResNetBackbone.stem
    monkeypatch.setattr(CifarResNetBackbone, "stem", lambda self, inputs: seen.append(len(inputs)) or stem(self, inputs))
    return seen


def in_phases(folder):
    """metrics.jsonl without its times, phase 1 left out."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder) if row["phase"] != 1]


@pytest.mark.parametrize("name", CASES)
def test_with_and_without_the_cache(small, tmp_path, capsys, name):
    """Every kind of head, both frozen phases: the same weights, epochs and metrics, but for rounding."""
    recipe = small(*STILL, "phases={1: {epochs: 1}}", "optimizer.lr=3e-3", *CASES[name])
    train(recipe, out=tmp_path / "kept", device="cpu", quiet=False)
    kept_in = capsys.readouterr().err.count(KEPT.format(150 + 144))
    assert kept_in == (2 if "ztw" in name else 1)
    train(recipe.model_copy(update={"cache_features": 0.0}), out=tmp_path / "plain", device="cpu", quiet=False)
    assert "the frozen backbone runs" not in capsys.readouterr().err
    kept, plain = (weights(tmp_path / each / "model.safetensors") for each in ("kept", "plain"))
    start = weights(tmp_path / "kept" / "phase-1.safetensors")
    for key, tensor in plain.items():
        if key in start:
            assert torch.equal(kept[key], tensor) and torch.equal(start[key], tensor), key
        torch.testing.assert_close(kept[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    for row, other in zip(in_phases(tmp_path / "kept"), in_phases(tmp_path / "plain"), strict=True):
        for key in ("train_loss", "validation_loss", "validation_score"):
            assert [each for each in row.pop(key) if each is not None] == pytest.approx(
                [each for each in other.pop(key) if each is not None], abs=1e-5
            ), key
        assert row == other
    entries = [read_about(tmp_path / each / "model.safetensors").history[-1]["restored_epoch"] for each in ("kept", "plain")]
    assert entries[0] == entries[1]


def test_texts_with_and_without_the_cache(small, tmp_path, monkeypatch, capsys):
    """A regression; rows come by length, padded to other lengths than when they were kept."""
    monkeypatch.setitem(models.BACKBONES, TOY.name, TOY.build)
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(200, seed=1))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    data = {"name": "text", "root": str(tmp_path / "data"), "target": "score", "task": "regression", "tokenizer": tokenizer}
    recipe = small("batch_size=16", "eval_batch_size=7", "regime=disjoint", "epochs=3", "optimizer.lr=0.02",
                   data=data | {"max_length": 20}, backbone={"name": TOY.name}, exits={"after": [0, 1]})  # fmt: skip
    for name, limit in (("kept", 2e9), ("plain", 0.0)):
        train(recipe.model_copy(update={"cache_features": limit}), out=tmp_path / name, device="cpu", quiet=False)
    assert KEPT.format(180) in capsys.readouterr().err
    kept, plain = (weights(tmp_path / each / "model.safetensors") for each in ("kept", "plain"))
    for key, tensor in plain.items():
        torch.testing.assert_close(kept[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("changes", "times"), [((), 1), (("cache_features=0",), 3), (("data.augment={flip: true}",), 3)])
def test_how_often_the_backbone_sees_a_row(small, tmp_path, capsys, seen, changes, times):
    """Once with the cache, and an example and the pass that counts costs; in every epoch without, or where images vary."""
    train(small(*STILL, "epochs=1"), out=tmp_path / "start", device="cpu", quiet=True)
    start = tmp_path / "start" / "phase-1.safetensors"
    seen.clear()
    recipe = small(*STILL, "phase=3", f"init='{start}'", "epochs=3", "patience=3", "batch_size=30", *changes)
    train(recipe, out=tmp_path / "run", device="cpu", quiet=False)
    assert [row["phase"] for row in rows(tmp_path / "run")] == [3, 3, 3]
    assert sum(seen) - seen.count(1) == times * (150 + 144)
    assert ("the frozen backbone runs once" in capsys.readouterr().err) == (times == 1)


def test_what_does_not_fit_is_not_kept_and_it_is_said(small, tmp_path, capsys):
    """Two maps of 16 and 32 channels, of 4×4 cells each twice, and 10 logits; in float32."""
    size = 4 * (2 * 16 * (16 + 32) + 10) * (150 + 144)
    train(small(*STILL, "epochs=1", f"cache_features={size}"), out=tmp_path / "fits", device="cpu", quiet=False)
    assert f"of 294 rows takes {size / 1e6:.1f} MB and is kept\n" in capsys.readouterr().err
    train(small(*STILL, "epochs=1", f"cache_features={size - 1}"), out=tmp_path / "does-not", device="cpu", quiet=False)
    said = capsys.readouterr().err
    assert f"runs at every step: what heads read of 294 rows takes {size / 1e6:.1f} MB, and cache_features allows" in said


def test_learned_weighting_runs_the_backbone_and_says_so(small, tmp_path, capsys):
    train(small(*STILL, "epochs=1", "loss_weights=l2w"), out=tmp_path / "run", device="cpu", quiet=False)
    assert "phase 3: the frozen backbone runs at every step: l2w takes its batches as they are" in capsys.readouterr().err


@pytest.mark.parametrize("key", AugmentSection.model_fields)
def test_what_makes_augmentation_random(small, key):
    values = {"resized_crop": (0.5, 1.0), "crop": 1, "auto_augment": "svhn", "rand_augment": {"ops": 1}, "repeats": 1}
    values |= {"trivial_interpolation": "bilinear"} | dict.fromkeys(("flip", "trivial", "three_augment"), True)
    is_plain = key in ("trivial_interpolation", "repeats")
    assert AugmentSection(**{key: values.get(key, 0.5)}).is_random != is_plain and not AugmentSection().is_random


def test_no_graph_reaches_the_frozen_backbone(small):
    """Nothing is saved for a backward pass while it runs, and the losses' graph ends in the heads' parameters."""
    recipe = small(*STILL)
    data = load_data(recipe.data, device=torch.device("cpu"))
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model
    model.set_trainable((), {1, 2})
    model.train_parts((), {1, 2})
    images, saved = torch.randn(5, 1, 8, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        reads = model.reads(images)
    assert len(reads) == 3 and not any(each.requires_grad for each in reads) and not saved
    for inputs in (images, reads):
        loss = sum(model(inputs, exits=[1, 2])[k].logits.square().sum() for k in range(2))
        ends, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            ends |= {node.variable} if hasattr(node, "variable") else set()
            nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
        assert ends == set(model.exits.parameters())


@pytest.mark.parametrize("head", ["sdn", "ztw", "gpf-8"])
def test_outputs_from_what_was_read(small, head):
    """Of all exits and of some, those that a cascade hears among them."""
    recipe = small(f"exits.head={head}")
    model = with_exits(first_network(recipe, load_data(recipe.data, device=torch.device("cpu")).info), recipe.exits, seed=0).model
    images = torch.randn(5, 1, 8, 8)
    model.eval()
    with torch.no_grad():
        reads = model.reads(images)
        for exits in (None, [1], [2], [1, 2], [3]):
            for output, expected in zip(model(reads, exits), model(images, exits), strict=True):
                assert (output is None) == (expected is None)
                assert output is None or torch.equal(output.logits, expected.logits)


def test_resume_reads_again_and_ends_in_the_same_weights(small, tmp_path, monkeypatch):
    """Stopped by signals within the first and the second epoch of phase 3."""
    from eectl.core.progress import Display

    recipe = small(*STILL, "epochs=3", "patience=3")
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    folder, steps = tmp_path / "run", []
    with monkeypatch.context() as patched:
        stops = (7 * 3 + 4, 7 * 3 + 9)  # of 7 steps an epoch
        patched.setattr(Display, "step", lambda _: steps.append(1) or (len(steps) in stops and signal.raise_signal(STOP)))
        for stop in stops:
            with pytest.raises(Interrupted):
                train(recipe, out=folder, device="cpu", resume=True, quiet=True)
            assert len(steps) == stop
    assert [row["phase"] for row in rows(folder)] == [1, 1, 1, 3]
    train(recipe, out=folder, device="cpu", resume=True, quiet=True)
    assert same(weights(folder / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


def test_two_processes_share_the_rows(small, tmp_path):
    """An odd number of them; the same steps as in one process, but for rounding."""
    train(small(*STILL, "epochs=1"), out=tmp_path / "start", device="cpu", quiet=True)
    recipe = small(*STILL, "phase=3", f"init='{tmp_path / 'start' / 'phase-1.safetensors'}'", "batch_size=31", "epochs=2",
                   "optimizer.name=sgd", "data.limit=151", "data.validation=0.101")  # fmt: skip
    train(recipe, out=tmp_path / "one", device="cpu", quiet=True)
    (tmp_path / "recipe.yaml").write_text((tmp_path / "one" / "recipe.yaml").read_text())
    done = torchrun("train", tmp_path / "recipe.yaml", "--device", "cpu", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert KEPT.format(151 + 145) in done.stderr
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other["validation_score"] == row["validation_score"]
        assert other["train_loss"][:2] == pytest.approx(row["train_loss"][:2], rel=1e-4)
