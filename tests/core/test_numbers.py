"""Numbers as users write them: which texts and values are numbers, against a table, and lists of them."""

import math
from functools import partial

import numpy as np
import pytest

from eectl.core.errors import EectlError
from eectl.core.numbers import decimal_number, number_list, whole_number
from eectl.core.seeds import check_seed

WHOLE = {"0": 0, "-0": 0, "12": 12, "+4": 4, "-3": -3, 7: 7, np.int64(9): 9, "9" * 300: int("9" * 300)}
DECIMAL = {
    **{"1.5": 1.5, ".5": 0.5, "5.": 5.0, "1e-4": 1e-4, "-2E+3": -2000.0, "1e999": math.inf},
    **{2.5: 2.5, np.float32(0.25): 0.25, 10**400: math.inf},
}
NEITHER = [
    *(
        "",
        " ",
        " 1",
        "1 ",
        "01",
        "1_0",
        "１２",
        "٣",
        "0x10",
        "0o7",
        "nan",
        "inf",
        "-inf",
        "1e",
        ".",
        "--1",
        "²",
        "1,5",
        "9" * 5000,
    ),
    *(True, False, None, [1], b"1", 1j),
]


def test_whole_numbers():
    assert {each: whole_number(each) for each in WHOLE} == WHOLE
    assert all(whole_number(each) is None for each in [*NEITHER, *(set(DECIMAL) - {10**400})])
    assert [whole_number(each, least=1, most=9) for each in ("0", "1", "9", "10")] == [None, 1, 9, None]


def test_decimal_numbers():
    assert {each: decimal_number(each) for each in DECIMAL} == DECIMAL
    assert {each: decimal_number(each) for each in WHOLE} == {each: float(value) for each, value in WHOLE.items()}
    assert all(decimal_number(each) is None for each in NEITHER)


@pytest.mark.parametrize("given", ["3,1", "3, 1", [3, 1], (3, "1"), np.array([3, 1])])
def test_lists_in_any_form(given):
    assert number_list(given, whole_number, option="--x", what="block", allowed="numbers") == (3, 1)
    assert number_list(5, whole_number, option="--x", what="block", allowed="numbers") == (5,)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "--x : '' is not a block; give numbers from 1"),
        ([], "'' is not a block"),
        ("1,,2", "'' is not a block"),
        ("1,1", "--x 1,1: 1 stands twice; give each block once"),
        ("1_0", "'1_0' is not a block"),
        ("１", "'１' is not a block"),
        ([True], "'True' is not a block"),
        ([None], "'None' is not a block"),
        (math.nan, "'nan' is not a block"),
        ("1\x1b[31m", "'1\\x1b[31m' is not a block"),
        ("1" * 100_000, "…' is not a block"),
    ],
)
def test_lists_that_are_none(given, words):
    with pytest.raises(EectlError) as caught:
        number_list(given, partial(whole_number, least=1), option="--x", what="block", allowed="numbers from 1")
    assert words in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "3", True, None])
def test_seeds(seed):
    assert check_seed(2**32 - 1) == 2**32 - 1
    with pytest.raises(EectlError, match="give a whole number from 0 to 4294967295"):
        check_seed(seed)
