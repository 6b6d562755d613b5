"""Numerical rank: planted ranks, numpy's own covariance, and the question from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from eectl.analyses import rank as module
from eectl.analyses.analyze import analyze
from eectl.analyses.rank import Covariance, summarize_spectrum
from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.models.checkpoint import load_checkpoint
from eectl.training.train import train
from tests.conftest import small_recipe


def spectrum(rows, size=100):
    covariance = Covariance(*rows.shape)
    for part in rows.split(size):
        covariance.add(part)
    return covariance.eigenvalues()


@pytest.mark.parametrize(("n", "m"), [(1000, 200), (200, 1000), (300, 300)], ids=["n>m", "n<m", "n=m"])
def test_a_planted_rank_under_noise(n, m):
    generator = torch.Generator().manual_seed(1)
    planted = torch.randn(n, 20, generator=generator) @ torch.randn(20, m, generator=generator)
    noisy = planted + 0.01 * torch.randn(n, m, generator=generator) + 50
    found = summarize_spectrum(spectrum(noisy), 1e-3)
    assert found.rank == 20
    assert 15 < found.effective < 26
    everything = summarize_spectrum(spectrum(noisy), 1e-12).rank
    assert everything == min(n - 1, m)  # noise fills all that there is: the tolerance is what finds the 20


@pytest.mark.parametrize(("n", "m"), [(157, 40), (40, 157)], ids=["n>m", "n<m"])
def test_the_streamed_spectrum_is_numpys(n, m):
    rows = torch.randn(n, m, generator=torch.Generator().manual_seed(2)) * torch.linspace(1, 3, m) + 1e7
    rows = rows.double()  # far from 0, where sums of squares about 0 lose all digits
    own = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False))[::-1][: min(n, m)]
    np.testing.assert_allclose(spectrum(rows, size=13).numpy(), own.clip(0), rtol=1e-6, atol=1e-6 * own[0])


def test_effective_rank_in_closed_form():
    assert summarize_spectrum(torch.tensor([4.0, 4.0, 4.0, 0.0]).double(), 1e-3).effective == pytest.approx(3)
    shares = np.array([2, 1]) / 3  # of the singular values, the roots of 4 and 1
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert summarize_spectrum(torch.tensor([4.0, 1.0]).double(), 0.5).effective == pytest.approx(expected)
    assert summarize_spectrum(torch.tensor([4.0, 1.0]).double(), 0.5).rank == 1
    assert summarize_spectrum(spectrum(torch.ones(10, 4)), 1e-3) == module.Rank(0, 0.0, 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for regime in ("joint", "mixed"):
        train(small_recipe(f"regime={regime}", "epochs=1"), out=folder / regime, device="cpu", quiet=True)
    return [folder / regime / "model.safetensors" for regime in ("joint", "mixed")]


def answer(paths, out, **settings):
    analyze("numerical-rank", paths, out=out, device="cpu", **settings)
    return json.loads((out / "numerical-rank.json").read_text())["values"]


def by_numpy(path, block, tolerance):
    """A block's rank from all of the test split at once."""
    checkpoint = load_checkpoint(path)
    data = load_data(checkpoint.about.data_spec, device=torch.device("cpu"))
    rows = data.splits["test"]
    images = (rows.rows(torch.arange(len(rows))) / 255 - data.info.mean[0]) / data.info.std[0]
    with torch.no_grad():
        hidden = checkpoint.model.backbone.stem(images)
        for index in range(block + 1):
            hidden = checkpoint.model.backbone.block(index, hidden)
    values = np.linalg.svd(hidden.x.flatten(1).double().numpy() - hidden.x.flatten(1).double().mean(0).numpy())[1] ** 2
    return int((values > tolerance * values[0]).sum())


@pytest.mark.parametrize("memory", [module.MEMORY, 1], ids=["one pass", "a pass per block"])
def test_two_networks_by_numpy(runs, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(module, "MEMORY", memory)
    found = answer(runs, tmp_path, tolerance=1e-2)
    for path, one in zip(runs, found["networks"], strict=True):
        assert (one["rows"], one["view"], one["after"], len(one["blocks"])) == (359, "flattened", [1, 4], 9)
        for block in (0, 4, 8):
            assert one["blocks"][block]["rank"] == by_numpy(path, block, 1e-2)
        assert [block["of_features"] for block in one["blocks"]] == [1024] * 3 + [512] * 3 + [256] * 3


def test_a_feature_subset_is_the_same_for_every_network(runs, tmp_path):
    copy = shutil.copy(runs[0], tmp_path / "copy.safetensors")
    found = answer([runs[0], Path(copy)], tmp_path / "twice", features=50)["networks"]
    assert found[0]["blocks"] == found[1]["blocks"]
    assert {block["features"] for block in found[0]["blocks"]} == {50}
    assert all(block["rank"] <= 50 for block in found[0]["blocks"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 1}, "--samples 1: at least 2; a covariance needs two rows"),
        ({"samples": 20}, "--samples 20: joint has a rank of 19 in 20 rows, the most that they can show; take more"),
        ({"tolerance": 0.0}, "--tolerance 0: a share of the largest eigenvalue"),
        ({"features": 1}, "--features 1: at least 2"),
        ({"view": "class-token"}, "resnet20 has no class token"),
        ({"split": "tset"}, "there is no tset split|unknown split 'tset'"),
    ],
)
def test_refused_in_one_line(runs, tmp_path, settings, words):
    with pytest.raises(EectlError, match=words) as refusal:
        answer(runs[:1], tmp_path / "out", **settings)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
