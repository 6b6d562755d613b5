"""Mutual information: channels and clusters in closed form, a naive double loop, and the question from end to end."""

import json
import math

import numpy as np
import pytest
import torch

from eectl.analyses.analyze import analyze
from eectl.analyses.information import InformationReader, estimate_information
from eectl.core.errors import EectlError
from eectl.training.train import train
from tests.conftest import small_recipe


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("d", "s", "sigma"), [(1, 1.0, 1.0), (2, 1.0, 0.7), (3, 2.0, 1.5), (5, 1.0, 1.0)])
def test_the_gaussian_channel(d, s, sigma):
    """The mean over 20 samples: one of 2,000 rows has a standard error of 4 % at d = 1."""
    found = [estimate_information(s * gaussian(2000, d, seed), sigma, seed=seed) for seed in range(20)]
    expected = d / 2 * math.log(1 + s**2 / sigma**2)
    assert np.mean([one.sampled for one in found]) == pytest.approx(expected, rel=0.03)
    assert np.mean([one.leave_one_out for one in found]) == pytest.approx(expected, rel=0.05)
    assert all(one.lower < one.sampled < one.upper for one in found)
    assert not any(one.saturated for one in found)


@pytest.mark.parametrize("clusters", [2, 10])
def test_far_clusters(clusters):
    labels = torch.arange(1000) % clusters
    centres = 100 * torch.nn.functional.one_hot(labels, clusters).double()
    found = estimate_information(centres, 0.1, seed=0, labels=labels)
    for value in (found.sampled, found.lower, found.upper, found.label):
        assert value == pytest.approx(math.log(clusters), abs=1e-6)
    assert found.label_by_chance < 0.1


def test_a_constant_says_nothing():
    found = estimate_information(torch.full((50, 3), 7.0), 0.0, seed=0, labels=torch.arange(50) % 2)
    assert (found.sampled, found.lower, found.upper, found.label, found.saturated) == (0, 0, 0, 0, False)


def test_no_information_about_labels_that_have_nothing_to_do_with_it():
    labels = torch.randint(0, 4, (4000,), generator=torch.Generator().manual_seed(5))
    found = estimate_information(gaussian(4000, 2), 1.0, seed=0, labels=labels)
    assert abs(found.label) < 0.01 and abs(found.label - found.label_by_chance) < 0.01


def test_saturation_is_said():
    found = estimate_information(gaussian(2000, 20), 0.3, seed=0)
    assert found.saturated and found.sampled == pytest.approx(math.log(2000), rel=1e-2)
    assert found.sampled <= math.log(2000) + 1e-9 < found.leave_one_out


def test_an_injective_map_under_little_noise_tells_every_row():
    found = estimate_information(torch.arange(500.0)[:, None], 1e-4, seed=0)
    for value in (found.sampled, found.lower, found.upper):
        assert value == pytest.approx(math.log(500), abs=1e-9)
    assert found.saturated


def test_a_naive_double_loop():
    n, sigma = 12, 0.8
    features, labels = gaussian(n, 3, seed=3), torch.arange(n) % 3
    found = estimate_information(features, sigma, seed=4, labels=labels)
    from eectl.core.seeds import derive_seed

    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(derive_seed(4, "noise")), dtype=torch.float64)
    h, z = features.numpy(), (features + sigma * noise).numpy()
    sampled = alone = label = low = high = 0.0
    for i in range(n):
        k = [math.exp(-((z[i] - h[j]) ** 2).sum() / (2 * sigma**2)) for j in range(n)]
        sampled += math.log(k[i] / (sum(k) / n)) / n
        alone += math.log(k[i] / ((sum(k) - k[i]) / (n - 1))) / n
        own = [k[j] for j in range(n) if labels[j] == labels[i]]
        label += math.log((sum(own) / len(own)) / (sum(k) / n)) / n
        d = [((h[i] - h[j]) ** 2).sum() for j in range(n)]
        low -= math.log(sum(math.exp(-x / (8 * sigma**2)) for x in d) / n) / n
        high -= math.log(sum(math.exp(-x / (2 * sigma**2)) for x in d) / n) / n
    values = (found.sampled, found.leave_one_out, found.label, found.lower, found.upper)
    assert values == pytest.approx((sampled, alone, label, low, high), abs=1e-10)


def test_chunks_change_nothing(monkeypatch):
    from eectl.analyses import information

    features, labels = gaussian(100, 3), torch.arange(100) % 4
    whole = estimate_information(features, 0.5, seed=0, labels=labels)
    monkeypatch.setattr(information, "CHUNK", 7)
    assert np.allclose(
        list(vars(estimate_information(features, 0.5, seed=0, labels=labels)).values()), list(vars(whole).values())
    )


def test_the_projection_keeps_lengths_on_average_and_is_shared():
    readers = [InformationReader(4, "pooled", seed=0) for _ in range(2)]
    rows = gaussian(300, 64).float()
    for reader in readers:
        reader.take(0, rows, torch.zeros(300, dtype=torch.int64))
        reader.take(3, rows[:, :2], torch.zeros(300, dtype=torch.int64))
    assert torch.equal(readers[0].projected[0][0], readers[1].projected[0][0])
    matrix = torch.linalg.lstsq(rows, readers[0].projected[0][0]).solution
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(4), rtol=1e-3, atol=1e-3)
    assert torch.equal(readers[0].projected[3][0], rows[:, :2])
    assert len(readers[0].targets) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for regime in ("joint", "mixed"):
        train(small_recipe(f"regime={regime}", "epochs=1"), out=folder / regime, device="cpu", quiet=True)
    return [folder / regime / "model.safetensors" for regime in ("joint", "mixed")]


def ask(paths, out, **settings):
    report = analyze("mutual-information", paths, out=out, device="cpu", **settings)
    return report, json.loads((out / "mutual-information.json").read_text())["values"]


def test_two_networks(runs, tmp_path):
    report, values = ask(runs, tmp_path, noise=0.5, dimensions=4)
    for one in values["networks"]:
        assert one["rows"] == 359 and one["most"] == pytest.approx(math.log(359))
        for block in one["blocks"]:
            assert 0 < block["lower"] < block["sampled"] < block["upper"] and block["dimensions"] == 4
            assert block["label"] <= one["most_label"] + 1e-9 <= math.log(10) + 1e-6
    assert values["networks"][0]["blocks"] != values["networks"][1]["blocks"]
    assert len(report.answer.records) == 18 and "labels" in report.answer.records[0]
    assert "nats about the input" in report.answer.reading[0]
    tight, _ = ask(runs[:1], tmp_path / "tight", noise=1e-4)
    assert any("next to log n = 5.88" in note for note in tight.answer.notes)
    assert "*" in str(tight.answer.tables[0].rows)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 2}, "--samples 2: at least 3"),
        ({"dimensions": 0}, "--dimensions 0: at least 1"),
        ({"noise": 0.0}, "--noise 0: a share of the activations' variance above 0"),
        ({"noise": math.inf}, "--noise inf"),
    ],
)
def test_refused_in_one_line(runs, tmp_path, settings, words):
    with pytest.raises(EectlError, match=words):
        ask(runs[:1], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
