"""What all tests share: few threads (two workers on two cores), and a small recipe that trains in a second."""

import os

import pytest
import torch

from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import Recipe

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)


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
