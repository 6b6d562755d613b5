"""The benchmarks run at toy size and say what they measured; their stop-watch and scales are checked. Nothing here is timed."""

import importlib
import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eectl.exits.policy import choose

FOLDER = Path(__file__).parent / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark as it is when it is run: its folder comes first, and its neighbours' plain names stay its own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = dict(sys.modules)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


def test_turns_are_interleaved_after_a_warm_up_of_each(load):
    measuring, calls = load("measuring"), []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 0.25}
    samples = measuring.interleave(functions, repeats=2, wait=lambda: calls.append("|"))
    assert "".join(calls).replace("|a|", "a").replace("|b|", "b") == "ababab"
    assert len(samples["a"]) == 2 and samples["b"] == [0.25, 0.25]
    assert measuring.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert measuring.ratio([2.0, 30.0, 8.0], [1.0, 3.0, 4.0]) == 2.0  # of the ratios 2, 10, 2


def test_a_childs_peak_memory_is_its_own(load):
    measuring = load("measuring")
    small = measuring.run_child(measuring.CHILD, [])
    large = measuring.run_child(measuring.CHILD + "x = b'1' * 300_000_000\ndel x", [])
    assert 290e6 < large["peak_bytes"] - small["peak_bytes"] < 310e6
    assert "argparse" not in small["modules"] and "json" in small["modules"] and "torch" not in small["modules"]


def test_the_sweep_agrees_with_the_grid(load, tmp_path, capsys):
    found = load("sweep").main(["--quick", "--json", "--out", str(tmp_path / "sweep.json")])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "sweep.json").read_text()) == found
    assert (found["benchmark"], found["schema"], found["settings"]["quick"]) == ("sweep", 1, True)
    results = found["results"]
    assert results["same_hits_and_costs"] and results["thresholds_compared"] == 5 and results["distinct_thresholds"] > 500
    assert {"read and reduce", "sweep and all budgets", "grid", "after reading"} <= set(results["seconds"])


def test_networks_are_timed_beside_their_libraries(load):
    found = load("adapters").main(["--quick", "--networks", "timm/mobilevit_xxs", "hf/mpnet"])["results"]
    assert [found[name]["blocks"] for name in ("timm/mobilevit_xxs", "hf/mpnet")] == [10, 6]
    assert all(share > 0 for each in found.values() for share in each["of_library"].values())


def test_both_passes_that_are_timed_give_the_same(load):
    for name in ("timm/pvt_v2_b0", "hf/llama", "hf/dinov2"):
        backbone, inputs, own = load("adapters").build(name, 4)
        with torch.inference_mode():
            assert torch.equal(backbone.eval()(inputs), own(inputs))


def test_training_says_what_it_measured_and_nothing_of_where(load, capsys):
    found = load("training").main(["--quick", "--recipes", "fashion-mnist-vit-t"])
    assert "share_of_floor / eectl: " in capsys.readouterr().out
    (results,) = found["results"].values()
    assert results["exits"] == 3 and results["rows"] == 16
    assert set(results["share_of_floor"]) == {"eectl", "eectl, bf16", "clean float32 loop of all exits"}
    assert all(value > 0 for value in results["images_per_second"].values())
    assert results["share_of_fastest_plain"]["eectl"] <= results["share_of_floor"]["eectl"]
    machine = found["machine"]
    assert {"cpu", "cores", "ram_gb", "versions", "eectl", "threads", "gpu"} <= set(machine)
    assert "torch" in machine["versions"]
    text = json.dumps(found)
    assert platform.node() not in machine.values() and str(Path.home()) not in text and str(FOLDER.parents[1]) not in text


def test_early_exit_spreads_the_rows_and_says_what_it_got(load, capsys):
    early_exit = load("early_exit")
    confidences = torch.rand(3, 300, generator=torch.Generator().manual_seed(0))
    thresholds = early_exit.spread(list(confidences))
    assert torch.bincount(choose(confidences, thresholds)).tolist() == [100, 100, 100]
    (found,) = early_exit.main(["--quick"])["results"].values()
    assert "resnet18 / batch size 4 / early_exit / refill / of_reachable: " in capsys.readouterr().out
    for size in (1, 4):
        speed = found[f"batch size {size}"]
        assert set(speed["early_exit"]) == ({"exit"} if size == 1 else {"exit", "refill"})
        for run in speed["early_exit"].values():
            assert sum(run["left"]) == speed["num_rows"] and run["left"][0] >= 1
            mix = sum(count * prefix for count, prefix in zip(run["left"], speed["prefix_seconds"], strict=True))
            assert run["of_reachable"] == pytest.approx(mix / speed["num_rows"] / run["seconds"])


def test_the_authors_heads_are_scaled_to_the_wanted_share(load):
    scale = load("peer_exits")._scale
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    for wanted in (10, 100):
        sure = (logits * scale(logits, wanted)).softmax(dim=1).amax(dim=1) > 0.5
        assert int(sure.sum()) == wanted


def test_what_an_optimisation_changes_is_seen(load, capsys):
    """Channels last may change last bits; a repetition may change none, and says so."""
    results = load("same_results").main(["--quick", "--epochs", "1"])["results"]
    capsys.readouterr()
    assert results["same_weights"]["none, again"] and results["same_weights"]["features kept in phase 3"]
    assert len(results["accuracy_mean_of_exits"]["channels last"]) == 1 and results["std_over_seeds"] is None
    assert results["mean_difference"]["none, again"] == 0


def test_what_runs_on_a_device_is_told_apart(load):
    """By hand, on tensors without values: five launches, a copy each way, two reads, and two tensors made here."""
    tally = load("counting").Tally("meta")
    with tally, torch.inference_mode():
        there = torch.arange(6).to("meta")  # made here, copied there
        there.view(2, 3).t()[None].unsqueeze_(0).detach()  # other names of the same memory
        assert there.new_empty(3).shape == (3,)
        mask = there > 2
        there.add_(1)
        assert torch.equal((there.view(2, 3) @ there.view(3, 2)).cpu(), torch.zeros(2, 2, dtype=torch.int64))
        assert there.sum().item() == 0 and not bool(mask.any())
        with pytest.raises(NotImplementedError):  # what needs values cannot be hidden
            there[mask]
    found = tally.table([""])[""]
    assert found == {
        "launches": 5, "to_device": 1, "to_host": 1, "reads": 2, "data_dependent_shapes": 0, "host_operations": 2,
    }  # fmt: skip


def test_launches_of_a_step_are_those_of_its_parts(load, capsys):
    (found,) = load("launches").main(["--quick", "--recipes", "cifar100-vit-t"])["results"].values()
    assert "training step / forward / launches: " in capsys.readouterr().out
    step = found["training step"]
    parts = [part for part in step if part != "whole"]
    assert step["whole"]["launches"] == sum(step[part]["launches"] for part in parts) > 100
    assert step["optimizer"]["launches"] == 2  # all step counters, all parameters
    assert step["augment"]["to_device"] == 1 / found["steps"]  # one copy a window
    replayed = found["training step by the host, recorded"]
    assert replayed["rest"]["launches"] == 5  # learning rate, step number, two inputs copied, one replay
    for where in (step["whole"], replayed["whole"], found["evaluation"]["batch"]):
        assert where["reads"] == where["data_dependent_shapes"] == where["to_host"] == 0
    assert found["evaluation"]["end of the pass"]["to_host"] == 1
    exits, early = found["early exit"]["exits"], found["early exit"]
    assert early["exact sizes"]["reads"] == exits - 1  # it asks once an exit
    for where in (early["programs"], early["programs by the host, recorded"]):
        assert where["reads"] == where["data_dependent_shapes"] == 0 and where["to_host"] == exits - 1
    assert early["programs by the host, recorded"]["launches"] < early["programs"]["launches"] / 2


def test_in_little_time_what_is_worth_most_runs(load, capsys):
    everything = load("everything")
    part, now = everything.Part, [100.0]
    parts = [part("a", "s", (), 40), part("long", "s", (), 60), part("b", "s", (), 30), part("c", "s", (), 30)]
    begun = []
    for each, limit in everything.fitting(parts, 90, clock=lambda: now[0]):
        begun.append((each.name, limit))
        now[0] += 35
    assert begun == [("a", 80), ("b", 55)]  # 90 s are left, then 55, then 20
    said = capsys.readouterr().out
    assert "long: skipped, about 60 s and 55 s left" in said and "c: skipped" in said
    assert {each.script for each in everything.PARTS} <= set(NAMES)
    assert len({each.name for each in everything.PARTS}) == len(everything.PARTS)


def test_a_run_is_killed_once_it_has_saved_and_its_bits_are_compared(load, tmp_path):
    same_bits = load("same_bits")
    state = tmp_path / "resume" / "state.safetensors"
    saves = f"import pathlib, time; p = pathlib.Path({str(state)!r}); p.parent.mkdir(); p.write_text('x'); time.sleep(60)"
    assert same_bits.run_and_kill([sys.executable, "-c", saves], tmp_path)
    assert not same_bits.run_and_kill([sys.executable, "-c", ""], tmp_path)  # it ends by itself
    for name, value in (("one", 1.0), ("two", 1.0 + 2**-23)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.tensor([value]), "b": torch.ones(2)}, tmp_path / name / "model.safetensors")
    assert same_bits.differ(tmp_path / "one", tmp_path / "two") == 1
    assert same_bits.differ(tmp_path / "one", tmp_path / "one") == 0


SUPPORT = ("counting", "measuring", "machine", "synthetic", "peer", "peer_exits")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SUPPORT])
def test_every_script_stands_in_the_readme(name):
    assert f"`{name}.py`" in (FOLDER / "README.md").read_text() or f"/{name}.py" in (FOLDER / "README.md").read_text()
