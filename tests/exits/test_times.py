"""Measured times as costs: the bench file's numbers by hand, its mistakes, and the unit's way through files and tables."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import made
from toy_exits import TOY_ORIGIN, toy_scored

from eectl.core.errors import EectlError
from eectl.core.files import write_all
from eectl.evaluation.curve import plot_curve
from eectl.evaluation.results import read_evaluation, write_evaluation
from eectl.evaluation.scoring import score_policies
from eectl.evaluation.tables import cost_text, show_calibration, show_evaluation
from eectl.exits.policy import CostTable, read_policies, write_policies
from eectl.exits.thresholds import choose_thresholds
from eectl.exits.times import CostRequest, parse_cost, read_times
from eectl.reports.compare import compare
from eectl.reports.comparison import notes
from eectl.reports.curves import plot_comparison
from eectl.reports.formats import as_json
from eectl.reports.lines import table_title
from eectl.reports.published import published_tables

MEASURED = [
    {"batch_size": 1, "plain_seconds": 2e-3, "prefix_seconds": [5e-4, 1.25e-3, 2.1e-3], "repeats": 7},
    {"batch_size": 32, "plain_seconds": 1.2e-4, "prefix_seconds": [4e-5, 3.96e-5, 1.3e-4]},
]
FILE = {"kind": "bench", "schema": 1, "checkpoint": "digest", "device": "a CPU", "threads": 2, "measured": MEASURED, "more": {}}
WHERE = "a CPU, 2 threads, batches of 32"


def read(tmp_path, batch_size=None, *, in_use=None, **changes):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(FILE | changes))
    request = CostRequest("latency", batch_size)
    return read_times(
        path, request, batch_size=in_use, checkpoint="digest", num_exits=3, precision="float32", name=Path("model.safetensors")
    )


def test_whole_nanoseconds(tmp_path):
    costs, notes = read(tmp_path, 1)
    assert (costs.exits, costs.plain, costs.kind, notes) == ((500_000, 1_250_000, 2_100_000), 2_000_000, "latency", [])
    assert costs.measured == "a CPU, 2 threads, batches of 1"
    assert read(tmp_path, measured=MEASURED[:1])[0] == costs  # the only batch size there is
    assert read(tmp_path, in_use=1)[0] == costs  # the one that the network is evaluated at
    assert read(tmp_path, 1, in_use=32)[0] == costs and read(tmp_path, in_use=64, measured=MEASURED[:1])[0] == costs
    assert read(tmp_path, measured=MEASURED[:1], threads=1)[0].measured == "a CPU, 1 thread, batches of 1"


def test_the_precision_of_the_times(tmp_path):
    """Files from before bench said it were measured in float32."""
    costs, notes = read(tmp_path, 1, precision="float32")
    assert (costs.measured, notes) == ("a CPU, 2 threads, batches of 1", [])
    costs, notes = read(tmp_path, 1, precision="bf16")
    assert costs.measured == "a CPU, 2 threads, batches of 1, bf16" and len(notes) == 1
    assert "was measured in bf16, and scores are computed in float32 here" in notes[0]
    assert notes[0].endswith("bench.json --precision float32")


def test_a_later_exit_is_never_faster(tmp_path):
    costs, notes = read(tmp_path, 32)
    assert costs.exits == (40_000, 40_000, 130_000) and costs.measured == WHERE
    assert len(notes) == 1 and "exit 2 measured faster than an exit before" in notes[0]
    falling = [MEASURED[0] | {"prefix_seconds": [3e-3, 1e-3, 2e-3]}]
    costs, notes = read(tmp_path, measured=falling)
    assert costs.exits == (3_000_000,) * 3 and "exits 2, 3 measured faster" in notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("macs", CostRequest("macs")), ("latency", CostRequest("latency")), ("latency:32", CostRequest("latency", 32))],
)
def test_cost_as_the_user_writes_it(text, expected):
    assert parse_cost(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("latncy", "did you mean 'latency'"), ("macs:32", "write macs, latency, or latency:BATCH"), ("latency:", "latency:BATCH"),
     ("latency:0", "latency:BATCH"), ("latency:-1", "latency:BATCH"), ("latency:3.5", "latency:BATCH"), ("", "unknown cost ''")],
)  # fmt: skip
def test_costs_that_are_none(text, words):
    with pytest.raises(EectlError, match=words):
        parse_cost(text)


@pytest.mark.parametrize(
    ("batch_size", "changes", "words"),
    [
        (None, {}, r"has times at batch sizes 1, 32; pick one, as in --cost latency:1"),
        (8, {}, r"has no times at batch size 8, it has 1, 32; run eectl bench model\.safetensors -o .*json --batch-size 8"),
        (None, {"measured": []}, r"has no times, it has none; run eectl bench"),
        (1, {"checkpoint": "other"}, r"measured with another checkpoint \(other…, model\.safetensors is digest…\); run eectl b"),
        (1, {"measured": [MEASURED[0] | {"prefix_seconds": [1e-3, 2e-3]}]}, "times of 2 exits, the network has 3; run eectl"),
        (1, {"measured": [MEASURED[0] | {"plain_seconds": 0}]}, r"measured\.0\.plain_seconds: Input should be greater than 0"),
        (1, {"measured": [MEASURED[0] | {"prefix_seconds": [None] * 3}]}, r"measured\.0\.prefix_seconds\.0: Input should be"),
        (1, {"device": None}, "device: Input should be a valid string"),
        (1, {"kind": "policy"}, "not a bench"),
        (1, {"schema": 2}, "upgrade eectl"),
    ],
)  # fmt: skip
def test_bench_files_that_will_not_do(tmp_path, batch_size, changes, words):
    with pytest.raises(EectlError, match=words) as caught:
        read(tmp_path, batch_size, **changes)
    assert "\n" not in str(caught.value) and "bench.json" in str(caught.value)


def test_a_batch_size_in_use_that_was_not_measured(tmp_path):
    with pytest.raises(EectlError, match="has times at batch sizes 1, 32; pick one"):
        read(tmp_path, in_use=8)


def test_missing_and_cut(tmp_path):
    path = tmp_path / "bench.json"
    arguments = {
        "request": CostRequest("latency", 1),
        "batch_size": None,
        "checkpoint": "digest",
        "num_exits": 3,
        "precision": "float32",
        "name": Path("m.safetensors"),
    }
    with pytest.raises(
        EectlError, match=r"there are no measured times; run eectl bench m\.safetensors -o .*, or name a file with --b"
    ):
        read_times(path, **arguments)
    path.write_text(json.dumps(FILE)[:-40])
    with pytest.raises(EectlError, match="cut short"):
        read_times(path, **arguments)


# --- where the unit goes -----------------------------------------------------------------------------------------------


def chain(search="shared"):
    """A policy and an evaluation whose costs are times."""
    costs = CostTable((40_000, 40_000, 130_000), 120_000, "latency", WHERE)
    policies = choose_thresholds(toy_scored(seed=1, split="calibration"), costs, budgets=(40.0, 75.0, 100.0), search=search)
    assert policies.costs == costs
    return policies, score_policies(toy_scored(seed=2), policies, costs, origin=TOY_ORIGIN)


def test_files_keep_the_unit(tmp_path):
    policies, result = chain("per-exit")
    write_policies(tmp_path / "p.json", policies)
    write_evaluation(tmp_path / "e.json", result)
    assert read_policies(tmp_path / "p.json") == policies and read_evaluation(tmp_path / "e.json") == result
    for one in (policies, result):
        assert (one.search, one.cost, one.measured) == ("per-exit", "latency", WHERE)
    for name, read_file in (("p.json", read_policies), ("e.json", read_evaluation)):
        value = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(value | {"cost": "dollars"}))
        with pytest.raises(EectlError, match=rf"{name}: unknown cost 'dollars'"):
            read_file(tmp_path / name)
        del value["cost"]
        (tmp_path / name).write_text(json.dumps(value))
        with pytest.raises(EectlError, match=rf"{name}: cost: Field required; write it again"):
            read_file(tmp_path / name)


def test_tables_and_pictures_say_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    policies, result = chain()
    show_calibration(policies)
    first = capsys.readouterr().out
    show_evaluation(result)
    second = capsys.readouterr().out
    for out in (first, second):
        assert "MACs" not in out and "mean µs/row" in out and max(map(len, out.splitlines())) <= 80
        assert f"Costs are time, of rows in full batches, measured on {WHERE}" in " ".join(out.split())
        assert "% of the plain backbone's time" in " ".join(out.split())
    assert "130.0" in second.split() and "108.3" in second.split()  # µs of the last exit, % of 120
    assert [cost_text(each, "latency", 120_000) for each in (1_234_567, 999, 40_000)] == ["1,235", "0.9990", "40.00"]
    slow = [cost_text(each, "latency", 14_350_000) for each in (14_350_000, 999_000, 14_350_000_000, 999_960_000)]
    assert slow == ["14.35", "0.9990", "14,350", "1,000"]
    show_calibration(replace(policies, plain_cost=14_350_000))
    assert "mean ms/row" in capsys.readouterr().out
    write_all(plot_curve(tmp_path / "a.svg", result))
    assert "% of the plain backbone's time (budgets" in labels_of(tmp_path / "a.svg")
    write_all(plot_comparison(tmp_path / "b.svg", compare([made((0.1, 0.2, 0.3), cost="latency", measured=WHERE)])))
    assert "% of the plain backbone's time" in labels_of(tmp_path / "b.svg")


def labels_of(path):
    return " ".join(element.text for element in ET.parse(path).iter() if element.tag.endswith("text"))


def test_runs_of_different_units_do_not_share_a_table():
    times = {"cost": "latency", "measured": WHERE}
    with pytest.raises(EectlError, match=rf"the cost of a row is MACs and time on {WHERE}; report them apart"):
        compare([made((0.1, 0.2, 0.3)), made((0.1, 0.2, 0.3), seed=1, **times)])
    with pytest.raises(EectlError, match=r"the cost of a row is time on .* and time on another"):
        compare([made((0.1, 0.2, 0.3), **times), made((0.1, 0.2, 0.3), seed=1, cost="latency", measured="another")])
    with pytest.raises(EectlError, match="--published 10: the paper's budgets are MACs"):
        compare([made((0.1, 0.2, 0.3), **times)], published=published_tables()["10"])
    pair = [made((0.1, 0.2, 0.3), **times), made((0.1, 0.2, 0.3), seed=1, plain_cost=1010, **times)]  # each network's own time
    table = compare(pair)
    assert table.rows[0].seeds == (0, 1) and "MACs" not in table_title(table)
    assert notes(table) == [f"Budgets and costs are time, measured on {WHERE}."]
    assert json.loads(as_json(table))["cost"] == "latency" and json.loads(as_json(table))["measured"] == WHERE
    assert json.loads(as_json(compare([made((0.1, 0.2, 0.3))])))["cost"] == "macs"


def test_runs_of_different_searches_are_rows_apart():
    found = compare([made((0.1, 0.2, 0.3)), made((0.1, 0.2, 0.3), search="per-exit")])
    assert [row.label for row in found.rows] == ["thresholds=shared", "thresholds=per-exit"]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_table_of_thresholds_where_exits_differ(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    policies, result = chain("per-exit")
    wide = tuple(0.5 + number / 100 for number in range(17))
    entries = [replace(policies.budgets[0], budget=float(number), thresholds=wide) for number in range(10, 19)]
    entries.append(replace(policies.budgets[0], budget=99.0, thresholds=None, value=None, mean_cost=None))
    show_calibration(replace(policies, budgets=tuple(entries)))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns and "…" not in out and "per-exit thresholds of max-softmax" in out
    assert "threshold" not in out.split()
    rows = [line.split() for line in out.splitlines()]
    assert ["17"] + ["0.66"] * 7 in rows and ["17", "0.66", "0.66", "-"] in rows
    budget = replace(result.budgets[0], budget=50.0, thresholds=(0.25, 0.75))
    show_evaluation(replace(result, budgets=(budget, result.budgets[-1])))
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "0.25"] in rows and ["2", "0.75"] in rows and "threshold" not in out.split()
