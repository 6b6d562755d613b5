"""Budgets as users write them, on the command line and in Python."""

import math

import numpy as np
import pytest

from eectl.core.errors import EectlError
from eectl.recipe.budgets import parse_budgets


@pytest.mark.parametrize(
    ("given", "budgets"),
    [
        ("75, 25,50.5", (25, 50.5, 75)),
        ("1e2", (100,)),
        ("1000", (1000,)),
        (50, (50,)),
        ([0.1 + 0.2], (0.3,)),
        (np.array([30.0, 20.0]), (20, 30)),
        (["5", 4], (4, 5)),
    ],
)
def test_budgets(given, budgets):
    assert parse_budgets(given) == budgets


@pytest.mark.parametrize(
    "given",
    [
        *(
            "",
            ",",
            "25,",
            "1_0",
            "２５",
            "٢٥",
            "nan",
            "inf",
            "-inf",
            "-5",
            "0",
            "1e300",
            "1" + "0" * 300,
            "1001",
            "0x10",
            "025",
            "25 50",
            "a",
        ),
        *([], [True], [None], [[25]], [math.nan], [math.inf], [-5], 10**400, True, [b"25"]),
        *("25,25", "25,25.0", [25, 25.0]),
    ],
)
def test_budgets_that_are_none(given):
    with pytest.raises(EectlError, match=r"^--budgets .*(is not a budget; give percentages|stands twice)") as caught:
        parse_budgets(given)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
