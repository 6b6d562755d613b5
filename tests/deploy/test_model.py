"""`eectl.load` and Model: what evaluate says of a row is what predict says of it, however the row is handed over."""

import doctest
import json

import numpy as np
import pytest
import torch
from deploy.made_models import check_same, copy_with_budget_50
from PIL import Image

import eectl
from eectl.core.errors import EectlError
from eectl.deploy import answers as answers_module
from eectl.deploy import model as model_module
from eectl.deploy.answers import AnswerList, RowAnswer
from eectl.exits.policy import read_policies, write_policies
from eectl.models.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def model(digits):
    return eectl.load(digits.checkpoint, policy=digits.policy, budget=60, device="cpu")


def test_predict_agrees_with_evaluate_row_by_row(model, digit_rows):
    answers = model.predict(list(digit_rows.pixels), batch_size=50)
    assert len(answers) == 359 and len(set(answers.exits)) == 3  # rows leave at every exit, or this says little
    check_same(answers, digit_rows, model.classes)
    assert answers.costs == pytest.approx([digit_rows.costs[number - 1] for number in answers.exits])
    hits = np.mean([int(label) == int(target) for label, target in zip(answers.labels, digit_rows.split.labels, strict=True)])
    chosen = torch.tensor(digit_rows.exits) - 1
    assert hits == pytest.approx(float(digit_rows.found.outcome.gather(0, chosen[None]).mean()), abs=1 / 359)


def test_without_a_policy_the_plain_network_answers(digits, digit_rows):
    plain = eectl.load(digits.checkpoint, device="cpu")
    answers = plain.predict(list(digit_rows.pixels[:40]))
    assert plain.policy is None and plain.budget is None
    assert set(answers.exits) == {3} and set(answers.costs) == {1.0}
    assert answers.labels == [str(int(row.argmax())) for row in digit_rows.logits[:40, -1]]


def test_a_row_is_the_same_in_every_form(model, digit_rows, tmp_path):
    pixels = digit_rows.pixels[7]
    Image.fromarray(pixels).save(tmp_path / "seven.png")
    forms = [
        tmp_path / "seven.png",
        str(tmp_path / "seven.png"),
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGB"),
        pixels,
        pixels[:, :, None],
        np.repeat(pixels[:, :, None], 3, 2),
        torch.from_numpy(pixels)[None],
        torch.from_numpy(pixels),
    ]
    answers = model.predict(forms)
    alone = model.predict(pixels)
    assert len(alone) == 1 and answers.labels == alone.labels * len(forms)
    assert answers.probabilities == pytest.approx(alone.probabilities * len(forms))
    prepared = model.preprocess(forms)
    assert torch.equal(prepared, digit_rows.parts[7].expand(len(forms), -1, -1, -1))
    batch = torch.from_numpy(digit_rows.pixels[:5])[:, None]
    assert model.predict(batch).labels == model.predict(list(digit_rows.pixels[:5])).labels


def test_an_iterator_is_taken_a_batch_at_a_time(digits, digit_rows, monkeypatch):
    model = eectl.load(digits.checkpoint, policy=digits.policy, budget=60, device="cpu")
    asked, answered = [], []

    def images():
        for row in range(20):
            asked.append(row)
            yield digit_rows.pixels[row]

    def answering(values, **options):
        answered.append((len(values), len(asked)))
        return real(values, **options)

    real = model.answer
    monkeypatch.setattr(model, "answer", answering)
    assert model.predict(images(), batch_size=8).labels == model.predict(list(digit_rows.pixels[:20])).labels
    assert answered[:3] == [(8, 8), (8, 16), (4, 20)]


def test_what_a_model_says_of_itself(model, digit_rows):
    assert model.classes == tuple("0123456789") and model.task == "classification"
    assert model.exits == (1, 4, 8)
    assert model.costs == pytest.approx(digit_rows.costs)
    assert model.budget == 60 and "max-softmax" in str(model.policy.criterion)


def test_answers_as_lists_and_json(model, digit_rows):
    answers = model.predict(list(digit_rows.pixels[:4]), top=3)
    said = answers.to_json()
    assert json.loads(json.dumps(said)) == said and (said["kind"], said["schema"], len(said["rows"])) == ("answers", 1, 4)
    first = said["rows"][0]
    assert first["top"][0]["label"] == first["label"] == answers[0].label == answers.labels[0]
    assert len(answers[0].top) == 3 and len(answers[1:3]) == 2 and [each.exit for each in answers] == answers.exits
    with pytest.raises(EectlError, match=r"answers\.values.*answers\.labels"):
        _ = answers.values
    numbers = AnswerList((RowAnswer(2, 0.5, value=1.5),))
    assert numbers.values == [1.5] and numbers.to_json()["rows"] == [{"value": 1.5, "exit": 2, "cost": 0.5}]
    with pytest.raises(EectlError, match=r"answers\.labels.*answers\.values"):
        _ = numbers.labels


def test_all_exits_of_prepared_inputs(model, digits, digit_rows):
    inputs = model.preprocess(list(digit_rows.pixels[:6]))
    outputs = model(inputs)
    assert type(outputs) is list and [type(each) for each in outputs] == [torch.Tensor] * 3
    own = load_checkpoint(digits.checkpoint).model
    with torch.no_grad():
        assert all(torch.allclose(a, b.logits, atol=1e-5) for a, b in zip(outputs, own(inputs), strict=True))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 8, 8), "3, 8, 8"),
        (torch.zeros(1, 8, 8), "1, 8, 8"),
        (np.zeros((2, 1, 8, 8), dtype=np.float32), "ndarray"),
    ],
)
def test_what_is_not_prepared_is_refused(model, wrong, word):
    with pytest.raises(EectlError, match=word) as caught:
        model(wrong)
    assert "model.predict" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (np.zeros((8, 8), dtype=np.float32), "float32"),
        (torch.zeros(1, 8, 8), "float32"),
        (np.zeros((8, 8), dtype=np.int64), "int64"),
        (np.zeros((8, 8, 2), dtype=np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((0, 8), dtype=np.uint8), r"\(0, 8\)"),
        (np.zeros((40, 8, 8), dtype=np.uint8), r"\(40, 8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\)"),
        (7, "int"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_inputs_that_will_not_do_are_named(model, wrong, word):
    good = np.zeros((8, 8), dtype=np.uint8)
    with pytest.raises(EectlError, match=word) as caught:
        model.predict([good, wrong])
    assert "inputs[1]" in str(caught.value) or "nowhere.png" in str(caught.value)


def test_an_image_of_another_shape_is_cut_to_its_centre_and_resized(model):
    tall = np.zeros((60, 20), dtype=np.uint8)
    tall[20:40] = 255  # the centre square is white
    square = model.preprocess([tall, np.full((8, 8), 255, dtype=np.uint8), np.full((400, 400), 255, dtype=np.uint8)])
    assert torch.equal(square[0], square[1]) and torch.equal(square[2], square[1])


def test_requests_that_cannot_be_met(digits, model, tmp_path):
    refused = [
        ({"policy": digits.policy}, "1, 40, 60, 100"),
        ({"budget": 60}, "needs a policy"),
        ({"policy": digits.policy, "budget": 55}, "1, 40, 60, 100"),
        ({"policy": digits.policy, "budget": 1}, "out of reach.*40, 60, 100"),
        ({"policy": tmp_path / "none.json"}, "none.json"),
        ({"device": "tpu"}, "tpu"),
        ({"tokenizer": "x"}, "images"),
    ]
    for options, words in refused:
        with pytest.raises(EectlError, match=words):
            eectl.load(digits.checkpoint, **options)
    policies = read_policies(digits.policy)
    write_policies(tmp_path / "one.json", policies.only([40.0]))
    assert eectl.load(digits.checkpoint, policy=tmp_path / "one.json").budget == 40
    from dataclasses import replace

    write_policies(tmp_path / "other.json", replace(policies, checkpoint="0" * 64))
    with pytest.raises(EectlError, match="another checkpoint"):
        eectl.load(digits.checkpoint, policy=tmp_path / "other.json", budget=60)
    for options, words in [({"top": 0}, "1 to 10"), ({"top": 11}, "1 to 10"), ({"batch_size": 0}, "batch_size")]:
        with pytest.raises(EectlError, match=words):
            model.predict([np.zeros((8, 8), dtype=np.uint8)], **options)


def test_training_mode_is_refused(digits):
    model = eectl.load(digits.checkpoint, device="cpu")
    model.train()
    with pytest.raises(EectlError, match=r"model\.eval\(\)"):
        model.predict([np.zeros((8, 8), dtype=np.uint8)])


def test_no_input_gives_no_answer(model):
    assert model.predict([]).labels == []
    with pytest.raises(EectlError, match="no images"):
        model.preprocess([])


def test_examples_in_docstrings_run(digits, tmp_path, monkeypatch):
    copy_with_budget_50(digits.folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    for module in (model_module, answers_module):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed
