"""The table of names: what lies behind each is there, and help texts and completions are made from it."""

import pytest
from running import eectl

from eectl.analyses.analyze import ANALYSES
from eectl.analyses.landscape.plane import PARTS
from eectl.analyses.probe import VIEWS
from eectl.core.precision import PRECISIONS
from eectl.data.sources import DATASETS
from eectl.data.text_sources import TEXT_DATASETS
from eectl.evaluation.evaluate import PROTOCOLS
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import COSTS
from eectl.exits.thresholds import SEARCHES
from eectl.models.heads import HEADS
from eectl.models.losses import TASKS
from eectl.models.multi_exit import blocks_of
from eectl.recipe import choices
from eectl.recipe.choices import completions, described, in_order, listed
from eectl.recipe.recipe import SCORE_NAMES
from eectl.recipe.regimes import REGIMES
from eectl.recipe.text_sets import TEXT_SETS
from eectl.recipe.weighting import SCALED, WEIGHTINGS
from eectl.reports.compare import LOOKUPS

TABLES = {
    "ANALYSES": (ANALYSES, choices.QUESTION_CHOICES),
    "PARTS": (PARTS, choices.MOVED_CHOICES),
    "VIEWS": (VIEWS, choices.VIEW_CHOICES),
    "PROTOCOLS": (PROTOCOLS, choices.PROTOCOL_CHOICES),
    "COSTS": (COSTS, choices.COST_CHOICES),
    "SEARCHES": (SEARCHES, choices.SEARCH_CHOICES),
    "LOOKUPS": (LOOKUPS, choices.LOOKUP_CHOICES),
    "SCORE_NAMES": (SCORE_NAMES, choices.TASK_CHOICES),
    "DATASETS": (DATASETS, choices.IMAGE_CHOICES),
    "TEXT_DATASETS": (TEXT_DATASETS, choices.TEXT_CHOICES),
    "CRITERIA": (CRITERIA, choices.CRITERION_CHOICES),
    "HEADS": (HEADS, choices.HEAD_CHOICES),
    "TASKS": (TASKS, choices.TASK_CHOICES),
    "PRECISIONS": (PRECISIONS, choices.PRECISION_CHOICES),
    "REGIMES": (REGIMES, choices.REGIME_CHOICES),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_the_names_that_a_user_can_choose(name):
    table, names = TABLES[name]
    assert set(table) == set(names)


def test_what_has_no_table_of_its_own_takes_the_names():
    assert {*SCALED, "auto", "sdn-ramp", "equilibrium", "l2w"} == set(WEIGHTINGS)
    assert {"text", *TEXT_SETS} == set(choices.TEXT_CHOICES)
    for scheme in completions(choices.PLACEMENT_CHOICES):
        assert blocks_of(scheme, 16)
    assert set(choices.DEFAULT_CRITERION.values()) <= set(CRITERIA)


def test_names_with_a_number_in_them_complete_to_examples():
    assert completions(["auto", "mlp-WIDTH", "every-N"]) == ("auto", "mlp-1024", "mlp-2048", "every-1", "every-2", "every-3")
    assert listed({"a": "x", "b": "y"}) == "a, b"
    assert described({"a": "x", "b": "y"}) == "a: x; b: y"


def test_a_table_without_a_name_is_a_mistake_of_ours():
    assert list(in_order(["a", "b"], {"b": 2, "a": 1}).items()) == [("a", 1), ("b", 2)]
    with pytest.raises(AssertionError, match="b, c"):
        in_order(["a", "b"], {"a": 1, "c": 3})


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("train --help", choices.REGIME_CHOICES),
        ("attach-heads --help", [*choices.HEAD_CHOICES, *choices.PLACEMENT_CHOICES]),
        ("calibrate-thresholds --help", [*choices.CRITERION_CHOICES, *choices.SEARCH_CHOICES, *choices.COST_CHOICES]),
        ("evaluate --help", choices.PRECISION_CHOICES),
        ("analyze loss-landscape --help", [*choices.MOVED_CHOICES, *choices.SPLIT_CHOICES]),
    ],
)
def test_help_names_every_choice(line, names):
    words = set(eectl(*line.split())[0].replace(",", " ").replace(":", " ").split())
    assert {name.rstrip(";") for name in names} <= {word.rstrip(";") for word in words}
