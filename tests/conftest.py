"""What all tests share: few threads (two workers on two cores), and a small recipe that trains in a second."""

import os

import pytest
import torch

from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import Recipe

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)

THOROUGH = "EECTL_THOROUGH"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thorough`: also the networks beyond the six that stand for all (tests/small_networks.py), guides, slow tests."""
    text = f"run every test, on all small networks and not six that stand for all, and the guides; so does {THOROUGH}=1"
    parser.addoption("--thorough", action="store_true", default=os.environ.get(THOROUGH) == "1", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With several workers (`-n 2`) let one run all tests of a file: the networks that a file trains are then trained once."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked thorough out, counted as deselected, unless all are wanted."""
    if config.getoption("--thorough"):
        return
    further = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=further)
    items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def small_recipe(*changes: str, **sections: object) -> Recipe:
    """A ResNet-20 on a tenth of the digits, exits after blocks 1 and 4, a few steps per epoch."""
    base = {
        "data": {"limit": 150, "augment": {"crop": 1}},
        "exits": {"after": [1, 4]},
        "regime": "joint",
        "epochs": 2,
        "patience": 2,
        "batch_size": 32,
    }
    return make_recipe(base | sections, where="test", changes=changes)


@pytest.fixture
def small():
    return small_recipe
