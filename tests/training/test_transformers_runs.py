"""Networks of transformers, of texts and of images, in runs that stop in the middle of an epoch and in runs of two processes."""

import os
import signal

import pytest
import torch
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.errors import Interrupted
from eectl.core.progress import Display
from eectl.recipe.reading import make_recipe
from eectl.training.run_folder import RunFolder
from eectl.training.train import train
from tests.training.test_train import rows, same, torchrun, weights

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 20, "intermediate_size": 24, "max_position_embeddings": 24, "pad_token_id": 0} | LAYERS
NETWORKS = {
    "modernbert": TEXT,
    "llama": TEXT | {"num_key_value_heads": 2},
    "dinov2": {"patch_size": 4, "mlp_ratio": 2} | LAYERS,
    "convnext": {"patch_size": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
}
RANDOM = {  # what draws numbers in a step, which a run that goes on must draw again
    "modernbert": {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1},
    "llama": {"attention_dropout": 0.2},
    "dinov2": {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.3},
    "convnext": {"drop_path_rate": 0.3},
}
NAMES = [pytest.param(name, marks=pytest.mark.thorough if name in ("llama", "convnext") else []) for name in NETWORKS]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """What the section data says of short texts in a folder."""
    folder = tmp_path_factory.mktemp("texts")
    for number, (name, count) in enumerate((("train", 150), ("test", 30))):
        write_csv(folder / f"{name}.csv", make_rows(count, seed=number))
    more = {"target": "mood", "task": "classification", "tokenizer": write_tokenizer(folder / "tokenizer"), "max_length": 24}
    return {"name": "text", "root": str(folder)} | more


@pytest.fixture
def recipe_of(texts):
    def make(name, *changes, **args):
        data = texts if name in ("modernbert", "llama") else {"limit": 150, "augment": {}}
        base = {"data": data, "backbone": {"name": f"hf/{name}", "args": NETWORKS[name] | args}, "exits": {"after": [0]}}
        base |= {"regime": "mixed", "epochs": 1, "batch_size": 31, "channels_last": False, "optimizer": {"lr": 0.01}}
        return make_recipe(base, where="test", changes=changes)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_in_an_epoch_goes_on_to_the_same_bits(name, recipe_of, tmp_path):
    """In the second phase, in which the backbone trains with its exits."""
    recipe, steps = recipe_of(name, **RANDOM[name]), []
    train(recipe, out=tmp_path / "whole", device="cpu", quiet=True)

    def stop(_display):
        steps.append(1)
        if len(steps) == per_epoch + 2:
            os.kill(os.getpid(), signal.SIGINT)

    per_epoch = rows(tmp_path / "whole")[0]["step"]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Display, "step", stop)
        train(recipe, out=tmp_path / "cut", device="cpu", quiet=True)
    state = RunFolder(tmp_path / "cut").load_state()
    assert (state.run.done, state.phase.epoch, state.phase.batch) == (1, 0, 2) and per_epoch > 2
    train(recipe, out=tmp_path / "cut", device="cpu", quiet=True, resume=True)
    assert same(*(weights(tmp_path / run / "model.safetensors") for run in ("whole", "cut")))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["modernbert", "dinov2"])
def test_two_processes_train_as_one_does(name, recipe_of, tmp_path):
    """The same steps but for rounding; 31 rows a batch do not divide by two."""
    train(recipe_of(name, "optimizer.name=sgd", "optimizer.lr=0.05"), out=tmp_path / "one", device="cpu", quiet=True)
    done = torchrun("train", tmp_path / "one" / "recipe.yaml", "--device", "cpu", "-q", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-4)
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        assert other["validation_score"] == pytest.approx(row["validation_score"])
