"""Training: what moves and what stays, the same seed twice, stopping and going on, several processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from eectl.core.errors import EectlError, Interrupted
from eectl.core.seeds import derive_seed
from eectl.core.tensor_files import read_any_tensors
from eectl.data import load_data
from eectl.models.checkpoint import load_checkpoint, read_about
from eectl.recipe.regimes import REGIMES
from eectl.training.network import first_network, with_exits
from eectl.training.train import train

CPU = torch.device("cpu")


def weights(path):
    return read_any_tensors(path)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("joint") / "run"
    train(small_recipe("epochs=20", "patience=20"), out=folder, device="cpu", quiet=True)
    return folder


def test_the_same_seed_gives_the_same_weights_and_another_does_not(small, tmp_path, joint_run):
    train(small("epochs=20", "patience=20"), out=tmp_path / "again", device="cpu", quiet=True)
    train(small("epochs=20", "patience=20", "seed=1"), out=tmp_path / "other", device="cpu", quiet=True)
    first = weights(joint_run / "model.safetensors")
    assert same(first, weights(tmp_path / "again" / "model.safetensors"))
    assert not same(first, weights(tmp_path / "other" / "model.safetensors"))


def test_phase_3_leaves_the_backbone_as_it_was_to_the_bit(small, tmp_path):
    train(small("regime=disjoint"), out=tmp_path / "run", device="cpu", quiet=True)
    before, after = (weights(tmp_path / "run" / f"phase-{number}.safetensors") for number in (1, 3))
    assert any("running_mean" in name for name in before)
    assert same(before, {name: tensor for name, tensor in after.items() if name in before})
    untouched = with_exits(first_network(small(), load_data(small().data, device=CPU).info), small().exits, seed=0)
    fresh = {name: tensor for name, tensor in untouched.model.state_dict().items() if name.startswith("exits")}
    assert all(
        not torch.equal(fresh[name], after[name]) for name in fresh if "mix" not in name
    )  # 4×4 maps leave the mix as it was


def test_phases_by_hand_equal_the_whole_regime(small, tmp_path):
    train(small("regime=mixed"), out=tmp_path / "whole", device="cpu", quiet=True)
    train(small("regime=disjoint", "phase=1"), out=tmp_path / "one", device="cpu", quiet=True)
    start = tmp_path / "one" / "model.safetensors"
    train(small("regime=mixed", "phase=2", f"init='{start}'"), out=tmp_path / "two", device="cpu", quiet=True)
    whole = load_checkpoint(tmp_path / "whole" / "model.safetensors")
    by_hand = load_checkpoint(tmp_path / "two" / "model.safetensors")
    assert same(whole.model.state_dict(), by_hand.model.state_dict())
    assert by_hand.about.parent == load_checkpoint(start).digest == whole.about.parent


def test_one_step_of_plain_sgd_by_hand(small, tmp_path):
    """The whole loop for one step against torch written out: same start, same batch, same weights after."""
    recipe = small("optimizer={name: sgd, lr: 0.1, momentum: 0}", "schedule.name=constant", "data.augment={}", "epochs=1",
                   "batch_size=1000", "loss_weights=[1, 2, 5]")  # fmt: skip
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    data = load_data(recipe.data, device=CPU)
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split = data.splits["train"]
    images = split.rows(torch.arange(len(split))).float() / 255
    images = ((images - data.info.mean[0]) / data.info.std[0]).contiguous(memory_format=torch.channels_last)
    logits = [output.logits for output in model.to(memory_format=torch.channels_last)(images)]
    losses = [torch.nn.functional.cross_entropy(each, split.labels) for each in logits]
    ((losses[0] + 2 * losses[1] + 5 * losses[2]) / 8).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    trained = weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in model.state_dict().items():  # rows come in another order: rounding, through the ReLUs' kinks
        assert (trained[name] - tensor).float().norm() <= 0.02 * (tensor - start[name]).float().norm(), name
    assert rows(tmp_path / "run")[0]["train_loss"] == pytest.approx([loss.item() for loss in losses], rel=1e-4)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_runs_and_moves_what_its_phases_say(small, tmp_path, regime):
    folder = tmp_path / "run"
    train(small(f"regime={regime}", "epochs=1", "data.augment={}"), out=folder, device="cpu", quiet=True)
    history = read_about(folder / "model.safetensors").history
    phases = [entry for entry in history if "phase" in entry]
    assert read_about(folder / "model.safetensors").untrained == []
    assert [row["phase"] for row in rows(folder)] == [entry["phase"] for entry in phases]
    assert all(len(row["validation_score"]) == len(row["train_loss"]) for row in rows(folder))
    files = [folder / f"phase-{entry['phase']}.safetensors" for entry in phases]
    assert same(weights(files[-1]), weights(folder / "model.safetensors"))
    for before, after, entry in zip(files, files[1:], phases[1:], strict=False):
        old, new, model = weights(before), weights(after), load_checkpoint(after).model
        moved = {model.part(name) for name in old if not torch.equal(old[name], new[name])}
        heads = {("head", number) for number in entry["heads"]} if any("exits" in name for name in old) else set()
        segments = {part for part in moved if part[0] == "segment"}
        assert {part for part in moved if part[0] == "head"} == heads
        if regime == "branch-wise":
            assert segments == {("segment", entry["phase"])}
        elif entry["title"].startswith("heads"):
            assert segments == set()
        else:
            assert segments >= {("segment", 1)}


def test_restores_the_last_evaluation_at_which_any_exit_improved(small, tmp_path):
    recipe = small("epochs=12", "patience=2", "optimizer.lr=0.02")
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    log = rows(tmp_path / "run")
    best, last = [-1.0] * 3, 0
    for row in log:  # by hand, from the log
        if any(score > seen for score, seen in zip(row["validation_score"], best, strict=True)):
            last = row["epoch"]
        best = [max(pair) for pair in zip(best, row["validation_score"], strict=True)]
    entry = read_about(tmp_path / "run" / "model.safetensors").history[-1]
    assert entry["restored_epoch"] == last
    assert len(log) == min(last + 2, 12)
    train(recipe.model_copy(update={"epochs": last}), out=tmp_path / "short", device="cpu", quiet=True)
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "short" / "model.safetensors"))


def test_a_signal_saves_and_resume_ends_in_the_same_weights(small, tmp_path, joint_run):
    """Signals at several moments, each followed by a resume that is itself stopped, then one that is left alone."""
    folder, stops = tmp_path / "run", 0
    for delay, number in [(0.4, signal.SIGINT), (0.3, signal.SIGTERM), (0.35, signal.SIGINT), (0.25, signal.SIGTERM)]:
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
        timer.start()
        try:
            train(small("epochs=20", "patience=20"), out=folder, device="cpu", resume=True, quiet=True)
        except Interrupted as stop:
            stops += 1
            assert stop.exit_code == 128 + number
        finally:
            timer.join()
            for each, handler in before.items():
                signal.signal(each, handler)
    train(small("epochs=20", "patience=20"), out=folder, device="cpu", resume=True, quiet=True)
    assert stops, "no signal came while training: choose other delays"
    assert same(weights(folder / "model.safetensors"), weights(joint_run / "model.safetensors"))
    clean = [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]
    assert clean == [{key: value for key, value in row.items() if key != "seconds"} for row in rows(joint_run)]


def test_resume_of_a_finished_run_changes_nothing(small, tmp_path, joint_run):
    path = joint_run / "model.safetensors"
    before = path.stat().st_mtime_ns
    assert train(small("epochs=20", "patience=20"), out=joint_run, device="cpu", resume=True, quiet=True).path == path
    assert path.stat().st_mtime_ns == before


def test_resume_with_another_recipe_names_what_differs(small, joint_run):
    with pytest.raises(EectlError, match=r"epochs is 20 there and 9 here; optimizer\.lr is 0\.001 there and 0\.5 here"):
        train(small("epochs=9", "patience=20", "optimizer.lr=0.5"), out=joint_run, device="cpu", resume=True, quiet=True)


def test_a_folder_that_holds_a_run_is_not_touched(small, joint_run):
    before = (joint_run / "model.safetensors").read_bytes()
    with pytest.raises(EectlError, match="holds a run; --resume to go on with it, --overwrite to replace it"):
        train(small(), out=joint_run, device="cpu", quiet=True)
    assert (joint_run / "model.safetensors").read_bytes() == before


def test_resume_never_removes_what_no_run_here_made(small, tmp_path, joint_run):
    """A folder with checkpoints and no recipe.yaml is not a run: --resume refuses, whatever --from says."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("model.safetensors", "phase-2.safetensors", "phase-final.safetensors"):
        (folder / name).write_bytes((joint_run / "model.safetensors").read_bytes())
    recipe = small("phase=3", f"init='{folder / 'phase-2.safetensors'}'")
    with pytest.raises(EectlError, match=r"but no recipe\.yaml, so no run to resume"):
        train(recipe, out=folder, device="cpu", resume=True, quiet=True)
    with pytest.raises(EectlError, match="lies in the folder whose run would be replaced"):
        train(recipe, out=folder, device="cpu", overwrite=True, quiet=True)
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_overwrite_keeps_the_old_run_until_the_new_one_has_ended(small, tmp_path):
    folder = tmp_path / "run"
    train(small("epochs=1"), out=folder, device="cpu", quiet=True)
    old = (folder / "model.safetensors").read_bytes()
    for _ in range(2):
        with pytest.raises(EectlError, match="not finite"):
            train(small("optimizer={lr: 1e3, weight_decay: 1e3}"), out=folder, device="cpu", overwrite=True, quiet=True)
        assert (folder / "replaced" / "model.safetensors").read_bytes() == old
    train(small("epochs=1", "seed=5"), out=folder, device="cpu", overwrite=True, quiet=True)
    assert not (folder / "replaced").exists()
    assert (folder / "model.safetensors").read_bytes() != old


def test_a_run_that_was_refused_leaves_no_folder_to_trip_over(small, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(EectlError, match="2 numbers for 3 exits"):
        train(small("loss_weights=[1, 2]", "regime=mixed"), out=folder, device="cpu", quiet=True)
    with pytest.raises(EectlError, match=r"phases\.7: regime mixed with 3 exits takes phases 1–3"):
        train(small("phases={7: {epochs: 1}}", "regime=mixed"), out=folder, device="cpu", quiet=True)
    assert not folder.exists()
    train(small("loss_weights=[1, 2, 3]", "regime=mixed", "epochs=1"), out=folder, device="cpu", quiet=True)


def test_resume_on_other_data_is_refused(small, tmp_path, joint_run):
    other = small("epochs=20", "patience=20").model_copy(update={"data": small().data.model_copy(update={"split_seed": 1})})
    recipe = (joint_run / "recipe.yaml").read_text()
    (joint_run / "recipe.yaml").write_text(recipe.replace("split_seed: 42", "split_seed: 1"))
    try:
        with pytest.raises(EectlError, match="--resume with other data"):
            train(other, out=joint_run, device="cpu", resume=True, quiet=True)
    finally:
        (joint_run / "recipe.yaml").write_text(recipe)


def test_one_image_per_step_and_batchnorm(small, tmp_path):
    with pytest.raises(EectlError, match="BatchNorm takes no statistics; raise batch_size"):
        train(small("backbone.name=resnet18", "batch_size=1", "exits.after=[1]"), out=tmp_path / "run", device="cpu", quiet=True)


def test_what_a_user_should_know_is_said(small, tmp_path, joint_run, capsys):
    train(small("phase=3", "exits.after=[8]", "epochs=1"), out=tmp_path / "run", device="cpu", quiet=False)
    said = capsys.readouterr().err
    assert "the exit after the last block, 8, saves nothing" in said
    assert "frozen at random weights" in said
    start = joint_run / "model.safetensors"
    recipe = small("epochs=1", f"init='{start}'", "exits.after=[2]", "backbone.name=resnet18")
    train(recipe, out=tmp_path / "again", device="cpu", quiet=False)
    said = capsys.readouterr().err
    assert f"the exits are those of {start}, after blocks 1, 4, not the recipe's" in said
    assert f"the backbone is that of {start}, resnet20, not the recipe's resnet18" in said


def test_overwrite_leaves_other_peoples_files(small, tmp_path):
    folder = tmp_path / "run"
    train(small("regime=mixed", "epochs=1"), out=folder, device="cpu", quiet=True)
    (folder / "notes.txt").write_text("mine")
    train(small("epochs=1"), out=folder, device="cpu", overwrite=True, quiet=True)
    names = {path.name for path in folder.iterdir()} - {"tensorboard"}  # where it is installed
    run = {"recipe.yaml", "metrics.jsonl", "results.csv", "curves.png", "model.safetensors", "phase-2.safetensors", "resume"}
    assert names == run | {"notes.txt"}


def test_two_runs_in_one_folder(small, tmp_path):
    from eectl.training.run_folder import RunFolder

    with RunFolder(tmp_path / "run").locked(), pytest.raises(EectlError, match="another run is writing here"):
        train(small(), out=tmp_path / "run", device="cpu", resume=True, quiet=True)


def test_a_loss_that_is_not_finite_stops_with_step_exit_and_checkpoint(small, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        EectlError, match=r"phase 2, step \d+: the loss of exit \d is not finite; the last good checkpoint is none"
    ):
        train(small("optimizer={lr: 1e3, weight_decay: 1e3}"), out=folder, device="cpu", quiet=True)
    diverging = "phases={2: {lr: 1e3, weight_decay: 1e3}}"
    recipe = small("optimizer.lr=1e-3", "schedule={name: constant, warmup: 0}", "regime=mixed", diverging)
    with pytest.raises(EectlError, match=r"phase-1\.safetensors"):
        train(recipe, out=folder, device="cpu", overwrite=True, quiet=True)
    assert not (folder / "model.safetensors").exists()
    load_checkpoint(folder / "phase-1.safetensors")


def test_last_good_weights_are_kept_when_a_later_epoch_diverges(small, tmp_path):
    """Warm-up makes the first epoch harmless and a later one diverge."""
    recipe = small("optimizer.lr=1e3", "schedule={name: constant, warmup: 1e3}", "epochs=50", "patience=50", "optimizer.name=sgd")
    folder = tmp_path / "run"
    with pytest.raises(EectlError, match=r"last-good\.safetensors"):
        train(recipe, out=folder, device="cpu", quiet=True)
    kept = load_checkpoint(folder / "last-good.safetensors").model.state_dict()
    assert all(torch.isfinite(tensor.float()).all() for tensor in kept.values())


def test_a_checkpoint_for_other_classes_is_refused(small, tmp_path, joint_run):
    for index in range(3):
        for part in ("train", "test"):
            folder = tmp_path / "images" / part / f"class-{index}"
            folder.mkdir(parents=True)
            for number in range(30):
                from PIL import Image

                Image.new("L", (8, 8), 60 * index + number + 30 * (part == "test")).save(folder / f"{number}.png")
    data = {"name": "folder", "root": str(tmp_path / "images"), "channels": 1, "validation": 0.2, "calibration": 0.2}
    recipe = small(f"init='{joint_run / 'model.safetensors'}'", data=data)
    with pytest.raises(EectlError, match="a network for 10 classes, but folder has 3"):
        train(recipe, out=tmp_path / "run", device="cpu", quiet=True)


def test_seeds_are_independent():
    seeds = {derive_seed(seed, *purpose) for seed in range(20) for purpose in [("a",), ("b",), (1, 2), (12,), ("1:2", 3)]}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def torchrun(*arguments, processes=2):
    port = 20000 + os.getpid() % 20000 + int(time.monotonic() * 10) % 5000
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
        "-m",
        "eectl",
    ]
    return subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_train_as_one_does(small, tmp_path):
    """No BatchNorm and no augmentation: the same steps but for rounding. 31 rows a batch do not divide by two."""
    vit = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"
    changes = ["data.augment={}", "data.limit=150", vit, "exits.after=[0]", "epochs=2", "batch_size=31",
               "optimizer.name=sgd", "optimizer.lr=0.05"]  # fmt: skip
    train(small(*changes), out=tmp_path / "one", device="cpu", quiet=True)
    (tmp_path / "recipe.yaml").write_text((tmp_path / "one" / "recipe.yaml").read_text())
    done = torchrun("train", tmp_path / "recipe.yaml", "--device", "cpu", "-q", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-4)
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        assert other["validation_score"] == row["validation_score"]


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_with_batchnorm_cycling_losses_and_odd_validation(small, tmp_path):
    changes = ["--set", "data.limit=150", "--set", "data.validation=0.09", "--set", "exits.after=[1]", "--epochs", "1"]
    done = torchrun("train", "digits", "--regime", "alternating", "--device", "cpu", "-q", *changes, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "two" / "model.safetensors"
    entry = read_about(path).history[-1]
    model = load_checkpoint(path)
    data = load_data(model.about.data_spec, device=CPU)
    split = data.splits["validation"]
    assert len(split) % 2 == 1
    from eectl.data import Augmenter

    inputs = Augmenter(data.info, model.about.data_spec.augment, 10).eval(split.rows(torch.arange(len(split))))
    with torch.no_grad():
        outputs = model.model(inputs)
    losses = [torch.nn.functional.cross_entropy(output.logits, split.labels).item() for output in outputs]
    assert entry["validation"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert entry["validation"]["score"] == pytest.approx(
        [(o.logits.argmax(1) == split.labels).float().mean().item() for o in outputs]
    )


def test_out_of_memory_says_what_to_make_smaller(small, tmp_path, monkeypatch):
    """A GPU's memory runs out inside torch; here torch's own convolution is made to say so."""

    plain = torch.nn.Conv2d.forward

    def forward(self, x):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    with pytest.raises(EectlError, match=r"out of memory on cpu; try --set batch_size=16 \(it is 32, over all processes\)"):
        train(small(), out=tmp_path / "run", device="cpu", quiet=True)
