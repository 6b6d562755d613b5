"""Captured steps: on a tape that stands for a CUDA graph every kind of phase gives the bits of plain steps."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from tape import Tape
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.distributed import World
from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.data import load_data
from eectl.training.feed import training_data
from eectl.training.loop import Journal, Tracking, run_phase
from eectl.training.network import first_network, planned_phases, resolve, with_combine, with_exits
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import WORTH_STEPS, make_execution
from eectl.training.step import Stepper
from eectl.training.train import train
from tests.training.test_train import same, weights

CPU = torch.device("cpu")
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2, dropout: 0.3}}"
BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # what dropout draws depends on the padding


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiler does not look into functions that a tape watches."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


class Lines(Display):
    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def say(self, line):
        self.said.append(line)


def run(recipe, folder, *, phase=0, tracking=None, **how):
    """A phase's weights, what it returned, and the lines that it said."""
    data = load_data(recipe.data, device=CPU)
    network = first_network(recipe, data.info)
    recipe = resolve(recipe, network)
    network = with_exits(network, recipe.exits, seed=0)
    known, lines = training_data(data), Lines()
    wanted = planned_phases(recipe)[phase]
    network = with_combine(network, seed=recipe.seed) if wanted.combine else network
    model = network.model
    execution = replace(make_execution(recipe, model.backbone, CPU), **how)
    settings = phase_settings(recipe, wanted, model, known, num_processes=1)
    folder.mkdir(parents=True)
    done = run_phase(
        model, settings, known, execution=execution, world=World(0, 1, CPU), journal=Journal(RunFolder(folder), lines, {}),
        tracking=tracking,
    )  # fmt: skip
    said = [line for line in lines.said if "recorded" in line or "compiled" in line]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, done, said


def check(recipe, folder, **more):
    tape = Tape()
    plain, done, _ = run(recipe, folder / "plain", compile=False, **more)
    captured, again, said = run(recipe, folder / "captured", compile=True, make_recorder=lambda _: tape, **more)
    assert [name for name in plain if not plain[name].equal(captured[name])] == []
    assert done["validation"] == again["validation"]
    assert not said
    return tape


IMAGES = [
    ["regime=joint"],
    ["regime=joint", "optimizer.clip_norm=0.5", "label_smoothing=0.1"],
    ["regime=joint", "optimizer={name: sgd, lr: 0.05, momentum: 0.9}"],
    ["regime=alternating"],
    ["regime=joint", "exits.head=gpf-8", "loss_weights=equilibrium"],
    ["regime=joint", "loss_weights=sdn-ramp"],
    ["regime=joint", "distillation.teacher=later"],
    ["regime=joint", "exits.head=ztw"],
    ["regime=joint", VIT, "exits.after=[0, 1]"],
    ["regime=joint", VIT, "exits.after=[0, 1]", "data.augment={mixup: 0.2}"],
    ["regime=joint", "precision=bf16"],
    ["regime=joint", "class_weights=balanced", "metric=balanced"],
    ["regime=joint", "ema=0.9", "accumulate=3", "class_weights=balanced"],
    ["regime=joint", "optimizer={name: lion, lr: 1e-3, weight_decay: 0.1}"],
    ["regime=joint", "optimizer={layer_decay: 0.7, weight_decay: {value: 0.1}, clip_norm: 1.0}"],
    ["regime=joint", VIT, "exits.after=[0, 1]", "class_weights=balanced", "data.augment={mixup: 0.2}"],
]


@pytest.mark.parametrize("changes", IMAGES, ids=lambda changes: " ".join(changes)[:60])
@pytest.mark.usefixtures("uncompiled")
def test_images(small, tmp_path, changes):
    tape = check(small(*changes, epochs=3), tmp_path)
    assert tape.replays >= 3 and tape.rehearsals >= 3


@pytest.mark.parametrize("regime", ["disjoint", "branch-wise", "separate", "mixed-gradual"])
@pytest.mark.usefixtures("uncompiled")
def test_each_phase_of_a_regime(small, tmp_path, regime):
    recipe = small(f"regime={regime}", epochs=2)
    for phase in range(len(planned_phases(resolve(recipe, first_network(recipe, load_data(recipe.data, device=CPU).info))))):
        assert check(recipe, tmp_path / str(phase), phase=phase).replays


@pytest.mark.usefixtures("uncompiled")
def test_ensembles(small, tmp_path):
    recipe = small("regime=disjoint", "exits.head=ztw", epochs=2)
    assert check(recipe, tmp_path, phase=2).replays


@pytest.mark.usefixtures("uncompiled")
def test_blocks_that_run_again(small, tmp_path):
    changes = ["regime=joint", "exits.after=[0, 1]", "checkpoint_activations=true"]
    assert check(small(*changes, epochs=3), tmp_path / "cnn").replays
    assert check(small(*changes, VIT.replace("0.3", "0"), epochs=3), tmp_path / "vit").replays


@pytest.mark.usefixtures("uncompiled")
def test_blocks_that_run_again_and_draw_are_not_captured(small, tmp_path):
    """Their generator would have to be set back on the way, which no graph can do."""
    recipe = small("regime=joint", VIT, "exits.after=[0, 1]", "checkpoint_activations=true", epochs=3)
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    same, _, said = run(recipe, tmp_path / "same", compile=True, make_recorder=lambda _: Tape())
    assert all(plain[name].equal(same[name]) for name in plain) and len(said) == 1 and "generator" in said[0]


def texts(small, folder):
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", make_rows(300, seed=1))
    tokenizer = write_tokenizer(folder / "tokenizer")
    data = {"name": "text", "root": str(folder / "data"), "target": "mood", "tokenizer": tokenizer, "max_length": 20}
    return small(data=data, backbone={"name": "hf/bert", "args": BERT}, exits={"after": [0, 1]}, epochs=3)


@pytest.mark.usefixtures("uncompiled")
def test_texts_come_in_few_lengths(small, tmp_path):
    recipe, tape = texts(small, tmp_path), Tape()
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    captured, _, said = run(recipe, tmp_path / "captured", compile=True, make_recorder=lambda _: tape)
    assert tape.replays and len(tape.num_operations) == 1 and not said  # of all lengths, 20 tokens at most
    drift = max((plain[name] - captured[name]).abs().max().item() for name in plain if plain[name].is_floating_point())
    assert drift < 1e-5  # sums over padding go in another order


@pytest.mark.parametrize(("changes", "tracking"), [(["loss_weights=l2w"], None), ([], Tracking(2))])
def test_what_cannot_be_captured_says_so_and_runs(small, tmp_path, changes, tracking):
    recipe, tape = small("regime=joint", *changes), Tape()
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False, tracking=tracking)
    same, _, said = run(recipe, tmp_path / "same", compile=True, make_recorder=lambda _: tape, tracking=tracking)
    assert all(plain[name].equal(same[name]) for name in plain) and not tape.replays
    assert len(said) == 1 and "steps are not compiled, since" in said[0]


@pytest.mark.usefixtures("uncompiled")
def test_a_network_that_reads_back_runs_uncaptured_with_the_same_result(small, tmp_path, monkeypatch):
    from eectl.models.heads import SdnHead

    known = SdnHead.says

    def says(self, read, earlier):
        if torch.is_grad_enabled():
            float(read.detach().sum())
        return known(self, read, earlier)

    monkeypatch.setattr(SdnHead, "says", says)
    recipe, tape = small("regime=joint", epochs=3), Tape()
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    same, _, said = run(recipe, tmp_path / "same", compile=True, make_recorder=lambda _: tape)
    assert all(plain[name].equal(same[name]) for name in plain)
    assert len(said) == 1 and "no CUDA graph could be recorded" in said[0]


def test_what_auto_means(small):
    recipe = small("regime=joint")
    model = first_network(recipe, load_data(recipe.data, device=CPU).info).model
    execution = replace(make_execution(recipe, model.backbone, CPU), compile="auto")
    assert execution.accelerated(10**6) == (False, False)  # on a CPU never
    on_gpu = replace(execution, make_recorder=lambda _: Tape())
    assert on_gpu.accelerated(WORTH_STEPS) == (True, True) and on_gpu.accelerated(WORTH_STEPS - 1) == (False, False)
    assert replace(on_gpu, compile=True).accelerated(1) == (True, True)
    assert replace(on_gpu, compile=False).accelerated(10**6) == (False, False)
    assert replace(execution, compile=True).accelerated(1) == (True, False)
    assert replace(on_gpu, recomputes=True).accelerated(WORTH_STEPS) == (False, True)


COMPILED = [
    ["regime=joint", "optimizer.clip_norm=0.5", "label_smoothing=0.1"],
    ["regime=joint", "exits.head=gpf-8", "loss_weights=equilibrium"],
    ["regime=joint", "exits.head=ztw", "distillation.teacher=later"],
    ["regime=joint", VIT, "exits.after=[0, 1]", "data.augment={cutmix: 0.2}", "precision=bf16"],
    ["regime=alternating"],
    ["regime=joint", "class_weights=balanced"],
]


@pytest.mark.parametrize("changes", COMPILED, ids=lambda changes: " ".join(changes)[:60])
def test_the_step_compiles_as_a_whole(small, tmp_path, changes):
    """Without a graph break, or it would be said; the compiler runs the operations that it traced."""
    recipe = small(*changes)
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    compiled, _, said = run(recipe, tmp_path / "compiled", compile=True, compiler="eager")
    assert not said
    drift = max((plain[name] - compiled[name]).abs().max().item() for name in plain if plain[name].is_floating_point())
    assert drift < (1e-2 if "bf16" in str(changes) else 1e-3)  # a step of AdamW is some 3e-3


def test_texts_compile(small, tmp_path):
    recipe = texts(small, tmp_path)
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    compiled, _, said = run(recipe, tmp_path / "compiled", compile=True, compiler="eager")
    assert not said and all(torch.allclose(plain[name], compiled[name], atol=1e-5) for name in plain)


def test_a_step_that_does_not_compile_runs_as_it_is(small, tmp_path):
    def broken(*_):
        raise ValueError("no such compiler here")

    recipe = small("regime=joint")
    plain, _, _ = run(recipe, tmp_path / "plain", compile=False)
    same, _, said = run(recipe, tmp_path / "same", compile=True, compiler=broken)
    assert all(plain[name].equal(same[name]) for name in plain)
    assert len(said) == 1 and "could not be compiled" in said[0] and "no such compiler" in said[0]


@pytest.mark.usefixtures("uncompiled")
def test_a_captured_run_that_was_stopped_goes_on_to_the_same_weights(small, tmp_path, monkeypatch):
    """Its first steps are then plain again, and others are replayed."""
    recipe, tapes, taken = small("regime=joint", "optimizer.clip_norm=1.0", epochs=4), [], []
    train(recipe, out=tmp_path / "plain", device="cpu")

    def on_a_gpu(recipe, backbone, device):
        return replace(make_execution(recipe, backbone, device), compile=True, make_recorder=recorder)

    def recorder(_):
        tapes.append(Tape())
        return tapes[-1]

    step = Stepper.__call__

    def stopping(*arguments):
        taken.append(1)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr("eectl.training.run_phases.make_execution", on_a_gpu)
    monkeypatch.setattr(Stepper, "__call__", stopping)
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", device="cpu")
    train(recipe, out=tmp_path / "run", device="cpu", resume=True)
    assert [tape.replays > 0 for tape in tapes if tape.rehearsals] == [True, True] and len(taken) == 16
    assert same(weights(tmp_path / "plain" / "model.safetensors"), weights(tmp_path / "run" / "model.safetensors"))


def test_a_memory_that_recordings_fill_is_named(small, tmp_path, monkeypatch):
    class Full(Tape):
        def record(self, _):
            self.num_bytes = 3_210_000_000
            raise torch.OutOfMemoryError("CUDA out of memory")

    def on_a_gpu(*arguments):
        return replace(make_execution(*arguments), make_recorder=lambda _: Full())

    monkeypatch.setattr("eectl.training.run_phases.make_execution", on_a_gpu)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(EectlError, match=r"batch_size=16 \(it is 32, over all processes; CUDA graphs hold 3.21 GB\)"):
        train(small("compile=true"), out=tmp_path / "run", device="cpu")
