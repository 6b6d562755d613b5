"""Mode connectivity: barriers by hand, BatchNorm's statistics beside a naive mean, networks that are one but for unit order."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import small_recipe
from matplotlib.figure import Figure
from running import refused
from torch import nn
from torch.nn import functional

from eectl.analyses.analyze import analyze
from eectl.analyses.batch_norms import reestimate
from eectl.analyses.connectivity import barriers
from eectl.analyses.connectivity.connectivity import interpolate
from eectl.analyses.connectivity.permutations import find_permutations
from eectl.analyses.connectivity.plot import draw_connectivity
from eectl.analyses.question import Answer
from eectl.data import load_data
from eectl.models.checkpoint import load_checkpoint, save_checkpoint
from eectl.training.train import train

VIT = (
    "backbone.name=timm/vit_tiny_patch16_224",
    "backbone.args={patch_size: 4, embed_dim: 16, depth: 3, num_heads: 2}",
    "exits.after=[1]",
)


def test_barrier_is_the_highest_rise_above_the_chord():
    assert barriers.barrier([1.0, 4.0, 3.0]) == 2.0  # the chord at a half is 2
    assert barriers.barrier([0.0, 1.0, 2.0, 3.0]) == 0.0
    assert barriers.barrier([1.0, 0.5, 1.0]) == 0.0  # a valley is no barrier
    parabola = [share * (1 - share) + 2 * share for share in barriers.shares(11)]
    assert barriers.barrier(parabola) == pytest.approx(0.25)


def test_a_line_has_a_barrier_per_exit_and_one_of_their_mean():
    line = {"loss": [[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], "score": [[1.0, 1.0]] * 4}
    found = barriers.summarize_line(line)
    assert found["barrier"] == [3.0, 1.0] and found["mean_barrier"] == 2.0 and found["barrier_of_mean"] == 1.5


def test_whole_numbers_are_not_interpolated():
    first = {"w": torch.tensor([0.0, 4.0]), "count": torch.tensor(3)}
    second = {"w": torch.tensor([1.0, 0.0]), "count": torch.tensor(9)}
    found = interpolate(first, second, 0.25)
    assert found["w"].tolist() == [0.25, 3.0] and found["count"].item() == 3


def test_batch_norm_statistics_are_the_mean_over_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    batches = list(torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0)))
    reestimate(model, batches)
    with torch.no_grad():
        hidden = [model[0](batch) for batch in batches]
    assert torch.allclose(model[1].running_mean, torch.stack([each.mean(0) for each in hidden]).mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, torch.stack([each.var(0) for each in hidden]).mean(0), atol=1e-6)
    assert model[1].momentum == 0.3 and not any(module.training for module in model.modules())


def permuted(path, out, *, label_seed):
    """The checkpoint's units in another order and, so that it counts as another run, another seed and history."""
    checkpoint = load_checkpoint(path)
    model = checkpoint.model.eval()
    rows = torch.randn(2, *checkpoint.about.spec.input_shape, generator=torch.Generator().manual_seed(0))
    spec = find_permutations(model, rows[:1])
    moved = spec.apply(
        {key: tensor.clone() for key, tensor in model.state_dict().items()}, spec.shuffled(torch.Generator().manual_seed(5))
    )
    model.load_state_dict(moved)
    about = replace(checkpoint.about, recipe={**checkpoint.about.recipe, "seed": label_seed}, history=())
    save_checkpoint(out, model, about)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connected")
    changes = {
        "joint": (),
        "other": ("seed=1",),
        "disjoint": ("regime=disjoint",),
        "mixed": ("regime=mixed",),
        "moved-exits": ("exits.after=[1]",),
        "vit": VIT,
    }
    paths = {}
    for name, more in changes.items():
        recipe = small_recipe("epochs=1", "data.limit=200", *more)
        train(recipe, out=folder / name, device="cpu", quiet=True)
        paths[name] = folder / name / "model.safetensors"
    paths["plain"] = folder / "disjoint" / "phase-1.safetensors"
    paths["permuted"] = permuted(paths["joint"], folder / "permuted.safetensors", label_seed=1)
    paths["vit-permuted"] = permuted(paths["vit"], folder / "vit-permuted.safetensors", label_seed=1)
    return paths


def connect(paths, out, **settings):
    settings = {"points": 5, "samples": 60, "bn_samples": 64, "orders": 3} | settings
    analyze("mode-connectivity", paths, out=out, device="cpu", say=print, **settings)
    return json.loads((out / "mode-connectivity.json").read_text())


@pytest.mark.parametrize("name", ["joint", "vit"])
def test_permuted_networks_are_matched_back(runs, tmp_path, name):
    """One network in two orders of its units: a barrier as they are, none once matched, on every exit and both splits."""
    other = "permuted" if name == "joint" else "vit-permuted"
    (pair,) = connect([runs[name], runs[other]], tmp_path)["values"]["pairs"]
    for split in ("train", "test"):
        line = pair["paths"]["matched"][split]
        assert max(abs(value) for value in line["barrier"]) < 1e-4
        naive = pair["paths"]["naive"][split]["loss"]
        assert max(abs(middle - end) for middle, end in zip(naive[2], naive[0], strict=True)) > 1e-3
        for at in line["loss"]:
            assert at == pytest.approx(line["loss"][0], abs=1e-4)
    assert pair["matching"]["after"] == pytest.approx(1.0, abs=1e-5) and pair["matching"]["before"] < 0.9


@pytest.mark.parametrize("anew", [False, True], ids=["stored", "re-estimated"])
def test_losses_are_those_of_a_naive_loop(runs, tmp_path, anew):
    """Interpolated by hand, cross-entropy and hits over all rows; BatchNorm as stored, or from one pass over all train rows."""
    settings = {"points": 3, "samples": 10_000, "bn_samples": 10_000, "reestimate": anew}
    line = connect([runs["joint"], runs["other"]], tmp_path, **settings)["values"]["pairs"][0]["paths"]["naive"]["test"]
    one, other = (load_checkpoint(runs[name]) for name in ("joint", "other"))
    data = load_data(one.about.data_spec, device=torch.device("cpu"))
    mean, std = (torch.tensor(each)[:, None, None] for each in (data.info.mean, data.info.std))

    def whole(name):
        (batch,) = data.splits[name].batches([torch.arange(len(data.splits[name]))])
        return (batch.inputs / 255 - mean) / std, batch.targets

    (inputs, targets), (train_inputs, _) = whole("test"), whole("train")
    assert len(train_inputs) <= one.about.eval_batch_size  # one batch, so that the mean over batches is this one's
    model = one.model.eval()
    mine, theirs = ({key: each.clone() for key, each in it.model.state_dict().items()} for it in (one, other))
    for point, share in enumerate((0.0, 0.5, 1.0)):
        blended = {
            key: (1 - share) * mine[key] + share * theirs[key] if mine[key].is_floating_point() else mine[key] for key in mine
        }
        model.load_state_dict(blended)
        with torch.no_grad():
            if anew:
                for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
                    norm.momentum = 1.0  # what the last batch says, and nothing of before
                    norm.train()
                model(train_inputs)
                model.eval()
            outputs = model(inputs)
        for exit_, output in enumerate(outputs):
            loss = functional.cross_entropy(output.logits, targets).item()
            hits = (output.logits.argmax(1) == targets).float().mean().item()
            assert line["loss"][point][exit_] == pytest.approx(loss, rel=1e-4)
            assert line["score"][point][exit_] == pytest.approx(hits, abs=1e-6)


def test_the_map_and_its_records(runs, tmp_path):
    found = connect([runs["joint"], runs["other"], runs["disjoint"], runs["mixed"]], tmp_path, points=3, orders=1)
    values = found["values"]
    labels = [each["label"] for each in found["checkpoints"]]
    assert len(values["pairs"]) == 6
    for path in barriers.PATHS:
        for split in barriers.SPLITS:
            grid = values["barriers"][path][split]
            for pair in values["pairs"]:
                i, j = labels.index(pair["first"]), labels.index(pair["second"])
                assert grid[i][j] == grid[j][i] == pair["paths"][path][split]["mean_barrier"]
            assert all(grid[i][i] == 0 for i in range(4))
    notes = " ".join(found["notes"])
    assert "disjoint, seed 0 and mixed, seed 0: grown from one checkpoint" in notes
    assert "joint, seed 0 and disjoint, seed 0; joint, seed 0 and mixed, seed 0: of one seed" in notes
    lines = (tmp_path / "mode-connectivity.csv").read_text().splitlines()
    exits = len(values["pairs"][0]["paths"]["naive"]["test"]["barrier"])
    assert len(lines) == 1 + 6 * 2 * 2 * 3 * exits


def test_a_network_without_exits_leaves_the_others_out(runs, tmp_path):
    found = connect([runs["plain"], runs["other"]], tmp_path, points=3, orders=1)
    assert any("no exits, so the others' were left out" in note for note in found["notes"])
    assert len(found["values"]["pairs"][0]["paths"]["naive"]["test"]["barrier"]) == 1


@pytest.mark.parametrize(
    ("names", "options", "line"),
    [
        (["joint"], [], "at least 2"),
        (["joint", "vit"], [], "has backbone"),
        (["joint", "moved-exits"], [], "has exits after"),
        (["joint", "other"], ["--points", "2"], "--points"),
        (["joint", "other"], ["--orders", "0"], "--orders"),
        (["joint", "other"], ["--bn-samples", "1"], "--bn-samples"),
    ],
)
def test_mistakes_have_one_line_and_no_file(runs, tmp_path, names, options, line):
    paths = [runs[name] for name in names]
    quiet = ["--device", "cpu", "-q", "-o", tmp_path / "out"]
    said = refused("analyze", "mode-connectivity", *paths, *quiet, *options)
    assert len(said.splitlines()) == 1 and line in said and len(said) < 500
    assert not list(tmp_path.iterdir())


def test_matching_that_changes_nothing_says_so(runs, tmp_path):
    """A network and its copy: no order of units is closer than the one they have."""
    copy = tmp_path / "copy" / "model.safetensors"
    copy.parent.mkdir()
    shutil.copy(runs["joint"], copy)
    found = connect([runs["joint"], copy], tmp_path, points=3, orders=1)
    assert found["values"]["pairs"][0]["matching"]["moved"] == 0
    assert any("matching changed nothing" in note for note in found["notes"])


@pytest.mark.parametrize("moved", [0, 3])
@pytest.mark.parametrize("num_exits", [1, 3, 18])
def test_the_picture_of_a_pair_labels_its_exits(num_exits, moved):
    lines = {what: [[value / (2 + exit) for exit in range(num_exits)] for value in (1, 2, 1)] for what in ("loss", "score")}
    pair = {"paths": {path: dict.fromkeys(("train", "test"), lines) for path in barriers.PATHS}, "matching": {"moved": moved}}
    values = {"pairs": [pair], "lambdas": [0, 0.5, 1], "score": "accuracy", "samples": {"train": 5, "test": 6}}
    figure = Figure()
    draw_connectivity(figure, Answer(values, [], [], ("", "")), ["one", "two"])
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert [f"exit {number}" in words for number in range(num_exits + 2)] == [False, *[True] * num_exits, False]
    assert ("matching changed nothing" in legend.get_title().get_text()) == (not moved)
    accuracy = figure.axes[2]
    assert accuracy.get_ylabel() == "accuracy, %" and max(accuracy.lines[0].get_ydata()) == 100.0
