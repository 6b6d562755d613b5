"""Tables whose words all arrive at any width, JSON for machines, and pictures."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from toy_exits import TOY_COSTS, TOY_ORIGIN, toy_scored

from eectl.core.console import show_json
from eectl.core.errors import EectlError
from eectl.evaluation.curve import check_plot_path, plot_curve, readable
from eectl.evaluation.scoring import score_as_paper, score_policies
from eectl.evaluation.tables import (
    drop_text,
    human,
    shared_threshold,
    show_calibration,
    show_costs,
    show_evaluation,
    threshold_text,
    weak_exits,
)
from eectl.exits.costs import Costs
from eectl.exits.policy import ALWAYS, NEVER, CostTable
from eectl.exits.thresholds import choose_thresholds
from eectl.models.losses import TASKS

BUDGETS = (1.0, 12.75, 25.0, 37.25, 50.0, 62.75, 75.0, 87.25, 90.0, 95.75, 98.25, 100.0, 102.75, 105.25, 200.0)


def results(num_exits=3, task="classification"):
    costs = CostTable(tuple(60_000_000 * (index + 1) // num_exits * 2 for index in range(num_exits)), 118_000_000)
    calibration = toy_scored(num_exits=num_exits, seed=1, split="calibration", task=task)
    test = toy_scored(num_exits=num_exits, num_rows=1500, seed=2, task=task)
    policies = choose_thresholds(calibration, costs, budgets=BUDGETS)
    return policies, score_policies(test, policies, costs, origin=TOY_ORIGIN)


@pytest.fixture
def columns(monkeypatch, request):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("columns", [80, 200], indirect=True)
@pytest.mark.parametrize(("num_exits", "task"), [(3, "classification"), (18, "classification"), (4, "regression")])
def test_tables_fit_and_lose_nothing(columns, num_exits, task, capsys):
    policies, result = results(num_exits, task)
    show_calibration(policies)
    show_evaluation(result)
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= columns
    words = out.split()
    for entry in result.budgets:
        assert ("unlimited" if entry.budget is None else f"{entry.budget:g}%") in words
        assert all(f"{count:,}" in words for count in entry.left or () if count)
    scale, form = (100, ".2f") if task == "classification" else (1, ".4g")
    assert all(f"{scale * entry.value:{form}}" in words for entry in result.exits)


@pytest.mark.parametrize("columns", [30], indirect=True)
def test_narrow_terminals_wrap(columns, capsys):
    show_evaluation(results()[1])
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 30


@pytest.mark.parametrize("columns", [200], indirect=True)
def test_notes(columns, capsys):
    _, result = results()
    first = next(entry for entry in result.budgets if entry.budget == 50)
    over = replace(first, mean_cost=0.625 * result.plain_cost, is_over=True)
    show_evaluation(replace(result, budgets=(result.budgets[0], over), dead=(1, 2), protocol="paper"))
    out = capsys.readouterr().out
    assert "over budget on the test split (the thresholds were chosen on another): 62.50% for 50%" in out
    assert "Dead exits 1, 2: no row leaves there" in out
    assert "thresholds were chosen on the test split that they are scored on" in out
    assert "- out of reach" in out
    show_evaluation(replace(result, budgets=(replace(first, is_over=False),), dead=()))
    out = capsys.readouterr().out
    assert not any(word in out for word in ("over budget", "Dead", "out of reach", "scored on"))


def rows_of(out):
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("columns", [80], indirect=True)
def test_the_plain_backbone_and_what_is_lost_against_it(columns, capsys):
    _, result = results()
    last = result.exits[-1]
    exits = (replace(result.exits[0], value=0.5, balanced=0.5), replace(last, number=2, value=0.75, error=0.0112, balanced=0.75))
    budgets = tuple(
        replace(result.budgets[-1], budget=budget, value=value, thresholds=(0.5,))
        for budget, value in ((25.0, 0.7), (50.0, 0.8), (75.0, 0.75))
    )
    show_evaluation(replace(result, exits=exits, budgets=budgets))
    rows = rows_of(capsys.readouterr().out)
    assert ["plain", "75.00", "±", "1.12", "118", "M", "100.0"] in rows
    drops = {row[0]: row[4] for row in rows if row and row[0] in ("25%", "50%", "75%") and len(row) > 5}
    assert drops == {"25%": "5.00", "50%": "-5.00", "75%": "0.00"}


def test_drops():
    assert [drop_text(value, 0.5, TASKS["classification"]) for value in (0.4, 0.6, 0.5 + 1e-9)] == ["10.00", "-10.00", "0.00"]
    assert [drop_text(value, 0.5, TASKS["regression"]) for value in (0.25, 1.0)] == ["-0.25", "0.5"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_weak_exits_are_pointed_out(task):
    _, result = results(5, task)
    better, worse, best = (0.8, 0.7, 0.9) if task == "classification" else (0.2, 0.3, 0.1)
    values = (worse, better, worse, worse, best)
    exits = tuple(replace(entry, value=value) for entry, value in zip(result.exits, values, strict=True))
    assert weak_exits(replace(result, exits=exits)) == ["! exits 3, 4 are worse than exit 2, which costs less."]
    exits = tuple(replace(entry, value=value) for entry, value in zip(exits, (better, worse, better, better, best), strict=True))
    assert weak_exits(replace(result, exits=exits)) == ["! exit 2 is worse than exit 1, which costs less."]
    same_cost = tuple(replace(entry, cost=100) for entry in exits)
    assert weak_exits(replace(result, exits=same_cost)) == []
    assert weak_exits(replace(result, exits=tuple(replace(entry, value=0.5) for entry in exits))) == []


@pytest.mark.parametrize("columns", [80], indirect=True)
def test_thresholds_of_difference_are_the_delta_of_the_rule(columns, capsys):
    """A row leaves where its value changes by less than δ: the score is minus the change, the threshold −δ."""
    policies, result = results(4, "regression")
    entry = replace(policies.budgets[-1], budget=50.0, thresholds=(-0.125,) * 3)
    show_calibration(replace(policies, budgets=(entry,)))
    show_evaluation(replace(result, budgets=(replace(result.budgets[-2], budget=50.0, thresholds=(-0.125,) * 3),)))
    rows = rows_of(capsys.readouterr().out)
    headers = [row for row in rows if "budget" in row and "δ" in row]
    assert len(headers) == 2 and [row for row in rows if row and row[0] == "50%" and "0.125" in row]
    assert not any("-0.125" in row for row in rows)
    show_calibration(replace(policies, budgets=(replace(entry, thresholds=(NEVER, -0.25, ALWAYS)),)))
    out = capsys.readouterr().out
    assert "δ of each exit, by budget" in out
    assert [row for row in rows_of(out) if row and row[0] in "123"] == [["1", "never"], ["2", "0.25"], ["3", "always"]]


@pytest.mark.parametrize("columns", [80], indirect=True)
def test_costs(columns, capsys):
    costs = Costs(exits=(25, 99, 130), heads=(5, 20), plain=100, parameters=270_000, head_parameters=(640, 1300))
    show_costs(costs, after=(3, 11))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["1", "3", "25", "25.0", "20.0", "640"] in rows
    assert ["2", "11", "99", "99.0", "25.3", "1.30", "k"] in rows
    assert ["3", "own", "head", "130", "130.0", "19.2", "-"] in rows
    assert [line for line in lines if "saves nothing" in line] == ["! exit 2 saves nothing: it costs 99.0% of the plain backbone"]
    assert "parameters: 270 k in the backbone, 1.94 k in attached heads" in lines


def test_json(capsys):
    show_json({"value": float("nan"), "name": "a" * 300})
    assert json.loads(capsys.readouterr().out) == {"value": None, "name": "a" * 300}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1.00 k"), (41_234_567, "41.2 M"), (9_999_000, "10.0 M"), (999_600_000, "1.00 G"),
     (1.8e12, "1.80 T"), (123_456, "123 k"), (5e18, "5.00e+03 P")],
)  # fmt: skip
def test_human(count, text):
    assert human(count) == text


def test_threshold_text():
    assert [threshold_text(each) for each in (0.12345678, ALWAYS, NEVER)] == ["0.1235", "always", "never"]
    assert shared_threshold((0.5, 0.5)) == "0.5" and shared_threshold(()) == "none"


def test_readable_keeps_the_last():
    assert readable([1, 2, 3, 4], 1.5) == [3, 1]
    assert readable([5.0], 1) == [0] and readable([], 1) == []


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PNG"])
def test_plot_files(tmp_path, suffix):
    path = tmp_path / f"curve.{suffix}"
    _, result = results()
    path.write_bytes(plot_curve(path, result)[path])
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()]
    assert path.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("num_exits", "task"), [(1, "classification"), (4, "classification"), (18, "regression")])
def test_plot_says_what_it_shows(tmp_path, num_exits, task):
    path = tmp_path / "curve.svg"
    _, result = results(num_exits, task)
    path.write_bytes(plot_curve(path, result)[path])
    words = [element.text for element in ET.parse(path).iter() if element.tag.endswith("text")]
    assert "calibrated for a budget" in words and "any threshold (test split)" in words
    assert "accuracy, %" in words if task == "classification" else "MSE, lower is better" in words
    assert str(num_exits) in words and "75 %" in words


def test_plot_of_the_paper_protocol(tmp_path):
    test = toy_scored(seed=2)
    result = score_as_paper(test, TOY_COSTS, budgets=(50.0,), origin=TOY_ORIGIN)
    (picture,) = plot_curve(tmp_path / "a.svg", result).values()
    assert b"paper for a budget" in picture


def test_plot_suffix(tmp_path):
    with pytest.raises(EectlError, match=r"allowed are files that end in \.png, \.pdf, \.svg"):
        check_plot_path(tmp_path / "curve.jpg")
    with pytest.raises(EectlError):
        plot_curve(tmp_path / "curve", results()[1])
    assert not list(tmp_path.iterdir())
