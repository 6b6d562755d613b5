"""What a command imports: nothing heavy where it computes nothing, and no library that its network does not come from."""

import json
import subprocess
import sys

import pytest
from running import environment

from eectl.models.build import build_model
from eectl.models.checkpoint import About, save_checkpoint
from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import ModelSpec

pytestmark = pytest.mark.process

HEAVY = {"torch", "torchvision", "timm", "transformers", "datasets", "fvcore", "sklearn", "scipy", "matplotlib"}
RUN = """import sys, atexit, json
heavy = json.loads(sys.argv.pop(1))
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr))
from eectl.cli.app import main
main()"""
COUNTING = {"torch", "fvcore"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = ModelSpec.model_validate({"backbone": {"name": "resnet20"}, "input_shape": (1, 8, 8), "num_outputs": 10})
    trained = {"phase": 1, "title": "t", "regime": "joint", "exits": [1], "heads": [1], "seed": 0}
    trained |= {"restored_epoch": 1, "epochs": 1, "stopped_by": "epochs", "validation": {"score": [0.5], "loss": [1.0]}}
    recipe = make_recipe({}, where="test").model_dump(mode="json")
    path = tmp_path_factory.mktemp("made") / "model.safetensors"
    data = {"name": "digits", "task": "classification", "classes": [*map(str, range(10))], "input_shape": [1, 8, 8]}
    data |= {"mean": [0.5], "std": [0.25]}
    save_checkpoint(path, build_model(spec), About(spec, recipe, data, {}, [trained]))
    return path


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("--help", set()),
        ("recipes", set()),
        ("info CKPT", set()),
        ("info CKPT --json", set()),
        ("flops digits", COUNTING),
        ("flops CKPT --json", COUNTING),
        ("flops fashion-mnist-vit-t", COUNTING | {"torchvision"}),
    ],
)
def test_a_command_imports_no_more_than_it_needs(line, allowed, checkpoint):
    words = line.replace("CKPT", str(checkpoint)).split()
    found, out = imported(words, {})
    assert out and found == allowed


def test_completion_imports_nothing_heavy():
    found, out = imported([], {"_EECTL_COMPLETE": "complete_bash", "COMP_WORDS": "eectl train dig", "COMP_CWORD": "2"})
    assert "digits" in out and not found


def imported(words, variables):
    """The heavy modules that a run of the program ends with, and what it wrote on stdout."""
    line = [sys.executable, "-c", RUN, json.dumps(sorted(HEAVY)), *words]
    done = subprocess.run(line, env=environment(**variables), capture_output=True, text=True)
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout
