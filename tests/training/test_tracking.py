"""Gradient dominance while training: the formulas against separate backward passes and closed forms; tracking changes no bit."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import eectl.training.gradient_dominance as module
from eectl.core.errors import EectlError, Interrupted
from eectl.data import load_data
from eectl.recipe.regimes import regime_phases
from eectl.training.gradient_dominance import Tracker, auto_interval, dominance, gram_matrices, shared_parameters, why_untracked
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.toy_exits import WIDTH, CascadeHead, toy_model
from tests.training.test_step import ONE_STEP, the_batch
from tests.training.test_train import rows, same, weights

CPU = torch.device("cpu")
TINY_VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2}}"
TIMM_DROP = (
    "backbone={name: timm/vit_tiny_patch16_224, args: {depth: 3, embed_dim: 24, num_heads: 2, patch_size: 8, "
    "drop_rate: 0.2, attn_drop_rate: 0.2, drop_path_rate: 0.2}}"
)
MSDNET = (
    "backbone={name: msdnet, args: {blocks: 3, base: 1, step: 1, channels: 4, growth: 2, growth_factors: [1, 2], "
    "bottleneck_factors: [1, 2]}}"
)


def naive(model, losses_of, weights, exits):
    """Cosine and prefix cosine by K + 1 forward and backward passes of their own, and norms by segment, all in numpy's sense."""

    def gradient(objective):
        for parameter in model.parameters():
            parameter.grad = None
        objective(losses_of(model)).backward()
        vectors = []
        for segment in range(1, model.num_exits + 1):
            own = [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
                for name, p in model.named_parameters()
                if name.startswith("backbone") and model.part(name) == ("segment", segment) and not in_own_head(model, name)
            ]
            vectors.append(torch.cat(own) if own else torch.zeros(0).double())
        return vectors

    total = gradient(lambda losses: sum(weight * loss for weight, loss in zip(weights, losses, strict=True)))
    found = []
    for index, number in enumerate(exits):
        own = gradient(lambda losses, index=index: losses[index])
        cosines = [
            F.cosine_similarity(torch.cat(own[:reach]), torch.cat(total[:reach]), dim=0, eps=0).item()
            for reach in (model.num_exits, number)
        ]
        found.append((*cosines, [part.norm().item() for part in own]))
    return [list(column) for column in zip(*found, strict=True)]


def in_own_head(model, name):
    return any(name.startswith(f"backbone.net.{head}.") for head in model.backbone.head_names)


def network(small, *changes):
    recipe = small("exits.after=[0, 1]", *changes)
    data = load_data(recipe.data, device=CPU)
    return with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.double(), data


@pytest.mark.parametrize(
    "changes",
    [(), (TINY_VIT,), (MSDNET,), ("exits.head=ztw",), ("exits.head=gpf-8", TINY_VIT)],
    ids=["resnet", "vit", "msdnet", "ztw", "gpf"],
)
def test_one_forward_and_k_backward_passes_against_k_plus_one_of_each(small, monkeypatch, changes):
    monkeypatch.setattr(module, "PIECE", 1000)  # so that segments take several pieces
    model, data = network(small, *changes)
    torch.manual_seed(1)
    images, labels = torch.randn(12, *data.info.input_shape).double(), torch.randint(10, (12,))
    for head in (p for name, p in model.named_parameters() if in_own_head(model, name) and p.dim() > 1):
        torch.nn.init.normal_(head)  # some start at 0

    def losses_of(net):
        torch.manual_seed(2)
        return [F.cross_entropy(output.logits, labels) for output in net.train()(images)]

    weights = [0.2, 0.5, 0.3]
    found = dominance(gram_matrices(losses_of(model), shared_parameters(model)), torch.tensor(weights), [1, 2, 3])
    cosine, prefix, norms = naive(model, losses_of, weights, [1, 2, 3])
    assert found.cosine.tolist() == pytest.approx(cosine, abs=1e-6)
    assert found.prefix.tolist() == pytest.approx(prefix, abs=1e-6)
    torch.testing.assert_close(found.norms, torch.tensor(norms).double(), rtol=1e-6, atol=1e-9)
    assert found.norms[0, 1:].eq(0).all() and found.norms[2].gt(0).all()


def test_some_exits_of_a_cascade_and_a_frozen_segment():
    model = toy_model(CascadeHead).double()
    model.set_trainable({1, 3}, {1, 2})
    images, labels = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0)).double(), torch.arange(9) % 4

    def losses_of(net):
        outputs = net(images, [2, 3])
        return [F.cross_entropy(outputs[k - 1].logits, labels) for k in (2, 3)]

    found = dominance(gram_matrices(losses_of(model), shared_parameters(model)), torch.tensor([1.0, 3.0]), [2, 3])
    cosine, prefix, norms = naive(model, losses_of, [1.0, 3.0], [2, 3])
    assert found.cosine.tolist() == pytest.approx(cosine, abs=1e-6)
    assert found.prefix.tolist() == pytest.approx(prefix, abs=1e-6)
    assert found.norms.tolist() == [pytest.approx(row) for row in norms]
    assert found.norms[:, 1].eq(0).all()


def of_vectors(vectors, weights):
    """Dominance where exit i's gradient is vectors[i], by losses that are linear in one parameter of one segment per exit."""
    matrix, weights = torch.tensor(vectors, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    parameter = torch.zeros(matrix.shape[1], dtype=torch.float64, requires_grad=True)
    losses = [row @ parameter for row in matrix]
    empty = [[] for _ in losses[1:]]
    return dominance(gram_matrices(losses, [[parameter], *empty]), weights, range(1, len(losses) + 1))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_identities(count):
    same = of_vectors([[1.0, 2.0]] * count, [0.3] * count)
    assert same.cosine.tolist() == pytest.approx([1.0] * count) and same.pairs.flatten().tolist() == pytest.approx([1] * count**2)
    orthogonal = of_vectors(torch.eye(count).mul(5).tolist(), [0.7] * count)
    assert orthogonal.cosine.tolist() == pytest.approx([1 / math.sqrt(count)] * count)
    assert orthogonal.pairs.tolist() == torch.eye(count).tolist()


def test_one_exit_alone_scale_opposites_and_zeros():
    assert of_vectors([[3.0, -4.0]], [0.1]).cosine.tolist() == pytest.approx([1.0])
    assert of_vectors([[3.0, -4.0]], [0.1]).norms.tolist() == [pytest.approx([5.0])]
    vectors = [[1.0, 2.0, 0.0], [-1.0, 0.5, 3.0], [0.0, 1.0, 1.0]]
    plain, scaled = of_vectors(vectors, [0.2, 0.5, 0.3]), of_vectors([[v * 1e-9 for v in row] for row in vectors], [2, 5, 3])
    assert scaled.cosine.tolist() == pytest.approx(plain.cosine.tolist(), abs=1e-12)
    assert of_vectors([[1.0, 0.0], [0.0, 0.0]], [1, 1]).cosine.tolist() == pytest.approx([1.0, math.nan], nan_ok=True)
    assert of_vectors([[1.0], [-1.0]], [1, 1]).cosine.isnan().all()
    assert of_vectors([[1.0], [-1.0]], [3, 1]).cosine.tolist() == pytest.approx([1, -1])


def test_heads_are_no_shared_parameters(small):
    model, _ = network(small)
    groups = shared_parameters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [{names[id(parameter)] for parameter in group} for group in groups]
    assert "backbone.net.conv1.weight" in found[0] and not any("fc" in name for group in found for name in group)
    everything = {name for name in names.values() if name.startswith("backbone") and ".fc." not in name}
    assert set().union(*found) == everything and sum(map(len, found)) == len(everything)
    assert {name.split(".")[3] for name in found[1]} == {"1"}
    model.set_trainable({2}, {1})
    assert [len(group) > 0 for group in shared_parameters(model)] == [False, True, False]


def test_what_is_measured_is_a_function_of_the_step():
    model = toy_model()
    joint, alternating = (regime_phases(name, 3)[0] for name in ("joint", "alternating"))
    tracker = Tracker(model, joint, every=3, device=CPU)
    assert [step for step in range(9) if tracker.due(step, [1, 2, 3])] == [2, 5, 8]
    tracker = Tracker(model, alternating, every=2, device=CPU)
    sets = [sorted(exits) for exits in alternating.losses]
    assert [step for step in range(12) if tracker.due(step, sets[step % 2])] == [3, 7, 11]
    assert auto_interval(model, joint) == math.ceil((1 / 3 + 2 / 3 + 1) / 0.1)
    assert auto_interval(model, alternating) == auto_interval(model, joint) / 2


def test_which_phases_have_anything_to_compare():
    model = toy_model()
    tracked = {}
    for regime in ("disjoint", "joint", "mixed", "branch-wise", "separate", "alternating", "mixed-gradual"):
        for phase in regime_phases(regime, 3):
            model.set_trainable(phase.segments, phase.heads)
            reason = why_untracked(model, phase, "uniform")
            tracked.setdefault(regime, []).append("" if reason is None else reason.split()[1])
            assert why_untracked(model, phase, "l2w")
    assert tracked == {
        "disjoint": ["trains", "backbone"], "joint": [""], "mixed": ["trains", ""], "branch-wise": ["trains"] * 3,
        "separate": ["trains", "", ""], "alternating": [""], "mixed-gradual": ["trains", "", ""],
    }  # fmt: skip


RUNS = {
    "batchnorm": ("regime=mixed", "data.augment={crop: 1, mixup: 0.3}", "channels_last=true"),
    "dropout": (TIMM_DROP, "exits.after=[0, 1]", "data.image_size=16", "precision=bf16", "optimizer.clip_norm=0.5"),
    "gpf": (TINY_VIT, "exits.after=[0, 1]", "exits.head=gpf-8", "distillation.teacher=next", "optimizer.name=sgd"),
    "msdnet": (MSDNET, "exits.after=[0, 1]", "loss_weights=equilibrium", "regime=alternating"),
    "staged": ("regime=mixed-gradual", "epochs=1", "precision=bf16"),
}


@pytest.mark.parametrize("name", RUNS)
def test_tracking_changes_no_bit(small, tmp_path, name):
    recipe = small(*RUNS[name])
    for folder, options in {"plain": {}, "tracked": {"track": "gradient-dominance", "track_every": 1}}.items():
        train(recipe, out=tmp_path / folder, device="cpu", quiet=True, **options)
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "tracked").glob("*.safetensors"))
    assert all(same(weights(tmp_path / "plain" / file), weights(tmp_path / "tracked" / file)) for file in files)
    found = 0
    for plain, tracked in zip(rows(tmp_path / "plain"), rows(tmp_path / "tracked"), strict=True):
        dominant = tracked.pop("gradient_dominance", None)
        plain.pop("seconds"), tracked.pop("seconds")
        assert plain == tracked
        if dominant is not None:
            found += dominant["batches"]
            assert all(-1 <= cosine <= 1 for cosine in [*dominant["cosine"], *dominant["prefix_cosine"]])
            assert max(map(abs, dominant["cosine"])) < 1
    assert found >= 2


def test_the_metrics_hold_what_separate_backward_passes_give(small, tmp_path):
    recipe = small(*ONE_STEP, "loss_weights=[1, 2, 5]")
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True, track="gradient-dominance", track_every=1)
    found = rows(tmp_path / "run")[0]["gradient_dominance"]
    model, images, labels = the_batch(recipe)

    def losses_of(net):
        return [F.cross_entropy(output.logits, labels) for output in net(images)]

    cosine, prefix, norms = naive(model, losses_of, [1, 2, 5], [1, 2, 3])
    assert found["cosine"] == pytest.approx(cosine, abs=1e-4) and found["prefix_cosine"] == pytest.approx(prefix, abs=1e-4)
    assert [sum(row) for row in found["norms"]] == pytest.approx([sum(row) for row in norms], rel=1e-3)
    assert (found["exits"], found["batches"], found["every"]) == ([1, 2, 3], 1, 1)


def test_epochs_are_means_over_batches(small):
    """Two batches in one tally, one without a gradient at exit 1; a third after the epoch."""
    model = toy_model().double()
    tracker = Tracker(model, regime_phases("joint", 3)[0], every=1, device=CPU)
    index, each = torch.arange(3), []

    def measure(seed, factors):
        images = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
        outputs = model(images)
        losses = [factor * output.logits.square().mean() for factor, output in zip(factors, outputs, strict=True)]
        each.append(dominance(gram_matrices(losses, shared_parameters(model)), torch.ones(3), [1, 2, 3]))
        tracker.measure(losses, torch.ones(3), [1, 2, 3], index)

    measure(0, [1, 1, 1])
    measure(1, [0, 2, 1])
    found = tracker.take()
    assert found["cosine"][0] == pytest.approx(each[0].cosine[0].item())
    assert found["cosine"][1:] == pytest.approx(((each[0].cosine + each[1].cosine) / 2)[1:].tolist())
    assert found["norms"][0][0] == pytest.approx(each[0].norms[0, 0].item() / 2)
    assert found["batches"] == 2
    measure(2, [1, 1, 1])
    assert tracker.take()["cosine"] == pytest.approx(each[2].cosine.tolist())
    assert all(math.isnan(value) for value in tracker.take()["cosine"])


def test_a_resumed_run_tracks_what_an_uninterrupted_one_does(small, tmp_path, monkeypatch):
    from eectl.core.progress import Display

    recipe = small("epochs=4", "patience=4", "regime=mixed", TINY_VIT, "exits.after=[0, 1]", "data.limit=200")
    options = {"device": "cpu", "quiet": True, "track": "gradient-dominance", "track_every": 2}
    train(recipe, out=tmp_path / "calm", **options)
    folder, steps = tmp_path / "run", []
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", lambda _: steps.append(1) or len(steps) % 9 or os.kill(os.getpid(), signal.SIGINT))
        for _ in range(4):
            with pytest.raises(Interrupted):
                train(recipe, out=folder, resume=True, **options)
    assert "dominance" in weights(folder / "resume" / "state.safetensors")
    train(recipe, out=folder, resume=True, **options)
    calm, stopped = ([{**row, "seconds": 0} for row in rows(each)] for each in (tmp_path / "calm", folder))
    assert stopped == calm
    counts = [row["gradient_dominance"]["batches"] for row in calm if row["phase"] == 2]
    assert len(steps) == 36 and counts == [3, 3, 3, 3]
    assert same(weights(folder / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


def test_hooks_of_several_processes_stay_still(tmp_path):
    """A group of one: what DDP would send to others is counted. Measuring sends nothing; the real backward pass then does."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        model, sent = toy_model(), []
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

        def count(_state, bucket):
            sent.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        images = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            losses = [output.logits.square().mean() for output in wrapped(images)]
            grams = gram_matrices(losses, shared_parameters(model))
            assert not sent and all(parameter.grad is None for parameter in model.parameters())
            sum(losses).backward()
            assert sent
            sent.clear()
            squares = sum(p.grad.double().square().sum() for group in shared_parameters(model) for p in group)
            assert grams.sum().item() == pytest.approx(squares.item(), rel=1e-5)
            wrapped.zero_grad(set_to_none=True)
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_tracked_leaves_no_folder(small, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(EectlError, match=r"unknown --track 'gradients'.*known: gradient-dominance"):
        train(small(), out=folder, device="cpu", track="gradients")
    with pytest.raises(EectlError, match="compiled networks do not allow; --set compile=false"):
        train(small("compile=true"), out=folder, device="cpu", track="gradient-dominance", quiet=False)
    with pytest.raises(EectlError, match="--track-every 5: nothing is tracked; add --track gradient-dominance"):
        train(small(), out=folder, device="cpu", track_every=5)
    assert not Path(folder).exists()
    train(small("regime=disjoint", "epochs=1"), out=folder, device="cpu", track="gradient-dominance", quiet=False)
    said = capsys.readouterr().err
    assert said.count("phase 1: gradient dominance is not tracked: it trains on one exit at a time") == 1
    assert said.count("phase 3: gradient dominance is not tracked: the backbone is frozen") == 1
    assert not any("gradient_dominance" in row for row in rows(folder))
