"""`analyze loss-landscape`: exact at the weights, closed forms around them, what it must not depend on, and users' mistakes."""

import csv
import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_exits import toy_model
from toy_text import TOY, make_rows, write_csv, write_tokenizer

from eectl.analyses.analyze import analyze
from eectl.analyses.batch_norms import reestimate
from eectl.analyses.landscape.landscape import ask_landscape
from eectl.analyses.landscape.plane import filter_normalised, moved_names, random_plane, raw_noise
from eectl.analyses.landscape.plot import _label_places
from eectl.analyses.landscape.surfaces import CURVATURE_STEP, column, grid_coordinates, places
from eectl.analyses.question import Context, Subject
from eectl.analyses.settings import LandscapeSettings
from eectl.core.distributed import World
from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.evaluation.opened import open_session
from eectl.models import build as models
from eectl.models.checkpoint import load_checkpoint, save_checkpoint
from eectl.recipe.reading import make_recipe
from eectl.training.train import train

QUESTION = "loss-landscape"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A joint and a disjoint run, with label smoothing."""
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("runs")
    for regime in ("joint", "disjoint"):
        recipe = small_recipe(f"regime={regime}", "epochs=1", "label_smoothing=0.1")
        train(recipe, out=folder / regime, device="cpu", quiet=True)
    return folder


@contextmanager
def no_bar(_what, _total):
    yield lambda: None


def opened(path):
    return Subject("one", open_session(path, world=World(0, 1, torch.device("cpu"))))


def asked(subject, *, seed=0, batch_size=1000, **settings):
    """The one network's values."""
    given = {"points": 3, "samples": 40} | settings
    return ask_landscape([subject], LandscapeSettings(**given), Context(seed, batch_size, no_bar)).values["networks"][0]


def answer(paths, out, **settings):
    given = {"points": 3, "samples": 40} | settings
    more = {name: given.pop(name) for name in ("seed", "batch_size") if name in given}
    analyze(QUESTION, paths, out=out, device="cpu", **given, **more)
    return json.loads((out / f"{QUESTION}.json").read_text())


def plain_losses(path, rows):
    """Each exit's mean loss on some training rows, from the file, without any of the question's code."""
    checkpoint = load_checkpoint(path)
    data = load_data(checkpoint.about.data_spec, device=torch.device("cpu"))
    split = data.splits["train"]
    images = (split.rows(rows).float() / 255 - data.info.mean[0]) / data.info.std[0]
    model = checkpoint.model.to(memory_format=torch.channels_last)  # as in training
    with torch.no_grad():
        outputs = model(images.contiguous(memory_format=torch.channels_last))
    losses = [F.cross_entropy(each.logits, split.labels[rows], reduction="none", label_smoothing=0.1) for each in outputs]
    return [(each.double().sum() / len(rows)).item() for each in losses]


def test_the_centre_is_the_plain_loss_bitwise(runs):
    path = runs / "joint" / "model.safetensors"
    found = asked(opened(path), samples=1000, points=5)
    plain = plain_losses(path, torch.arange(150))
    assert found["rows"] == 150
    assert [each["loss"][2][2] for each in found["exits"]] == plain
    assert [each["centre"] for each in found["exits"]] == plain == found["plain"]["exits"]
    assert found["total"]["loss"][2][2] == pytest.approx(sum(plain) / 3, rel=1e-14)
    around = [value for each in found["exits"] for row in each["loss"] for value in row]
    assert len(set(around)) == len(around)  # every other point has moved
    parts = asked(opened(path), samples=1000, batch_size=64)  # 64 + 64 + 22 rows: means over rows, not over batches
    assert [each["centre"] for each in parts["exits"]] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("reestimated", [False, True])
def test_the_network_is_left_as_it_was(runs, reestimated):
    subject = opened(runs / "joint" / "model.safetensors")
    model = subject.session.checkpoint.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    drawn = torch.get_rng_state()
    asked(subject, reestimate=reestimated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == momenta
    assert not any(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), drawn)


def test_the_weights_come_back_to_the_bit():
    """A zero's sign included, which equality does not see; and 0 times a direction past all numbers is not taken."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.tensor([[-0.0, 1.0], [3e38, 3e38]])
    before = net.weight.detach().clone().view(torch.int32)
    with random_plane(net, ["weight"], seed=0, dimensions=2) as move:
        for place in ((0.0, 0.0), (10.0, 0.0), (0.0, -0.0)):
            move(*place)
        assert torch.equal(net.weight.detach().view(torch.int32), before)
        move(0.3, 0.3)
    assert torch.equal(net.weight.detach().view(torch.int32), before)


def test_filters_get_their_own_norms():
    weight = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]], [[6.0, 8.0]], [[0.0, 0.0]]])
    noise = torch.tensor([[[1.0, 1.0]], [[0.0, -2.0]], [[3.0, 4.0]], [[1.0, 0.0]]])
    found = filter_normalised(noise, weight)
    half = 3 / math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[[half, half]], [[0.0, -4.0]], [[6.0, 8.0]], [[0.0, 0.0]]]))
    assert filter_normalised(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])).tolist() == [0, 0, 0]


def test_noise_is_a_function_of_seed_direction_and_name():
    kinds = [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a")]
    noises = [raw_noise((50,), seed=seed, direction=direction, name=name) for seed, direction, name in kinds]
    assert torch.equal(noises[0], raw_noise((50,), seed=0, direction=0, name="a"))
    products = torch.corrcoef(torch.stack(noises)).fill_diagonal_(0)
    assert products.abs().max() < 0.5


def test_regimes_share_their_noise(runs):
    """Where each network goes, filter by filter, is the same but for the filters' norms."""
    went = []
    for regime in ("joint", "disjoint"):
        model = load_checkpoint(runs / regime / "model.safetensors").model
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with random_plane(model, before, seed=5, dimensions=2) as move:
            move(0.0, 0.5)
            went.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
            torch.testing.assert_close(
                went[-1]["exits.0.fc.weight"].norm(dim=1), before["exits.0.fc.weight"].norm(dim=1) / 2, rtol=1e-4, atol=0
            )
    for name, first in went[0].items():
        if first.dim() < 2:
            assert not first.any() and not went[1][name].any()
        else:
            units = [F.normalize(each[name].flatten(1), dim=1) for each in went]
            torch.testing.assert_close(*units, rtol=0, atol=1e-4)
            assert not torch.allclose(first, went[1][name])


@pytest.mark.parametrize("reestimated", [False, True])
def test_filters_before_batch_norm_may_have_any_scale(runs, reestimated):
    """Every filter times a factor of its own, and the statistics that go with it."""
    subjects = [opened(runs / "joint" / "model.safetensors") for _ in range(2)]
    factors = torch.tensor([1.0, 8.0, 0.25, 64.0] * 4)
    for subject, scale in zip(subjects, (torch.ones(16), factors), strict=True):
        net = subject.session.checkpoint.model.backbone.net
        net.bn1.eps = 1e-12
        with torch.no_grad():
            net.conv1.weight.mul_(scale[:, None, None, None])
            net.bn1.running_mean.mul_(scale)
            net.bn1.running_var.mul_(scale**2)
    one, other = (asked(subject, reestimate=reestimated) for subject in subjects)
    for a, b in zip([*one["exits"], one["total"]], [*other["exits"], other["total"]], strict=True):
        torch.testing.assert_close(torch.tensor(a["loss"]), torch.tensor(b["loss"]), rtol=1e-4, atol=0)


def quadratic(dimensions):
    """A linear network of three weights under squared error: losses on a grid, and the closed form's ingredients."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(30, 3, generator=generator), torch.randn(30, 1, generator=generator)
    net = nn.Linear(3, 1, bias=False)
    origin = net.weight.detach().clone()
    deltas = [raw_noise((1, 3), seed=4, direction=number, name="weight") for number in range(dimensions)]
    moves = torch.stack([(inputs @ (delta * origin.norm() / delta.norm()).T) for delta in deltas])[..., 0].double()
    residual = ((inputs @ origin.T) - targets)[:, 0].double()
    coordinates = grid_coordinates(5, 2.0)
    losses = {}
    with random_plane(net, ["weight"], seed=4, dimensions=dimensions) as move, torch.no_grad():
        for place in places(coordinates, dimensions):
            move(*place)
            losses[place] = (net(inputs) - targets).double().square().mean()[None]
    assert torch.equal(net.weight, origin)
    return column(losses, 0, coordinates, dimensions), coordinates, moves, residual


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_quadratic(dimensions):
    found, coordinates, moves, residual = quadratic(dimensions)
    assert coordinates == [-2.0, -1.0, 0.0, 1.0, 2.0]
    step = torch.tensor(coordinates, dtype=torch.float64)
    if dimensions == 1:
        expected = (residual + step[:, None] * moves[0]).square().mean(dim=1)
    else:
        expected = (residual + step[:, None, None] * moves[0] + step[:, None] * moves[1]).square().mean(dim=2)
    torch.testing.assert_close(torch.tensor(found["loss"], dtype=torch.float64), expected, rtol=1e-5, atol=0)
    own = moves.square().mean()
    assert found["rise"] == pytest.approx([distance**2 * own.item() for distance in (0.5, 1.0, 2.0)], rel=1e-5)
    hessian = 2 * moves @ moves.T / 30
    assert found["curvature"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


def test_numbers_by_hand():
    coordinates = grid_coordinates(3, 1.0)
    losses = {(x,): torch.tensor([1 + abs(x)]) for (x,) in places(coordinates, 1)}
    found = column(losses, 0, coordinates, 1)
    assert found["loss"] == [2, 1, 2] and found["centre"] == 1 and found["rise"] == [0.25, 0.5, 1]
    assert found["curvature"] == pytest.approx(2 / CURVATURE_STEP, rel=1e-4)
    losses[1.0,], losses[-0.5,] = torch.tensor([math.inf]), torch.tensor([math.nan])
    found = column(losses, 0, coordinates, 1)
    assert found["loss"] == [2, 1, None] and found["rise"] == [0.25, None, None]
    losses[CURVATURE_STEP,] = torch.tensor([math.inf])
    assert column(losses, 0, coordinates, 1)["curvature"] is None


def test_what_moves():
    model = toy_model()
    heads = {"backbone.net.fc.weight", "backbone.net.fc.bias", "exits.0.fc.weight", "exits.0.fc.bias", "exits.1.fc.weight",
             "exits.1.fc.bias"}  # fmt: skip
    assert set(moved_names(model, "heads")) == heads
    assert set(moved_names(model, "backbone")) == {f"backbone.net.b{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert set(moved_names(model, "all")) == {name for name, _ in model.named_parameters()}


def test_tied_weights_move_once():
    model = toy_model()
    model.exits[1].fc.weight = model.exits[0].fc.weight
    before = model.exits[0].fc.weight.detach().clone()
    with random_plane(model, moved_names(model, "all"), seed=1, dimensions=1) as move:
        move(0.5)
        noise = raw_noise(before.shape, seed=1, direction=0, name="exits.0.fc.weight")
        expected = before + 0.5 * noise * before.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.exits[1].fc.weight.detach(), expected)
        assert model.exits[1].fc.weight is model.exits[0].fc.weight


def test_statistics_are_the_mean_over_batches():
    torch.manual_seed(0)
    conv, norm, dropout = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9)
    net = nn.Sequential(dropout, conv, norm).eval()
    batches = [torch.randn(4, 2, 6, 6) + shift for shift in (0.0, 3.0)]
    reestimate(net, batches)
    with torch.no_grad():
        means = torch.stack([conv(batch).mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
        variances = torch.stack([conv(batch).var(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1 and not norm.training


def test_files_of_two_networks(runs, tmp_path):
    paths = [runs / regime / "model.safetensors" for regime in ("joint", "disjoint")]
    report = answer(paths, tmp_path)
    values = report["values"]
    assert values["coordinates"] == [-1.0, 0.0, 1.0] and [one["label"] for one in values["networks"]] == ["joint", "disjoint"]
    with open(tmp_path / f"{QUESTION}.csv", newline="") as handle:
        records = list(csv.DictReader(handle))
    assert len(records) == 2 * 4 * 9
    flat = [
        value for one in values["networks"] for each in (*one["exits"], one["total"]) for row in each["loss"] for value in row
    ]
    assert [float(record["loss"]) for record in records] == flat
    assert [(record["exit"], record["x"], record["y"]) for record in records[1:3]] == [("1", "-1.0", "0.0"), ("1", "-1.0", "1.0")]
    a, b = ([value for row in one["total"]["loss"] for value in row] for one in values["networks"])
    distance = math.sqrt(sum(math.log10(x / y) ** 2 for x, y in zip(a, b, strict=True)) / 9)
    assert values["differences"][0] == {
        "networks": ["joint", "disjoint"], "of": "total", "rms_log10": pytest.approx(distance), "points": 9,
    }  # fmt: skip
    rise = values["networks"][0]["total"]["rise"][1]
    assert f"A random step of 0.5 filter norms raises the total loss by {rise:.3g} in joint" in report["reading"][0]
    assert "40 train images" in report["reading"][1] and "seed 0" in report["reading"][1]
    assert report["notes"] == ["the losses hold the recipe's label smoothing"]


def test_seeds(runs):
    """Equal seeds give equal numbers; another gives other directions where the rows are the same."""
    path = runs / "joint" / "model.safetensors"
    one, same, other = (asked(opened(path), seed=seed, samples=1000, dimensions=1)["total"] for seed in (0, 0, 1))
    assert one == same and one["centre"] == other["centre"] and one["loss"] != other["loss"]
    assert (
        asked(opened(path), seed=0, samples=50)["total"]["centre"] != asked(opened(path), seed=1, samples=50)["total"]["centre"]
    )


def test_a_line_is_a_cut_through_the_plane(runs, tmp_path):
    paths = [runs / regime / "model.safetensors" for regime in ("joint", "disjoint")]
    plane, line = (answer(paths, tmp_path / str(dimensions), dimensions=dimensions)["values"] for dimensions in (2, 1))
    for one, other in zip(plane["networks"], line["networks"], strict=True):
        assert other["exits"][0]["loss"] == [row[1] for row in one["exits"][0]["loss"]]
        assert other["total"]["loss"] == [row[1] for row in one["total"]["loss"]]
    assert (tmp_path / "1" / f"{QUESTION}.png").stat().st_size > 5000


def test_only_heads_and_only_the_backbone(runs):
    path = runs / "joint" / "model.safetensors"
    everything, heads, backbone = (asked(opened(path), only=only, dimensions=1) for only in ("all", "heads", "backbone"))
    assert heads["parameters_moved"] + backbone["parameters_moved"] == everything["parameters_moved"] < everything["parameters"]
    losses = [each["exits"][2]["loss"] for each in (everything, heads, backbone)]
    assert losses[0][1] == losses[1][1] == losses[2][1]
    assert len({loss[0] for loss in losses}) == 3


def test_a_network_without_exits(runs, tmp_path):
    report = answer([runs / "disjoint" / "phase-1.safetensors"], tmp_path)
    (network,) = report["values"]["networks"]
    assert len(network["exits"]) == 1 and network["exits"][0]["loss"] == network["total"]["loss"]
    assert "the first exit" not in report["reading"][0]


def test_losses_past_every_number(runs, tmp_path):
    report = answer([runs / "joint" / "model.safetensors"], tmp_path, span=1e38)
    total = report["values"]["networks"][0]["total"]
    assert total["loss"][0][0] is None and total["loss"][1][1] is not None and total["rise"] == [None] * 3
    assert total["curvature"] > 0
    assert report["notes"][0] == "joint: 8 points of the grid have no finite total loss and are left blank"
    assert report["reading"][0].startswith("A step of 2.5e+37 filter norms already leaves no finite loss")
    with open(tmp_path / f"{QUESTION}.csv", newline="") as handle:
        assert [record["loss"] for record in csv.DictReader(handle)][-1] == ""


MISTAKES = {
    "--samples 0: at least 1": {"samples": 0},
    "--points 1: at least 3": {"points": 1},
    "--points 8: an odd number, so that one is the weights themselves; try 9": {"points": 8},
    "--span 0: above 0": {"span": 0.0},
    "--span nan: above 0": {"span": math.nan},
    "--dimensions 3: 1": {"dimensions": 3},
    "--only 'head'": {"only": "head"},
    "--batch-size 1: at least 2; BatchNorm": {"batch_size": 1, "reestimate": True},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(runs, tmp_path, message):
    with pytest.raises(EectlError, match=message) as caught:
        answer([runs / "joint" / "model.safetensors"], tmp_path / "out", **MISTAKES[message])
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_at_the_weights(runs, tmp_path):
    checkpoint = load_checkpoint(runs / "joint" / "model.safetensors")
    checkpoint.model.exits[1].fc.weight.data.fill_(math.nan)
    save_checkpoint(tmp_path / "broken.safetensors", checkpoint.model, checkpoint.about)
    with pytest.raises(EectlError, match=r"broken.safetensors: the loss of exit 2 on train rows is not finite"):
        answer([tmp_path / "broken.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_regression_on_texts(tmp_path, monkeypatch):
    """The centre row by row, so that padding does not count; and there is no BatchNorm to re-estimate."""
    monkeypatch.setitem(models.BACKBONES, TOY.name, TOY.build)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(200, seed=1))
    data = {"name": "text", "root": str(tmp_path / "data"), "target": "score", "task": "regression", "tokenizer": tokenizer}
    base = {"backbone": {"name": TOY.name}, "exits": {"after": [0, 1]}, "regime": "joint", "epochs": 1, "batch_size": 16}
    train(make_recipe(base | {"data": data}, where="test"), out=tmp_path / "run", device="cpu", quiet=True)
    path = tmp_path / "run" / "model.safetensors"
    found = answer([path], tmp_path / "out", samples=1000, batch_size=32)["values"]["networks"][0]
    checkpoint = load_checkpoint(path)
    split = load_data(checkpoint.about.data_spec, device=torch.device("cpu")).splits["train"]
    with torch.no_grad():
        rows = [checkpoint.model(split.rows(torch.tensor([row]))) for row in range(len(split))]
    losses = [F.mse_loss(torch.cat([row[k].logits[:, 0] for row in rows]), split.labels).item() for k in range(3)]
    assert [each["centre"] for each in found["exits"]] == pytest.approx(losses, rel=1e-5)
    with pytest.raises(EectlError, match="--reestimate: no network here has BatchNorm statistics"):
        answer([path], tmp_path / "again", reestimate=True)


def test_contours_are_labelled_off_the_edges_the_centre_and_each_other():
    """Rings around the centre, some of them crowded, some beyond the edge, and one level that nowhere occurs."""
    angles = torch.linspace(0, 2 * math.pi, 200)
    radii = [0.05, 0.1, *(0.3 + 0.02 * step for step in range(30)), 1.3]
    rings = [[torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1).numpy()] for radius in radii]
    chosen = _label_places([*rings, []], 1.0)
    assert 6 <= len(chosen) < 25  # more have no room
    for index, place in enumerate(chosen):
        assert max(map(abs, place)) < 0.9 and math.hypot(*place) > 0.2
        assert all(math.dist(place, other) > 0.3 for other in chosen[:index])
