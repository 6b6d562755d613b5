"""`calibrate-thresholds` from the command line to the report: thresholds per exit, and measured times as costs."""

import json

import pytest
import running

from eectl.evaluation import calibrate as calibrating
from eectl.evaluation.bench import bench
from eectl.evaluation.calibrate import calibrate
from eectl.evaluation.evaluate import evaluate
from eectl.models.checkpoint import read_checkpoint_metadata
from eectl.training.train import train


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small joint network with two attached exits, as m.safetensors."""
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("calibrate")
    done = train(small_recipe(), out=folder / "run", device="cpu", quiet=True)
    (folder / "m.safetensors").write_bytes(done.path.read_bytes())
    return folder


@pytest.fixture
def eectl(work):
    """Run a line of the program in the work folder; what it refuses is one line."""

    def run(line, code=0):
        out, err = running.eectl(*line.split(" "), cwd=work, code=code, columns=100)
        if code:
            assert out == "" and err.count("\n") == 1, err
        return out, err

    return run


def write_bench(path, network, **changes):
    times = [
        {"batch_size": 1, "plain_seconds": 1e-3, "prefix_seconds": [5e-4, 8e-4, 1.1e-3]},
        {"batch_size": 32, "plain_seconds": 1e-4, "prefix_seconds": [6e-5, 5e-5, 1.2e-4]},
    ]
    file = {
        "kind": "bench",
        "schema": 1,
        "checkpoint": read_checkpoint_metadata(network)["weights"],
        "device": "toy",
        "threads": 2,
    }
    path.write_text(json.dumps(file | {"measured": times} | changes))


def test_thresholds_per_exit(work, eectl):
    eectl("calibrate-thresholds m.safetensors --budgets 40,70 -o shared.json --save-predictions cal.safetensors")
    line = "calibrate-thresholds m.safetensors --budgets 40,70 --predictions cal.safetensors"
    out, _ = eectl(f"{line} --thresholds per-exit -o own.json --json")
    shared, own = (json.loads((work / name).read_text()) for name in ("shared.json", "own.json"))
    assert json.loads(out) == own and (shared["search"], own["search"]) == ("shared", "per-exit")
    assert {**own, "search": "shared", "budgets": shared["budgets"], "digest": shared["digest"]} == shared
    for one, other in zip(own["budgets"], shared["budgets"], strict=True):
        assert len(one["thresholds"]) == 2 and one["value"] >= other["value"]
    result = json.loads(eectl("evaluate m.safetensors --policy own.json --json")[0])
    assert result["search"] == "per-exit" and result["budgets"][0]["thresholds"] == own["budgets"][0]["thresholds"]
    assert "did you mean 'per-exit'" in eectl(f"{line} --thresholds per-exits -o x.json", code=1)[1]


def test_costs_in_time(work, eectl):
    write_bench(work / "bench.json", work / "m.safetensors")
    out, err = eectl("calibrate-thresholds m.safetensors --budgets 55,70,115 --cost latency:32 -o time.json")
    assert "note: bench.json: exit 2 measured faster than an exit before" in err
    assert "mean µs/row" in out and "MACs" not in out and "toy, 2 threads, batches of 32" in out
    policy = json.loads((work / "time.json").read_text())
    assert (policy["cost"], policy["measured"]) == ("latency", "toy, 2 threads, batches of 32")
    assert (policy["exit_costs"], policy["plain_cost"]) == ([60_000, 60_000, 120_000], 100_000)
    assert [entry["thresholds"] is None for entry in policy["budgets"]] == [True, False, False]
    (work / "bench.json").unlink()  # the policy is enough
    out, _ = eectl("evaluate m.safetensors --policy time.json -o time-evaluation.json --plot time.svg")
    assert "MACs" not in out and "mean µs/row" in out
    assert "backbone's time" in (work / "time.svg").read_text()
    result = json.loads((work / "time-evaluation.json").read_text())
    assert (result["cost"], result["measured"], result["plain_cost"]) == ("latency", policy["measured"], 100_000)
    assert [entry["cost"] for entry in result["exits"]] == policy["exit_costs"]
    for entry in result["budgets"][1:]:
        assert (
            entry["mean_cost"]
            == sum(n * c for n, c in zip(entry["left"], policy["exit_costs"], strict=True)) / result["num_rows"]
        )
    assert result["curve"]["mean_costs"][-1] == 120_000
    eectl("evaluate m.safetensors -o macs.json")
    assert "the cost of a row is MACs and time on toy" in eectl("report macs.json time-evaluation.json", code=1)[1]
    assert "Budgets and costs are time, measured on toy" in eectl("report time-evaluation.json --format markdown")[0]


def test_of_several_batch_sizes_the_one_in_use(work, eectl):
    write_bench(work / "several.json", work / "m.safetensors")
    line = "calibrate-thresholds m.safetensors --cost latency --bench several.json --budgets 70,115 --json"
    found = json.loads(eectl(f"{line} --batch-size 32 -o in-use.json")[0])
    assert (found["plain_cost"], found["measured"]) == (100_000, "toy, 2 threads, batches of 32")
    found = json.loads(eectl(f"{line} --batch-size 1 -o in-use.json --overwrite")[0])
    assert found["plain_cost"] == 1_000_000


def test_every_request_is_checked_before_data_is_loaded(work, eectl, monkeypatch):
    monkeypatch.chdir(work)

    def never(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(calibrating, "open_session", never)
    write_bench(work / "early.json", work / "m.safetensors")
    line = "calibrate-thresholds m.safetensors -o never.json"
    assert "pick one" in eectl(f"{line} --cost latency --bench early.json", code=1)[1]
    assert "pick one" in eectl(f"{line} --cost latency --bench early.json --batch-size 8", code=1)[1]
    assert "is for regression" in eectl(f"{line} --criterion difference", code=1)[1]
    with pytest.raises(AssertionError, match="loaded"):
        calibrate("m.safetensors", out="never.json", cost="latency:32", bench="early.json")


def test_the_functions_return_what_the_commands_print(work, eectl, capsys, monkeypatch):
    monkeypatch.chdir(work)
    policy = calibrate("m.safetensors", budgets=[40, 70], out="api.json", criterion="margin", device="cpu")
    result = evaluate("m.safetensors", policy="api.json", budgets=70, device="cpu", batch_size=16)
    times = bench("m.safetensors", policy=work / "api.json", batch_size=[4], seconds=0.01, out="api-bench.json", device="cpu")
    assert capsys.readouterr() == ("", "")
    line = "calibrate-thresholds m.safetensors --budgets 40,70 --criterion margin --device cpu -o api-2.json --json"
    printed, written = json.loads(eectl(line)[0]), json.loads((work / "api.json").read_text())
    assert written == printed == json.loads(json.dumps(policy.to_json()))
    line = "evaluate m.safetensors --policy api.json --budgets 70 --device cpu --batch-size 16 --json"
    assert json.loads(eectl(line)[0]) == json.loads(json.dumps(result.to_json()))
    assert json.loads((work / "api-bench.json").read_text()) == json.loads(json.dumps(times.to_json()))
    lines = []
    evaluate("m.safetensors", out=work / "api-evaluation.json", plot="api.svg", device="cpu", say=lines.append)
    assert "api.svg: written" in lines and any("144 rows, fewer than 200" in each for each in lines)


def test_times_that_will_not_do(work, eectl):
    line = "calibrate-thresholds m.safetensors -o never.json"
    assert "bench.json: there are no measured times; run eectl bench m.safetensors" in eectl(f"{line} --cost latency", code=1)[1]
    write_bench(work / "other.json", work / "m.safetensors", checkpoint="another")
    assert "measured with another checkpoint" in eectl(f"{line} --cost latency --bench other.json", code=1)[1]
    write_bench(work / "times.json", work / "m.safetensors")
    assert "batch sizes 1, 32; pick one" in eectl(f"{line} --cost latency --bench times.json", code=1)[1]
    assert "no times at batch size 8" in eectl(f"{line} --cost latency:8 --bench times.json", code=1)[1]
    assert "--cost macs counts MACs; add --cost latency" in eectl(f"{line} --bench times.json", code=1)[1]
    assert "did you mean 'latency'" in eectl(f"{line} --cost latenzy", code=1)[1]
    line = "calibrate-thresholds m.safetensors -o times.json --overwrite --cost latency:1 --bench times.json"
    assert "is read by this command" in eectl(line, code=1)[1]
    assert not (work / "never.json").exists()
