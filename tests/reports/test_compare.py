"""Runs as one table: against numpy, against a plain loop over thresholds, and what must not stand side by side."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_runs import PLAIN, made
from toy_exits import TOY_ORIGIN, score, toy_outputs, toy_scored

from eectl.core.errors import EectlError
from eectl.evaluation.scoring import score_as_paper
from eectl.exits.policy import CostTable, choose
from eectl.exits.sweep import sweep, thin
from eectl.reports.compare import compare
from eectl.reports.curves import band
from eectl.reports.differences import labels
from eectl.reports.lines import lines_of, table_title
from eectl.reports.lookups import average_first, per_seed
from eectl.reports.published import published_tables

VALUES = [(0.60, 0.71, 0.80), (0.64, 0.70, 0.82), (0.61, 0.74, 0.81)]


def test_mean_and_std_as_numpy_has_them():
    runs = [made(values, seed=seed) for seed, values in enumerate(VALUES)] + [made((0.1, 0.2, 0.3), regime="mixed")]
    joint, mixed = compare(runs).rows
    assert (joint.regime, joint.seeds, mixed.seeds) == ("joint", (0, 1, 2), (0,))
    table = np.array(VALUES)
    np.testing.assert_allclose([cell.mean for cell in joint.cells], table.mean(axis=0))
    np.testing.assert_allclose([cell.std for cell in joint.cells], table.std(axis=0, ddof=1))
    np.testing.assert_allclose([cell.share for cell in joint.cells], [0.2, 0.45, 1.1])
    assert [cell.std for cell in mixed.cells] == [None] * 3 and [cell.mean for cell in mixed.cells] == [0.1, 0.2, 0.3]


def measured(values, *, seed, name="auroc"):
    """A run whose budgets and plain network have these values of a measure."""
    run = made((0.5, 0.6, 0.7), seed=seed)
    entries = tuple(replace(entry, measures={name: value}) for entry, value in zip(run.evaluation.budgets, values, strict=True))
    exits = tuple(replace(each, measures={name: values[-1]}) for each in run.evaluation.exits)
    return replace(run, evaluation=replace(run.evaluation, budgets=entries, exits=exits))


def test_another_measure_takes_the_place_of_the_score():
    runs = [measured((0.7, 0.8, 0.9), seed=0), measured((0.6, None, 0.8), seed=1)]
    table = compare(runs, measure="auroc")
    (row,) = table.rows
    assert row.cells[0].mean == pytest.approx(np.mean([0.7, 0.6])) and row.cells[0].std == pytest.approx(
        np.std([0.7, 0.6], ddof=1)
    )
    assert row.cells[1] is None and row.cells[2].mean == pytest.approx(0.85)
    assert table.to_json()["measure"] == "auroc" and "AUROC in %" in table_title(table)
    assert [cell[0] for cell in lines_of(table)[0].cells] == ["65.00", "-", "85.00"]
    errors = compare([measured((3.0, 2.0, 1.0), seed=0, name="mae")], measure="mae")
    assert "MAE (lower is better)" in table_title(errors) and lines_of(errors)[0].cells[0][0] == "3"


@pytest.mark.parametrize(
    ("how", "measure", "words"),
    [
        ("per-seed", "mcc", "classification) has auroc; name one of these"),
        ("per-seed", "aurocs", "did you mean 'auroc'"),
        ("average-first", "auroc", "the authors' lookup and tables are of scores"),
    ],
)
def test_measures_that_are_not_there(how, measure, words):
    with pytest.raises(EectlError) as caught:
        compare([measured((0.7, 0.8, 0.9), seed=0)], how=how, measure=measure)
    assert words in str(caught.value)


def test_order_of_rows_and_budgets():
    runs = [
        made((0.1, 0.2, 0.3), regime=regime, seed=seed) for seed in (1, 0) for regime in ("mixed-gradual", "mixed", "disjoint")
    ]
    runs.append(made((0.4, 0.5), regime="joint", budgets=(75.0, None), shares=(0.7, 1.1)))
    table = compare(runs)
    assert [row.regime for row in table.rows] == ["disjoint", "joint", "mixed", "mixed-gradual"]
    assert table.rows[0].seeds == (0, 1)
    assert table.budgets == (25, 50, 75, None)
    assert [cell and cell.mean for cell in table.rows[1].cells] == [None, None, 0.4, 0.5]


def test_no_mean_over_the_seeds_that_happen_to_reach_a_budget():
    runs = [made((None, 0.7, 0.8)), made((0.6, 0.7, 0.8), seed=1)]
    assert [cell and cell.mean for cell in compare(runs).rows[0].cells] == [None, 0.7, 0.8]


# --- average-first -----------------------------------------------------------------------------------------------------


def test_where_the_two_lookups_differ():
    """At 50 %: seed 0 may take its 2nd threshold (48 %), seed 1 only its 1st; on average the 2nd costs 54 %, the 1st 25 %."""
    one = made((0.5, 0.7, 0.9), shares=(0.2, 0.48, 1.1), grid=[(0.2, 0.5), (0.48, 0.7), (1.1, 0.9)])
    two = made((None, 0.6, 0.8), shares=(0.3, 0.3, 1.1), grid=[(0.3, 0.6), (0.6, 0.65), (1.1, 0.8)], seed=1)
    pair = [one.evaluation, two.evaluation]
    assert per_seed(pair, 50.0).mean == pytest.approx((0.7 + 0.6) / 2)
    first = average_first(pair, 50.0)
    assert (first.mean, first.share) == (pytest.approx((0.5 + 0.6) / 2), pytest.approx(0.25))
    assert first.std == pytest.approx(np.std([0.5, 0.6], ddof=1))
    at_25 = average_first(pair, 25.0)  # seed 1 alone is over budget there, their mean is not
    assert at_25 == first and per_seed(pair, 25.0) is None
    assert average_first(pair, 24.9) is None
    assert average_first(pair, None).mean == pytest.approx(0.85)


def test_average_first_against_a_loop_over_seeds_and_thresholds():
    costs = (20, 45, 110)
    seeds = [toy_outputs(seed=seed, num_rows=60) for seed in (1, 2, 3)]
    evaluations = [score_as_paper(score(*each), CostTable(costs, 100), budgets=(30.0,), origin=TOY_ORIGIN) for each in seeds]
    for budget in (15.0, 20.0, 30.0, 50.0, 75.0, 100.0, None):
        expected = naive_average_first(seeds, costs, budget)
        found = average_first(evaluations, budget)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert (found.mean, found.std, found.share) == pytest.approx(expected)


def naive_average_first(seeds, costs, budget):
    """For every threshold choose anew for every seed, average, and stop at the first that is over budget."""
    result = None
    for step in range(100):
        threshold = np.float32(step / 99)
        values, shares = [], []
        for logits, classes in seeds:
            scores = logits.softmax(dim=2).amax(dim=2).numpy()
            leaves = [next((k for k in range(2) if scores[k, row] > threshold), 2) for row in range(scores.shape[1])]
            hits = [int(logits[k, row].argmax() == classes[row]) for row, k in enumerate(leaves)]
            values.append(np.mean(hits))
            shares.append(np.mean([costs[k] for k in leaves]) / 100)
        if budget is not None and np.mean(shares) * 100 > budget + 1e-9:
            break
        result = np.mean(values), np.std(values, ddof=1), np.mean(shares)
    return result


def test_average_first_needs_its_grid():
    with pytest.raises(EectlError, match=r"runs/joint-0 has no values at the authors' thresholds"):
        compare([made((0.1, 0.2, 0.3))], how="average-first")
    run = made((1.0, 2.0, 3.0), task="regression")
    with pytest.raises(EectlError, match="names no thresholds for regression"):
        compare([run], how="average-first")
    a = made((0.1, 0.2, 0.3), grid=[(0.2, 0.5), (1.1, 0.9)])
    b = made((0.1, 0.2, 0.3), grid=[(0.2, 0.5), (0.3, 0.6), (1.1, 0.9)], seed=1)
    with pytest.raises(EectlError, match="runs/joint-0 and runs/joint-1 have different thresholds"):
        compare([a, b], how="average-first")
    with pytest.raises(EectlError, match="unknown lookup 'mean-first'"):
        compare([a], how="mean-first")


# --- names of settings -------------------------------------------------------------------------------------------------


def test_labels_name_what_differs():
    runs = [
        made((0.1, 0.2, 0.3)),
        made((0.1, 0.2, 0.3), seed=1, recipe=["data.workers=2", "batch_size=128", "eval_batch_size=7"]),
        made((0.1, 0.2, 0.3), heads=("gpf-512",) * 2, recipe=["optimizer.lr=1e-4"]),
        made((0.1, 0.2, 0.3), criterion="entropy"),
    ]
    rows = compare(runs).rows
    assert [(row.label, row.seeds) for row in rows] == [
        ("head=linear, lr=0.001, criterion=max-softmax", (0, 1)),
        ("head=gpf-512, lr=0.0001, criterion=max-softmax", (0,)),
        ("head=linear, lr=0.001, criterion=entropy", (0,)),
    ]
    assert [row.label for row in compare(runs[:2]).rows] == [""]


def test_names_are_as_short_as_they_are_clear():
    one, two = ({"optimizer.name": "adamw", "a.lr": 0.1, "b.lr": 1.0, "compile": True, "w": [1, 2.5]},
                {"optimizer.name": "sgd", "a.lr": 0.2, "b.lr": 2.0, "compile": False})  # fmt: skip
    assert labels([one, two]) == [
        "optimizer=adamw, a.lr=0.1, b.lr=1, compile=true, w=1,2.5",
        "optimizer=sgd, a.lr=0.2, b.lr=2, compile=false, w=none",
    ]


def test_a_key_that_an_older_recipe_lacks_has_its_default():
    old, new = made((0.1, 0.2, 0.3)), made((0.1, 0.2, 0.3), seed=1)
    del old.origin.recipe["label_smoothing"]
    assert compare([old, new]).rows[0].seeds == (0, 1)
    other = made((0.1, 0.2, 0.3), seed=1, recipe=["label_smoothing=0.1"])
    assert [row.label for row in compare([old, other]).rows] == ["label_smoothing=0", "label_smoothing=0.1"]


def test_own_labels():
    small, large = {"label": "small"}, {"label": "large", "heads": ("mlp-2048",) * 2}
    table = compare([made(VALUES[0], **large), made(VALUES[1], **small), made(VALUES[2], seed=1, **large)])
    assert [(row.label, row.seeds) for row in table.rows] == [("large", (0, 1)), ("small", (0,))]
    with pytest.raises(EectlError, match=r"a and b are both 'x' of joint, but differ \(head=linear; head=mlp-8\)"):
        compare([made(VALUES[0], label="x", name="a"), made(VALUES[1], label="x", name="b", seed=1, heads=("mlp-8",) * 2)])


# --- what must not stand in one table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": ["data.name=mnist"]}, "data.name is digits and mnist; report them apart"),
        ({"recipe": ["data.split_seed=1"]}, "data.split_seed is 42 and 1"),
        ({"recipe": ["backbone.name=resnet32"]}, "backbone.name is resnet20 and resnet32"),
        ({"recipe": ["backbone.args={stem: small}"]}, "backbone.args.stem is none and small"),
        ({"task": "regression"}, "task is classification and regression"),
        ({"protocol": "paper"}, "the thresholds' protocol is calibrated and paper"),
        ({"fingerprint": "0" * 64}, "the fingerprint of the test rows is ffffffffffff… and 000000000000…"),
        ({"plain_cost": 999}, "the plain backbone's cost is 1000 and 999"),
        ({"split": "calibration"}, "the split is test and calibration"),
        ({"num_rows": 11}, "the number of test rows is 10 and 11"),
    ],
)
def test_runs_that_do_not_belong_together(change, words):
    other = made((0.1, 0.2, 0.3), seed=1, **change)
    with pytest.raises(EectlError, match="runs/joint-0 and runs/joint-1 do not belong in one table") as caught:
        compare([made((0.1, 0.2, 0.3)), other])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_seed_twice():
    with pytest.raises(EectlError, match=r"a and b are both seed 0 of joint; give each seed once, .* --label"):
        compare([made((0.1, 0.2, 0.3), name="a"), made((0.1, 0.2, 0.3), name="b")])


# --- published numbers -------------------------------------------------------------------------------------------------


def published(runs, number, variant=None):
    rows = compare(runs, published=published_tables()[number], variant=variant).rows
    return {(row.label, row.regime): [cell and round(cell.mean, 6) for cell in row.published] for row in rows}


def test_published_beside_ours():
    found = published([made((0.1, 0.2, 0.3), regime=name) for name in ("disjoint", "alternating")], "10")
    assert found == {("", "disjoint"): [0.2833, 0.4732, 0.6399], ("", "alternating"): [0.3785, 0.5911, 0.6839]}
    labelled = [made((0.1, 0.2, 0.3), label="2l-1024"), made((0.1, 0.2, 0.3), label="1L", heads=("x", "x"))]
    found = published(labelled, "20")
    assert list(found) == [("1L", "joint"), ("2l-1024", "joint")] and None not in found["1L", "joint"]
    assert published(labelled[:1], "6", "1L") == {("2l-1024", "joint"): [0.4247, 0.5324, None]}
    assert published([made((0.1, 0.2, 0.3))], "19")["", "joint"][0] == 0.5298


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        ("14", {}, "BERT-B STS-B is regression, these runs do classification"),
        ("1", {"regime": "alternating"}, "has no regime of these runs (alternating)"),
        ("6", {}, "has 1L, 2L-1024, 2L-2048, and no row is labelled so; name one, as in --published 6:1L"),
        ("1", {"budgets": (33.0, 60.0, None)}, "has the budgets 25%, 50%, 75%, 100%, and these runs have none of them"),
    ],
)
def test_published_that_does_not_fit(number, change, words):
    with pytest.raises(EectlError) as caught:
        published([made((0.1, 0.2, 0.3), **change)], number)
    assert words in str(caught.value)


# --- curves and bands --------------------------------------------------------------------------------------------------


def test_band_of_step_functions():
    one = made((0.1, 0.2, 0.3), curve=[(0.2, 0.5), (0.6, 0.7), (1.0, 0.9)]).evaluation
    two = made((0.1, 0.2, 0.3), curve=[(0.4, 0.4), (0.8, 0.6)], seed=1).evaluation
    found = band([one, two], num_points=7)  # 0.4, 0.5 … 1.0: from where both have a point to the dearest of any
    np.testing.assert_allclose(found.shares, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    steps = np.array([[0.5, 0.5, 0.7, 0.7, 0.7, 0.7, 0.9], [0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6]])
    np.testing.assert_allclose(found.means, steps.mean(axis=0))
    np.testing.assert_allclose(found.stds, steps.std(axis=0, ddof=1))
    assert not band([one]).stds.any()


def test_an_evaluations_curve_and_grid_are_what_choosing_gives():
    test, costs = toy_scored(seed=2), (20, 45, 110)
    result = score_as_paper(test, CostTable(costs, PLAIN), budgets=(2.5,), origin=TOY_ORIGIN)
    for curve in (result.curve, result.grid):
        for threshold, cost, value in zip(curve.thresholds, curve.mean_costs, curve.values, strict=True):
            exits = choose(test.scores, (threshold, threshold))
            assert cost == np.mean([costs[k] for k in exits])
            assert value == test.outcome.gather(0, exits[None])[0].mean()
    assert len(result.grid.thresholds) == 100 and result.grid.thresholds[99] == 1 and result.fingerprint == test.made.fingerprint
    counting = toy_scored(criterion="patience", seed=2)
    patient = score_as_paper(counting, CostTable(costs, PLAIN), budgets=(2.5,), origin=TOY_ORIGIN)
    assert patient.grid.thresholds == (0, 1, 2)


def test_thinned_points_lag_by_one_step_at_most():
    logits, labels = toy_outputs(seed=2, num_rows=3000)
    test = score(logits * torch.linspace(1, 2, 3000)[:, None], labels, criterion="margin")  # hardly a tie is left
    points = sweep(test.scores, test.outcome, (20, 45, 110))
    costs = np.array(thin(points, 50).mean_costs)
    assert 30 < len(costs) <= 51 < len(points)
    every = points.mean_costs.numpy()
    assert (costs[0], costs[-1]) == (every[0], every[-1])
    step = (every[-1] - every[0]) / 49
    lag = costs[np.searchsorted(costs, every)] - every  # how much dearer the next point is that was kept
    assert (lag >= 0).all() and lag.max() <= step + 1e-9
