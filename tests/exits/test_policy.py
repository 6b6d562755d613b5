"""Budgets as text, and the policy file."""

import json
from dataclasses import replace

import pytest

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import ALWAYS, NEVER, BudgetPolicy, CostTable, Policies, Policy, read_policies, write_policies
from eectl.models.losses import TASKS
from eectl.recipe.budgets import DEFAULT_BUDGETS, parse_budgets

CHOSEN = (
    BudgetPolicy(25.0, None, None, None),
    BudgetPolicy(50.0, (ALWAYS, NEVER), 0.5, 10.0),
    BudgetPolicy(75.5, (0.1, 0.1), 0.9, 29.5),
)
POLICIES = Policies(
    "digest",
    TASKS["classification"],
    CRITERIA["margin"],
    "calibration",
    "f",
    10,
    (10, 20, 42),
    40,
    CHOSEN,
    "shared",
    "macs",
    None,
)


def test_parse_budgets():
    assert parse_budgets("75, 25,100,33.3") == (25, 33.3, 75, 100)
    assert parse_budgets("1000") == (1000,)
    assert parse_budgets([75, 25.5]) == (25.5, 75) and parse_budgets(50) == (50,) and parse_budgets((100,)) == (100,)
    assert parse_budgets(DEFAULT_BUDGETS) == (25, 50, 75, 100)


@pytest.mark.parametrize("budgets", [[], 0, [50, 0], [float("nan")], [50, 50]])
def test_numbers_that_are_no_budgets(budgets):
    with pytest.raises(EectlError, match=r"^--budgets "):
        parse_budgets(budgets)


@pytest.mark.parametrize("text", ["", "25,", "a", "0", "-5", "nan", "inf", "1001", "25;50", "25 50"])
def test_bad_budgets(text):
    with pytest.raises(EectlError, match=r"is not a budget; give percentages .* such as 25,50,75,100"):
        parse_budgets(text)


def test_repeated_budget():
    with pytest.raises(EectlError, match="50 stands twice"):
        parse_budgets("50,25,50.0")


def test_policy_file(tmp_path):
    path = tmp_path / "policy.json"
    write_policies(path, POLICIES)
    assert read_policies(path) == POLICIES
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    content = json.loads(path.read_text())
    assert (content["task"], content["criterion"], content["cost"]) == ("classification", "margin", "macs")
    assert content["budgets"][0] == {"budget": 25.0, "thresholds": None, "value": None, "mean_cost": None}
    assert POLICIES.reached() == {
        50.0: Policy(CRITERIA["margin"], (ALWAYS, NEVER)),
        75.5: Policy(CRITERIA["margin"], (0.1, 0.1)),
    }
    assert POLICIES.costs == CostTable((10, 20, 42), 40)
    POLICIES.check("digest", num_exits=3, splits={}, path=path)
    del content["precision"], content["digest"]  # as files have it from before policies said it
    path.write_text(json.dumps(content))
    assert read_policies(path).precision == "float32"
    write_policies(path, replace(POLICIES, precision="bf16"))
    assert read_policies(path).precision == "bf16"
    with pytest.raises(EectlError, match=r"policy\.json was made for another checkpoint .* run eectl calibrate-thresholds"):
        POLICIES.check("other", num_exits=3, splits={}, path=path)
    with pytest.raises(EectlError, match="costs of 3 exits, the checkpoint has 4"):
        POLICIES.check("digest", num_exits=4, splits={}, path=path)
    with pytest.raises(EectlError, match="not chosen on the calibration split of this checkpoint"):
        POLICIES.check("digest", num_exits=3, splits={"calibration": {"fingerprint": "of other rows"}}, path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "margins"}, "did you mean 'margin'"),
        ({"criterion": 5}, r"policy\.json: criterion: unknown criterion '5'"),
        ({"task": "segmentation"}, "unknown task 'segmentation'"),
        ({"plain_cost": "x"}, "plain_cost: Input should be a valid integer"),
        ({"budgets": [{"budget": 50}]}, r"budgets\.0\.thresholds: Field required"),
        (
            {"budgets": [{"budget": 50, "thresholds": [0.5], "value": 1, "mean_cost": 1}]},
            r"budgets\.0: 1 thresholds for 2 attached",
        ),
        (
            {"budgets": [{"budget": 50, "thresholds": [0.5, 1e39], "value": 1, "mean_cost": 1}]},
            r"policy\.json: thresholds must be finite",
        ),
        ({"kind": "evaluation"}, "not a policy"),
        ({"schema": 2}, "upgrade eectl"),
    ],
)
def test_policy_edited_by_hand(tmp_path, change, message):
    path = tmp_path / "policy.json"
    write_policies(path, POLICIES)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EectlError, match=message):
        read_policies(path)
