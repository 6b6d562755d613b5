"""A small trained network of the digits with a policy, and what evaluate sees of its test split."""

import numpy as np
import pytest
import torch
from conftest import small_recipe
from deploy.made_models import expected, made


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return made(small_recipe(), tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture(scope="session")
def digit_rows(digits):
    """The test split at a budget of 60 %, and its uint8 `pixels` [row, 8, 8]."""
    found = expected(digits, 60.0)
    pixels = torch.cat([found.split.rows(torch.tensor([row])) for row in range(len(found.split))])
    found.pixels = pixels[:, 0].numpy().astype(np.uint8)
    return found
