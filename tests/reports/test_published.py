"""The shipped numbers of the paper, against some that were typed by hand from its text."""

import pytest

from eectl.core.errors import EectlError
from eectl.reports.published import find_published, published_tables

TYPED = [  # table, variant, regime, budget, mean, std; MSE for table 14, else %
    ("1", "", "disjoint", 100, 78.38, None), ("6", "2L-1024", "mixed", 25, 44.92, None), ("6", "1L", "mixed", 75, 60.42, None),
    ("7", "dense-sparse", "mixed", 25, 53.48, None), ("7", "every-3", "joint", 50, 63.33, None),
    ("8", "", "joint", 100, 74.17, 0.10), ("8", "", "mixed-gradual", 75, 76.08, 0.54), ("9", "", "branch-wise", 25, 58.24, 0.45),
    ("10", "", "mixed", None, 70.25, 0.56), ("11", "", "disjoint", 35, 38.49, 0.46), ("12", "", "joint", 50, 61.89, 0.71),
    ("13", "", "separate", None, 79.78, 0.30), ("14", "", "separate", 25, 2.69, 0.14), ("14", "", "mixed", 100, 0.51, 0.00),
    ("18", "", "disjoint", 75, 87.49, 0.40), ("19", "", "joint", 25, 52.98, 0.77), ("20", "1L", "disjoint", 25, 75.61, 0.10),
]  # fmt: skip


@pytest.mark.parametrize(("number", "variant", "regime", "budget", "mean", "std"), TYPED)
def test_numbers_typed_from_the_text(number, variant, regime, budget, mean, std):
    cell = published_tables()[number].cells[variant, regime, budget]
    scale = 1 if number == "14" else 100
    assert cell.mean * scale == pytest.approx(mean)
    assert cell.std is None if std is None else cell.std * scale == pytest.approx(std)


def test_what_there_is():
    tables = published_tables()
    assert list(tables) == ["1", *map(str, range(6, 21))]
    assert sum(len(table.cells) for table in tables.values()) == 492 - 9  # nine are printed as out of reach
    assert ("every-3", "joint", 25) not in tables["7"].cells
    assert {number for number, table in tables.items() if table.task == "regression"} == {"14"}
    assert set(tables["19"].variants) == {"", "GE", "Inc.", "Dec.", "SDN"}
    assert tables["20"].regimes == ["disjoint", "joint", "mixed"]


def test_what_a_user_may_write():
    assert find_published("20:2l-1024") == (published_tables()["20"], "2L-1024")
    assert find_published("10") == (published_tables()["10"], None)
    for text, words in [
        ("2", "unknown published table '2'"),
        ("7:every-9", "unknown variant of published table 7 'every-9' (did you mean 'every-"),
        ("10:1L", "table 10 (ViT-T CIFAR-100) has one setting; write --published 10"),
    ]:
        with pytest.raises(EectlError) as caught:
            find_published(text)
        assert words in str(caught.value)
