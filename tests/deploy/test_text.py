"""Texts and pairs: predict reads them as training and evaluate do, and says what is wrong with the others."""

import shutil

import pytest
from deploy.made_models import check_same, expected, made
from toy_text import TOY, make_rows, write_csv, write_tokenizer

import eectl
from eectl.core.errors import EectlError
from eectl.models import build as models
from eectl.recipe.reading import make_recipe


@pytest.fixture(scope="module", autouse=True)
def toy():
    models.BACKBONES[TOY.name] = TOY.build
    yield
    del models.BACKBONES[TOY.name]


ROWS = {"train": make_rows(200, seed=1), "test": make_rows(50, seed=2)}
for _rows in ROWS.values():
    for _row in _rows:
        _row["second"] = _row["text"].split()[0] + " film"


def recipe_for(folder, columns, target, task):
    tokenizer = write_tokenizer(folder / "tokenizer")
    (folder / "data").mkdir()
    for name, rows in ROWS.items():
        write_csv(folder / "data" / f"{name}.csv", rows)
    data = {"name": "text", "root": str(folder / "data"), "text": columns, "target": target, "task": task, "max_length": 14}
    return make_recipe(
        {
            "data": {**data, "tokenizer": tokenizer}, "backbone": {"name": TOY.name}, "exits": {"after": [0, 1, 2]},
            "regime": "joint", "epochs": 2, "batch_size": 16, "eval_batch_size": 17, "optimizer": {"lr": 0.02},
        },
        where="test",
    )  # fmt: skip


KINDS = {
    "moods": (["text"], "mood", "classification"),
    "scores": (["text"], "score", "regression"),
    "pairs": (["text", "second"], "mood", "classification"),
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    columns, target, task = KINDS[request.param]
    found = made(recipe_for(folder, columns, target, task), folder / "run")
    found.texts = [tuple(row[column] for column in columns) for row in ROWS["test"]]
    found.given = [texts[0] if len(texts) == 1 else texts for texts in found.texts]
    found.kind = request.param
    return found


def test_predict_agrees_with_evaluate_row_by_row(run):
    rows = expected(run, 100.0)
    model = eectl.load(run.checkpoint, policy=run.policy, budget=100, device="cpu")
    answers = model.predict(run.given)
    check_same(answers, rows, model.classes)
    assert model.predict(run.given, batch_size=3).exits == answers.exits
    assert bool(model.classes) == (run.kind != "scores")
    alone = model.predict(run.given[0])
    assert len(alone) == 1 and alone[0].exit == answers[0].exit
    prepared = model.preprocess(run.given)
    assert [int(mask.sum()) for mask in prepared[:, 1]] == rows.split.lengths.tolist()


def test_what_is_no_text_is_named(run):
    model = eectl.load(run.checkpoint, policy=run.policy, budget=100, device="cpu")
    last = ("a", "pairs") if run.kind == "pairs" else ("  ", "empty")
    for wrong, word in [(7, "int"), (b"x", "bytes"), (("a", "b", "c"), "3 text"), last]:
        with pytest.raises(EectlError, match=word) as caught:
            model.predict([run.given[0], wrong])
        assert "inputs[1]" in str(caught.value)
    with pytest.raises(EectlError, match="token ids"):
        model(model.preprocess(run.given[:2]).float())


def test_a_tokenizer_that_is_gone_and_one_that_stands_in(run, tmp_path):
    folder = run.folder.parent / "tokenizer"
    moved = tmp_path / "moved"
    before = eectl.load(run.checkpoint, device="cpu").predict(run.given[:9])
    shutil.move(folder, moved)
    try:
        with pytest.raises(EectlError, match="no such folder") as caught:
            eectl.load(run.checkpoint, device="cpu")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert eectl.load(run.checkpoint, device="cpu", tokenizer=moved).predict(run.given[:9]) == before
        larger = write_tokenizer(tmp_path / "larger", extra=3)
        with pytest.raises(EectlError, match="token ids up to 20"):
            text = "more2" if run.kind != "pairs" else ("more2", "good")
            eectl.load(run.checkpoint, device="cpu", tokenizer=larger).predict([text])
    finally:
        shutil.move(moved, folder)
