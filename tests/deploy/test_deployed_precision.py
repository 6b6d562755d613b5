"""The precision in which predict computes: the checkpoint's, as evaluate does; `model(x)` leaves it to the caller."""

import json

import pytest
import torch
from conftest import small_recipe
from deploy.made_models import made, run_cli

import eectl
from eectl.core import precision
from eectl.core.distributed import World
from eectl.core.errors import EectlError
from eectl.evaluation.opened import open_session, score_split
from eectl.exits.policy import Policy, choose, read_policies

SIZE = 50


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """A network trained in bf16 and its policy, and the test images."""
    run = made(small_recipe("precision=bf16"), tmp_path_factory.mktemp("low") / "run")
    session = open_session(run.checkpoint, world=World(0, 1, torch.device("cpu")), precision="bf16", needs=("test",))
    run.session, run.split = session, session.data.splits["test"]
    run.images = list(run.split.rows(torch.arange(len(run.split)))[:, 0].numpy().astype("uint8"))
    return run


def test_predict_leaves_where_evaluate_says(low):
    policies = read_policies(low.policy)
    assert policies.precision == "bf16"
    found = score_split(low.session, "test", criterion=policies.criterion, batch_size=SIZE)
    rule = Policy(policies.criterion, next(each.thresholds for each in policies.budgets if each.budget == 60.0))
    near = (found.scores[:-1] - torch.tensor(rule.thresholds)[:, None]).abs().amin(0) < 1e-3  # smaller batches round otherwise
    expected = (choose(found.scores, rule.thresholds) + 1).tolist()
    model = eectl.load(low.checkpoint, policy=low.policy, budget=60, device="cpu")
    assert model.precision == "bf16" and model.notes == ()
    answers = model.predict(low.images, batch_size=SIZE)
    assert len(set(answers.exits)) > 1 and sum(near.tolist()) < 0.2 * len(near)
    assert all(one == other or close for one, other, close in zip(answers.exits, expected, near.tolist(), strict=True))


def test_the_plain_network_answers_in_it_too(low):
    model = eectl.load(low.checkpoint, device="cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model.network.backbone(model.preprocess(low.images[:SIZE])).float().softmax(dim=1).amax(dim=1)
    assert model.predict(low.images[:SIZE]).probabilities == expected.tolist()
    full = eectl.load(low.checkpoint, device="cpu", precision="float32")
    assert full.predict(low.images[:SIZE]).probabilities != expected.tolist()


def test_a_call_computes_as_the_caller_says(low):
    model = eectl.load(low.checkpoint, device="cpu")
    prepared = model.preprocess(low.images[:4])
    assert all(logits.dtype == torch.float32 for logits in model(prepared))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(prepared)[-1].dtype == torch.bfloat16


def test_another_precision_is_noted_and_recorded(low, tmp_path, capsys):
    model = eectl.load(low.checkpoint, policy=low.policy, budget=60, device="cpu", precision="float32")
    assert model.precision == "float32" and len(model.notes) == 2
    assert "model.safetensors was trained in bf16, and this computes in float32" in model.notes[0]
    assert "the policy was made in bf16, and this computes in float32" in model.notes[1]
    from PIL import Image

    Image.fromarray(low.images[0]).save(tmp_path / "a.png")
    line = ["predict", low.checkpoint, tmp_path / "a.png", "--device", "cpu", "--json"]
    assert run_cli(*line) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["precision"] == "bf16" and "note" not in err
    assert run_cli(*line, "--precision", "float32") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["precision"] == "float32" and "note: " in err and "was trained in bf16" in err


def test_what_is_not_there(low, monkeypatch):
    with pytest.raises(EectlError, match=r"unknown precision 'half'; known: auto, float32, tf32, bf16"):
        eectl.load(low.checkpoint, device="cpu", precision="half")
    monkeypatch.setattr(precision, "_has_bf16", lambda _: False)
    with pytest.raises(EectlError, match="precision bf16: cpu does not have it, only float32; try --precision float32"):
        eectl.load(low.checkpoint, device="cpu")
