"""Training GPF and ZTW heads: what each phase moves, the ensembles' own phase by hand and resumed, what is refused."""

import os
import signal
import threading

import pytest
import torch
from torch.nn import functional

from eectl.core.errors import EectlError, Interrupted
from eectl.core.tensor_files import read_any_tensors
from eectl.data import Augmenter, load_data
from eectl.models.checkpoint import load_checkpoint, read_about
from eectl.recipe.regimes import REGIMES, STAGED, regime_phases
from eectl.training.attach import attach_heads
from eectl.training.dry_run import plan
from eectl.training.tables import show_info, show_phases
from eectl.training.train import train

VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 4, heads: 2}}"
QUICK = (VIT, "exits.after=[0, 2]", "data.augment={}", "epochs=1", "optimizer.lr=0.01")


def weights(path):
    return read_any_tensors(path)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def phases_of(folder):
    return [entry for entry in read_about(folder / "model.safetensors").history if "phase" in entry]


@pytest.fixture(scope="module")
def ztw_run(tmp_path_factory):
    """A ResNet-20, with BatchNorm, through all of mixed: its phases are 1, 2 and 4."""
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("ztw") / "run"
    train(small_recipe("exits.head=ztw", "regime=mixed"), out=folder, device="cpu", quiet=True)
    return folder


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("head", ["gpf-8", "gpf-lancopku-8", "ztw"])
def test_every_weight_that_a_phase_trains_moves_and_no_other(small, tmp_path, regime, head):
    folder = tmp_path / "run"
    train(small(*QUICK, f"exits.head={head}", f"regime={regime}"), out=folder, device="cpu", quiet=True)
    phases = phases_of(folder)
    planned = regime_phases(regime, 3, combine=head == "ztw")
    assert [entry["phase"] for entry in phases] == [phase.number for phase in planned]
    files = [folder / f"phase-{phase.number}.safetensors" for phase in planned]
    for before, after, phase in zip(files, files[1:], planned[1:], strict=False):
        old, new, model = weights(before), weights(after), load_checkpoint(after).model
        if phase.combine:
            assert {model.part(name)[0] for name in new.keys() - old.keys()} == {"combine"}
            assert all(torch.equal(old[name], new[name]) for name in old)
        elif any(name.startswith("exits") for name in old):
            heads = {name for name in new if model.part(name)[0] == "head" and model.part(name)[1] in phase.heads}
            assert {name for name in new if name.startswith("exits") and not torch.equal(old[name], new[name])} == heads
    assert not load_checkpoint(files[-1]).about.untrained


def test_ensembles_leave_everything_else_as_it_was_to_the_bit(ztw_run):
    before, after = weights(ztw_run / "phase-2.safetensors"), weights(ztw_run / "phase-4.safetensors")
    assert any("running_mean" in name for name in before) and any("num_batches_tracked" in name for name in before)
    assert same(before, {name: tensor for name, tensor in after.items() if name in before})
    model, twin = load_checkpoint(ztw_run / "phase-4.safetensors").model, load_checkpoint(ztw_run / "phase-2.safetensors").model
    assert twin.combine is None and model.combine.kind == "geometric"
    assert all(each.bias.any() for each in model.combine.exits)
    about = read_about(ztw_run / "phase-4.safetensors")
    assert [entry.get("phase", entry) for entry in about.history[1:]] == [
        {"attached": [1, 4], "head": "ztw"}, 2, {"combined": "geometric"}, 4,
    ]  # fmt: skip
    entry = about.history[-1]
    assert (entry["batch_size"], entry["epochs"], entry["exits"], entry["heads"]) == (64, 2, [1, 2], [])


def test_the_ensembles_loss_is_that_of_the_exits_before_the_last(small, tmp_path, ztw_run):
    """One step of plain SGD on the ensembles, against torch written out; a weight decay of 0, as this phase has it."""
    recipe = small("exits.head=ztw", "phase=4", f"init='{ztw_run / 'phase-2.safetensors'}'", "optimizer={name: sgd, momentum: 0}",
                   "optimizer.weight_decay=0.3", "schedule.name=constant", "data.augment={}",
                   "phases={4: {epochs: 1, batch_size: 1000, lr: 0.5}}", "loss_weights=[1, 3, 9]")  # fmt: skip
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    data = load_data(recipe.data, device=torch.device("cpu"))
    split = data.splits["train"]
    images = Augmenter(data.info, recipe.data.augment, 10).eval(split.rows(torch.arange(len(split))))
    with torch.no_grad():
        own = [output.logits for output in load_checkpoint(ztw_run / "phase-2.safetensors").model(images)][:2]
    from eectl.training.network import first_network, with_combine

    start = with_combine(first_network(recipe, data.info), seed=0).model.combine.exits
    losses = []
    for k, ensemble in enumerate(start, 1):
        mixed = sum(w.exp() * logits.log_softmax(1) for w, logits in zip(ensemble.weight, own[:k], strict=True)) / k
        losses.append(functional.cross_entropy(mixed + ensemble.bias, split.labels))
    ((losses[0] + 3 * losses[1]) / 4).backward()
    trained = weights(tmp_path / "run" / "model.safetensors")
    for name, parameter in start.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(trained[f"combine.exits.{name}"], expected, rtol=1e-3, atol=1e-5)


def test_the_phase_by_hand_equals_the_regimes(small, tmp_path, ztw_run):
    start = ztw_run / "phase-2.safetensors"
    train(small("regime=mixed", "phase=4", f"init='{start}'"), out=tmp_path / "run", device="cpu", quiet=True)
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(ztw_run / "model.safetensors"))


@pytest.mark.thorough
@pytest.mark.slow
def test_stopped_in_the_ensembles_phase_and_resumed(small, tmp_path, ztw_run):
    start = ztw_run / "phase-2.safetensors"
    recipe = small("phase=4", f"init='{start}'", "phases={4: {epochs: 30, patience: 30, batch_size: 8}}")
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    stops = 0
    for delay in (0.5, 0.6, 0.8):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        timer.start()
        try:
            train(recipe, out=tmp_path / "run", device="cpu", resume=True, quiet=True)
        except Interrupted:
            stops += 1
        finally:
            timer.join()
            signal.signal(signal.SIGTERM, before)
    train(recipe, out=tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert stops, "no signal came while training: choose other delays"
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


def test_training_the_heads_again_leaves_the_ensembles_out(small, tmp_path, ztw_run, capsys):
    start = ztw_run / "model.safetensors"
    train(small("phase=3", f"init='{start}'", "epochs=1"), out=tmp_path / "run", device="cpu", quiet=False)
    assert f"the ensembles of {start} are left out: phase 3 trains what they stand on" in capsys.readouterr().err.replace(
        "\n", " "
    )
    about = read_about(tmp_path / "run" / "model.safetensors")
    assert about.spec.combine is None and {"combined": None} in about.history
    attach_heads(start, after="1,3", head="sdn", out=tmp_path / "other.safetensors")
    assert read_about(tmp_path / "other.safetensors").spec.combine is None


def test_info_and_plan_show_the_ensembles(small, ztw_run, capsys):
    path = ztw_run / "model.safetensors"
    show_info(path, {"weights": "w", "versions": {}}, read_about(path))
    shown = capsys.readouterr().out
    assert "ztw after blocks 1, 4, in geometric ensembles" in shown and "geometric ensembles" in shown.split("history")[1]
    planned = plan(small("exits.head=ztw-arithmetic", "regime=disjoint", "phases={4: {lr: 0.1}}"))
    show_phases(planned.recipe, planned.phases)
    shown = capsys.readouterr().out.split("phase 4: ensembles on frozen heads")[1].split()
    assert " ".join(shown) == (
        "trains ensembles frozen backbone, head 1–2 losses exit 1–2 weights uniform: 0.5 0.5 with adamw, lr 0.1, "
        "weight decay 0, cosine-restarts, batch size 64 for at most 2 epochs, patience 2"
    )


def test_staged_regimes_count_the_ensembles_as_their_last_stage():
    for regime in REGIMES:
        *_, last = regime_phases(regime, 3, combine=True)
        assert last.number == 4 and last.combine and last.losses == (frozenset({1, 2}),)
        assert not (last.segments or last.heads) and last.needs_heads(3)
        assert regime_phases(regime, 5, combine=True)[-1].number == (6 if regime in STAGED else 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["exits.head=sdn", "phase=4"], "--phase 4: .* takes phases 1–3; phase 4 trains the ensembles of ztw exits"),
        (["exits.head=gpf", "phases={4: {lr: 1.0}}"], r"phases\.4: .* phase 4 trains the ensembles of ztw exits"),
        (["exits.head=ztw", "phase=5"], "--phase 5: regime joint with 3 exits takes phases 1–4$"),
        (["exits.head=gpf", "exits.after=[1]"], "exit head gpf foresees later exits and needs two attached exits"),
        (["exits.head=gpf-4", "exits.after=[1]", "phase=3"], "exit head gpf-4 foresees"),
        (["exits.head=gpf-lancopku"], r"states of one width \(they are 16, 32 wide\); name a width"),
        (["exits.head=gpff"], "exits.head: is 'gpff'; no such head"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(small, tmp_path, changes, says):
    with pytest.raises(EectlError, match=says) as error:
        train(small(*changes), out=tmp_path / "run", device="cpu", quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_attach_heads_refuses_gpf_on_one_exit(tmp_path, ztw_run):
    with pytest.raises(EectlError, match="gpf-16 foresees later exits and needs two attached exits"):
        attach_heads(ztw_run / "phase-1.safetensors", after="3", head="gpf-16", out=tmp_path / "heads.safetensors")
    assert not list(tmp_path.iterdir())
