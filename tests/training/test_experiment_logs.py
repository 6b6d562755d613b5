"""Experiment trackers: their own readers find the numbers of metrics.jsonl, once each, after a stop or a kill too."""

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from forked import ended, kill, start_child

from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.training import experiment_logs as module
from eectl.training.experiment_logs import ExperimentLogs, LogState, choose_trackers, numbers_of
from eectl.training.log_adapters import LOG_ADAPTERS, LoggedRun
from eectl.training.run_folder import RunFolder
from eectl.training.train import train
from tests.training.test_train import same, torchrun, weights

VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"
PHASES = ("regime=mixed", "epochs=2", "exits.after=[0]", VIT)
LONGER = ("epochs=3", "patience=3", "exits.after=[0]", VIT)


def run(small, out, tracker, **how):
    train(small(*PHASES), out=out, device="cpu", quiet=True, track_to=tracker, **how)
    return out


def expected(folder):
    """Numbers by name and step, all phases counted, from metrics.jsonl by hand."""
    found, before, phase, step = defaultdict(dict), 0, None, 0
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if row["phase"] != phase:
            before, phase = step, row["phase"]
        step = before + row["step"]
        for name in ("train_loss", "validation_loss", "validation_score"):
            for number, value in enumerate(row[name], 1):
                if value is not None:
                    found[f"{name}/exit_{number}"][step] = value
        for name in ("lr", "epoch", "phase", "improved", "seconds"):
            found[name][step] = float(row[name])
    return found


def final_scores(folder):
    """The score of each exit of the network that the run leaves, by the name and the step that it is logged under."""
    from eectl.models.checkpoint import read_about

    scores = read_about(folder / "model.safetensors").history[-1]["validation"]["score"]
    last = max(expected(folder)["lr"])
    return {f"final/score/exit_{number}": {last: score} for number, score in enumerate(scores, 1)}


def check(found, folder, *, seconds=True):
    """Compare pairs (step, value) by name with what the run wrote; an epoch that was redone took other `seconds`."""
    for name, values in (expected(folder) | final_scores(folder)).items():
        assert [step for step, _ in found[name]] == sorted(values), name
        if name != "seconds" or seconds:
            assert [value for _, value in found[name]] == pytest.approx([values[step] for step in sorted(values)], rel=1e-6), name


def tensorboard_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def wandb_of(folder):
    from wandb.proto import wandb_internal_pb2

    found = defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of(path.read_bytes()):
            history = wandb_internal_pb2.Record.FromString(data).history
            for item in history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    found[name].append((history.step.num, json.loads(item.value_json)))
    return found


def records_of(data):
    """The records of a file in LevelDB's log format, which wandb's offline files have after seven bytes of their own."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def mlflow_of(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (one,) = client.search_runs([client.get_experiment_by_name("eectl").experiment_id])
    assert one.data.params["optimizer.name"] == "adamw" and one.data.params["regime"] == "mixed"
    assert one.info.status == "FINISHED"
    history = {name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics}
    return {name: [(each.step, each.value) for each in values] for name, values in history.items()}


def trackio_of(_folder):
    found = defaultdict(list)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "eectl.db") as base:
        for step, text in base.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(text).items():
                found[name].append((step, value))
    return found


READERS = {"tensorboard": tensorboard_of, "wandb": wandb_of, "mlflow": mlflow_of, "trackio": trackio_of}


@pytest.fixture(params=list(READERS))
def tracker(request, monkeypatch, tmp_path):
    """A tracker that is installed, with nothing of the user's environment, and a home of its own."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    for name in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW", "TRACKIO"))]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": "home", "WANDB_CONFIG_DIR": "home", "WANDB_CACHE_DIR": "home"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    if request.param == "trackio":
        if "trackio" in sys.modules:  # which has taken its folder when it was imported
            pytest.skip("trackio keeps one folder a process")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return request.param


def test_a_trackers_own_reader_finds_the_numbers_of_the_run(small, tmp_path, tracker):
    """Stopped in the middle of the second phase and resumed; no step twice, and the same weights as without."""
    steps = []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Display, "step", lambda _: steps.append(1) or (len(steps) == 14 and os.kill(os.getpid(), signal.SIGINT)))
        run(small, tmp_path / "run", tracker)
    run(small, tmp_path / "run", tracker, resume=True)
    check(READERS[tracker](tmp_path / "run"), tmp_path / "run")
    run(small, tmp_path / "plain", "none")
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "plain" / "model.safetensors"))
    assert not any((tmp_path / "plain" / name).exists() for name in (*READERS, "resume/logs.json"))


@pytest.mark.parametrize("known", [4, 8])
def test_what_a_kill_leaves_is_readable_and_goes_on_without_doubles(small, tmp_path, known):
    """Killed after an epoch was logged, before the resume state or even logs.json knew of it: the epoch is trained again."""
    pytest.importorskip("tensorboard")
    copy, save = tmp_path / "killed", RunFolder.save_state

    def kill(folder, state):
        if not copy.exists() and state.phase and state.phase["epoch"] == 2:
            shutil.copytree(folder.path, copy)
        save(folder, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "due", lambda _: True)
        patched.setattr(RunFolder, "save_state", kill)
        run(small, tmp_path / "whole", "tensorboard")
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 2
    found = tensorboard_of(copy)
    assert [step for step, _ in found["validation_loss/exit_1"]] == [4, 8] and "final/score/exit_1" not in found
    state = copy / "resume" / "logs.json"
    state.write_text(state.read_text().replace('"step": 8', f'"step": {known}'))
    run(small, copy, "tensorboard", resume=True)
    check(tensorboard_of(copy), copy, seconds=False)


@pytest.mark.slow
@pytest.mark.process
def test_sigkill_of_a_tracked_run_costs_no_weight_and_doubles_no_step(small, tmp_path):
    """The program, killed when two epochs were logged and when four were, each time as soon as that is seen."""
    pytest.importorskip("tensorboard")
    train(small("regime=mixed", *LONGER), out=tmp_path / "calm", device="cpu", quiet=True, track_to="none")
    folder, said = tmp_path / "run", tmp_path / "said"
    line = [
        "train",
        tmp_path / "calm" / "recipe.yaml",
        "--device",
        "cpu",
        "-q",
        "--track-to",
        "tensorboard",
        "--resume",
        "-o",
        folder,
    ]
    for wanted in (2, 4):
        child, until = start_child(*line, said=said), time.monotonic() + 100
        while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < until and not os.waitpid(child, os.WNOHANG)[0]
            time.sleep(0.002)
        kill(child)
        assert not (folder / "model.safetensors").exists() and tensorboard_of(folder)["lr"]
    assert ended(start_child(*line, said=said)) == 0
    assert same(weights(folder / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))
    check(tensorboard_of(folder), folder, seconds=False)
    assert "Traceback" not in said.read_text()


def test_a_run_that_replaces_another_has_only_its_own_numbers_and_its_recipe(small, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    train(small(*LONGER), out=tmp_path / "run", device="cpu", track_to="tensorboard")
    run(small, tmp_path / "run", "tensorboard", overwrite=True)
    check(tensorboard_of(tmp_path / "run"), tmp_path / "run")
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    said = parse_session_start_info_plugin_data(reader.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    assert said.hparams["regime"].string_value == "mixed" and said.hparams["optimizer.lr"].number_value == 1e-3


def test_a_tracker_added_on_the_way_gets_all_rows(small, tmp_path):
    pytest.importorskip("tensorboard")
    steps = []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Display, "step", lambda _: steps.append(1) or (len(steps) == 14 and os.kill(os.getpid(), signal.SIGINT)))
        run(small, tmp_path / "run", "none")
    (tmp_path / "run" / "resume" / "logs.json").write_text('{"kind": "experiment-logs", "schema": 1, "logs": {"x": 3}}')
    said = []
    run(small, tmp_path / "run", ["tensorboard"], resume=True, say=said.append)
    assert any("trackers begin new logs" in line for line in said)
    check(tensorboard_of(tmp_path / "run"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.thorough
def test_of_two_processes_the_first_logs(tmp_path):
    """Repeats of an image land on both, with a policy and drop path; once each step in the one log."""
    pytest.importorskip("tensorboard")
    changes = ["backbone={name: timm/vit_tiny_patch16_224, args: {depth: 2, embed_dim: 16, num_heads: 2, patch_size: 4}}"]
    changes += ["data.limit=150", "data.augment={rand_augment: {}, repeats: 3}", "backbone.drop_path=0.2", "exits.after=[0]"]
    sets = [part for change in changes for part in ("--set", change)]
    line = ["train", "digits", "-q", "--device", "cpu", *sets, "--regime", "mixed", "--epochs", "2", "-o", tmp_path / "run"]
    done = torchrun(*line)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    check(tensorboard_of(tmp_path / "run"), tmp_path / "run")


class Failing:
    """A log that fails with its second message, or at once."""

    key, place = "", "nowhere"

    def __init__(self, _run, *, after=1):
        self.left = after
        if not after:
            raise OSError("no\nway")

    def log(self, _step, _values):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the server is gone")

    def close(self, **_):
        raise AssertionError("it has failed, and is left alone")


@pytest.mark.parametrize(("after", "fault"), [(1, "the server is gone"), (0, "no")])
def test_a_tracker_that_fails_stops_no_training(small, tmp_path, monkeypatch, after, fault):
    monkeypatch.setitem(LOG_ADAPTERS, "tensorboard", lambda run: Failing(run, after=after))
    monkeypatch.setattr(module, "_is_installed", lambda _: True)
    said = []
    train(small(*LONGER), out=tmp_path / "run", device="cpu", track_to="tensorboard", say=said.append)
    (line,) = [line for line in said if "failed" in line]
    assert line.startswith(f"--track-to tensorboard: failed ({fault}") and "\n" not in line
    assert (tmp_path / "run" / "model.safetensors").exists()
    state = json.loads((tmp_path / "run" / "resume" / "logs.json").read_text())["logs"] if after else {"tensorboard": {"step": 4}}
    assert state["tensorboard"]["step"] == 4


def test_what_cannot_be_logged_to_is_one_line_before_anything_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_is_installed", lambda name: name != "wandb")
    for names, line in (
        ("wandb", r"--track-to wandb: not installed; pip install 'eectl\[wandb\]', or leave it out"),
        (["none", "mlflow"], "--track-to none --track-to mlflow: none excludes others"),
        ("tensorbord", r"unknown --track-to 'tensorbord' \(did you mean 'tensorboard'\?\)"),
    ):
        with pytest.raises(EectlError, match=line):
            train(small("data.name=mnist", "data.root=nowhere"), out=tmp_path / "run", track_to=names)
    assert not (tmp_path / "run").exists()
    assert choose_trackers(None) == ("tensorboard",) == choose_trackers([])
    assert choose_trackers(["mlflow", "trackio", "mlflow"]) == ("mlflow", "trackio") and choose_trackers(["none"]) == ()
    monkeypatch.setattr(module, "_is_installed", lambda _: False)
    assert choose_trackers(None) == ()


def test_a_folder_that_a_tracker_made_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "trackerlike").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not module._is_installed("trackerlike") and module._is_installed("pytest")


def test_numbers_by_name():
    tracked = {"exits": [2, 3], "cosine": [0.5, None], "norms": [[1.0, 2.0], [3.0, float("nan")]], "batches": 4, "every": 1}
    row = {"phase": 1, "step": 7, "improved": True, "train_loss": [None, 0.25], "gradient_dominance": tracked}
    assert numbers_of(row) == {
        "phase": 1.0,
        "improved": 1.0,
        "train_loss/exit_2": 0.25,
        "gradient_dominance/cosine/exit_2": 0.5,
        "gradient_dominance/norms/exit_2/segment_1": 1.0,
        "gradient_dominance/norms/exit_2/segment_2": 2.0,
        "gradient_dominance/norms/exit_3/segment_1": 3.0,
        "gradient_dominance/batches": 4.0,
        "gradient_dominance/every": 1.0,
    }


def test_steps_go_on_over_phases_and_none_is_logged_twice(tmp_path):
    seen = []

    class Seeing(Failing):
        def log(self, step, values):
            seen.append((step, values["lr"]))

    logs = ExperimentLogs()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(LOG_ADAPTERS, "wandb", Seeing)
        logs.open("wandb", LoggedRun(tmp_path, {}), state=LogState(step=4), is_asked_for=False)
    for phase, step in ((1, 2), (1, 4), (3, 2), (3, 4), (2, 2)):
        logs.epoch({"phase": phase, "step": step, "lr": phase + step / 10})
    assert seen == [(6, 3.2), (8, 3.4), (10, 2.2)]
