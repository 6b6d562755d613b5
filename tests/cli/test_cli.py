"""The program as a user meets it: what goes where, exit codes, and one clear line for every mistake of theirs."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import eectl, eectl_process, environment, in_child, refused
from safetensors.torch import load_file, save_file

from eectl.cli import app as cli
from eectl.core.errors import EectlError

QUICK = ["--set", "data.limit=300", "--set", "exits.after=[1, 4]", "--epochs", "2", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small chain: a backbone, heads on it, and a trained joint network."""
    folder = tmp_path_factory.mktemp("chain")
    eectl("train", "--regime", "disjoint", "--phase", "1", *QUICK, "-o", "backbone", cwd=folder)
    eectl("train", "--regime", "joint", *QUICK, "-o", "joint", cwd=folder)
    return folder


def test_the_chain_by_hand_in_a_shell_script(work):
    """The lines of the README's second block, at small size; each names the next with real file names."""
    _, err = eectl("attach-heads", "backbone/model.safetensors", "--after", "1,4", "-o", "heads.safetensors", cwd=work)
    assert "next: eectl train --phase 3 --from heads.safetensors -o heads-trained" in err
    out, err = eectl(
        "train", "--phase", "3", "--from", "heads.safetensors", "--epochs", "2", "--device", "cpu", "-o", "d", cwd=work
    )
    assert "phase 3: heads on the frozen backbone" in err
    assert "own head" in out
    assert "next: eectl calibrate-thresholds d/model.safetensors --budgets 25,50,75,100 -o d/policy.json" in err
    before, after = load_file(work / "backbone" / "model.safetensors"), load_file(work / "d" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    out, err = eectl("calibrate-thresholds", "d/model.safetensors", cwd=work)
    assert "next: eectl evaluate d/model.safetensors --policy d/policy.json" in err
    out, err = eectl("evaluate", "d/model.safetensors", "--policy", "d/policy.json", "--plot", "curve.png", cwd=work)
    assert "unlimited" in out
    assert (work / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (work / "d").iterdir()} - {"tensorboard"} == {
        "recipe.yaml", "metrics.jsonl", "results.csv", "curves.png", "phase-3.safetensors", "model.safetensors", "policy.json",
        "resume",
    }  # fmt: skip


def test_the_users_second_line(work):
    """`eectl evaluate ckpt.safetensors --budgets 25,50,75,100`, exactly, in a folder that holds that file."""
    (work / "ckpt.safetensors").write_bytes((work / "joint" / "model.safetensors").read_bytes())
    out, _ = eectl("evaluate", "ckpt.safetensors", "--budgets", "25,50,75,100", cwd=work)
    first = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [word for word in first if word.endswith("%") or word == "unlimited"] == ["25%", "50%", "75%", "100%", "unlimited"]


@pytest.mark.process
def test_json_on_stdout_is_nothing_but_json(work):
    """As a process, whose stdout also has what libraries and C code write there."""
    found = json.loads(eectl_process("evaluate", "joint/model.safetensors", "--json", cwd=work)[0])
    assert eectl_process("evaluate", "nothing.safetensors", "--json", cwd=work, code=1)[0] == ""
    assert (found["kind"], found["schema"], found["protocol"]) == ("evaluation", 1, "calibrated")
    assert [entry["budget"] for entry in found["budgets"]] == [25, 50, 75, 100, None]
    costs = json.loads(eectl("flops", "joint/model.safetensors", "--json", cwd=work)[0])
    assert [entry["cost"] for entry in costs["exits"]] == [entry["cost"] for entry in found["exits"]]
    about = json.loads(eectl("info", "joint/model.safetensors", "--json", cwd=work)[0])
    assert about["weights"] == found["checkpoint"]


def test_an_evaluations_file_is_what_report_reads(work):
    out, err = eectl("evaluate", "joint/model.safetensors", "--json", "-o", "e.json", cwd=work)
    assert json.loads((work / "e.json").read_text()) == json.loads(out)
    assert "next: eectl report e.json" in err
    found = json.loads(out)
    assert (found["origin"]["recipe"]["seed"], found["origin"]["after"], len(found["grid"]["values"])) == (0, [1, 4], 100)
    rows = list(csv.DictReader(eectl("report", "e.json", "--format", "csv", cwd=work)[0].splitlines()))
    assert [(row["regime"], row["budget_percent"]) for row in rows[-2:]] == [("joint", "100"), ("joint", "unlimited")]
    assert rows[-1]["mean"] == f"{100 * found['exits'][-1]['value']:.2f}"


def test_saved_predictions_stand_in_for_the_pass(work):
    eectl("evaluate", "joint/model.safetensors", "--save-predictions", "test.safetensors", cwd=work)
    eectl("calibrate-thresholds", "joint/model.safetensors", "--save-predictions", "cal.safetensors", "-o", "p.json", cwd=work)
    eectl("calibrate-thresholds", "joint/model.safetensors", "--predictions", "cal.safetensors", "-o", "q.json", cwd=work)
    assert (work / "p.json").read_text() == (work / "q.json").read_text()
    with_pass = eectl("evaluate", "joint/model.safetensors", "--policy", "p.json", cwd=work)[0]
    assert (
        eectl("evaluate", "joint/model.safetensors", "--policy", "p.json", "--predictions", "test.safetensors", cwd=work)[0]
        == with_pass
    )


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_reproduce_one_processs_predictions(work):
    """359 test rows on two processes: the same rows in the same order."""
    eectl("evaluate", "joint/model.safetensors", "--save-predictions", "one.safetensors", "--overwrite", cwd=work)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "eectl", "evaluate"]
    line += ["joint/model.safetensors", "--device", "cpu", "--save-predictions", "two.safetensors"]
    done = subprocess.run(line, cwd=work, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("unlimited") == 2  # one process prints: once in each table
    one, two = load_file(work / "one.safetensors"), load_file(work / "two.safetensors")
    assert one["logits"].shape == (3, 359, 10)
    assert torch.equal(one["labels"], two["labels"])
    torch.testing.assert_close(one["logits"], two["logits"], rtol=1e-4, atol=1e-4)


def test_dry_run_writes_nothing(tmp_path):
    out, _ = eectl("train", "digits", "--regime", "separate", "--dry-run", cwd=tmp_path)
    assert "lr: 0.003" in out
    assert "trains segment 1–2, head 1–2" in " ".join(out.split())
    assert "2.53 M MACs" in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_fetches_no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    changes = ["--set", "backbone.name=resnet18", "--set", "backbone.pretrained=true"]
    out, err = eectl("flops", "digits", *changes, cwd=tmp_path)
    assert "plain" in out and "ownload" not in err
    out, _ = eectl("train", "digits", *changes, "--dry-run", cwd=tmp_path)
    assert "pretrained: true" in out
    assert list(tmp_path.iterdir()) == []


def test_version_and_recipes():
    assert eectl("--version")[0].startswith("eectl 0.")
    listed = eectl("recipes")[0]
    assert "digits" in listed
    assert "fashion-mnist-resnet20" in listed
    assert eectl("recipes", "digits")[0] == (Path(__file__).parents[2] / "recipes" / "digits.yaml").read_text()


CHECKPOINT_VERBS = [("evaluate",), ("bench",), ("calibrate-thresholds", "-o", "never.json"), ("flops",), ("info",),
                    ("attach-heads", "--after", "1", "-o", "never.safetensors")]  # fmt: skip


@pytest.mark.parametrize("verb", CHECKPOINT_VERBS, ids=lambda verb: verb[0])
def test_checkpoints_that_cannot_be_read(verb, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = work / "joint" / "model.safetensors"
    whole = good.read_bytes()
    name, *rest = verb

    def say(path):
        line = refused(name, path, *rest)
        assert line.startswith(f"eectl: {path}: ") and line.count("\n") == 1, line
        return line

    assert "No such file" in say("missing.safetensors")
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut short" in say("cut.safetensors")
    Path("text.safetensors").write_text("not a checkpoint")
    assert "not a safetensors file" in say("text.safetensors")
    save_file({"w": torch.zeros(2)}, "foreign.safetensors")
    assert "eectl did not write" in say("foreign.safetensors")
    Path("newer.safetensors").write_bytes(whole.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'))
    assert "schema 9" in say("newer.safetensors")
    if name not in ("info",):  # which reads no weights
        Path("altered.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert "altered or damaged" in say("altered.safetensors")
    assert "a folder" in say(".") or name == "flops"
    assert {path.name for path in tmp_path.iterdir()} <= {
        f"{n}.safetensors" for n in ("cut", "text", "foreign", "newer", "altered")
    }


def test_exits_that_do_not_fit(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = work / "backbone" / "model.safetensors"
    cases = {
        ("--after", "1,16"): "exits.after[1] is 16; resnet20 takes exits after blocks 0–8",
        ("--after", "2,2"): "--after 2,2: 2 stands twice; give each block once",
        ("--after", "01,1"): "'01' is not a block; give block numbers from 0",
        ("--after", "a"): "--after a: 'a' is not a block; give block numbers from 0",
        ("--after", "-1"): "give block numbers",
        ("--placement", "evry-2"): "attach-heads: placement: is 'evry-2'; no such placement (did you mean 'every-2'?)",
        ("--placement", "every-99"): "puts no exit on a network of 9 blocks",
        ("--after", "1", "--placement", "every-2"): "either --after",
        (): "either --after",
        ("--after", "1", "--head", "liner"): "did you mean 'linear'?",
    }
    for options, words in cases.items():
        assert words in refused("attach-heads", backbone, *options, "-o", "x.safetensors")
    line = refused("train", "--set", "exits.after=[2, 99]", "-o", "run")  # said before phase 1, not after it
    assert "exits.after[1] is 99; resnet20 takes exits after blocks 0–8" in line
    assert list(tmp_path.iterdir()) == []


def test_the_last_block_is_allowed_with_a_word(work):
    _, err = eectl("attach-heads", "backbone/model.safetensors", "--after", "2,8", "-o", "last.safetensors", cwd=work)
    assert any("exit 2" in line and "last block, 8" in line for line in err.splitlines())


@pytest.mark.parametrize(
    ("budgets", "words"),
    [("", "not a budget"), ("a,b", "'a' is not a budget"), ("25,0", "'0' is not a budget"), ("-5", "'-5'"), ("1001", "'1001'"),
     ("nan", "'nan'"), ("25,,50", "'' is not a budget"), ("25,25", "25 stands twice")],
)  # fmt: skip
def test_budgets(budgets, words, work):
    assert words in refused("evaluate", work / "joint" / "model.safetensors", f"--budgets={budgets}")


def test_outputs_that_exist(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    joint = work / "joint" / "model.safetensors"
    for name in ("p.json", "c.png", "x.safetensors"):
        Path(name).write_text("mine")
    for line in [
        ("calibrate-thresholds", joint, "-o", "p.json"),
        ("evaluate", joint, "--plot", "c.png"),
        ("evaluate", joint, "-o", "p.json"),
        ("evaluate", joint, "--save-predictions", "x.safetensors"),
        ("attach-heads", joint, "--after", "1", "-o", "x.safetensors"),
    ]:
        assert "--overwrite" in refused(*line)
    assert all(path.read_text() == "mine" for path in tmp_path.iterdir())
    assert "holds a run; --resume" in refused("train", *QUICK, "-o", work / "joint")


def test_files_of_another_checkpoint(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    joint = work / "joint" / "model.safetensors"
    eectl("attach-heads", joint, "--after", "1,4", "-o", "other.safetensors", cwd=tmp_path)
    eectl("calibrate-thresholds", "other.safetensors", "-o", "p.json", "--save-predictions", "cal.safetensors", cwd=tmp_path)
    eectl("evaluate", "other.safetensors", "--save-predictions", "test.safetensors", cwd=tmp_path)
    assert "p.json was made for another" in refused("evaluate", joint, "--policy", "p.json")
    assert "test.safetensors was made by another checkpoint" in refused("evaluate", joint, "--predictions", "test.safetensors")
    assert "cal.safetensors was made by another checkpoint" in refused(
        "calibrate-thresholds", joint, "--predictions", "cal.safetensors", "-o", "q.json"
    )
    assert "holds the calibration split" in refused("evaluate", "other.safetensors", "--predictions", "cal.safetensors")
    assert "no thresholds for 30%" in refused("evaluate", "other.safetensors", "--policy", "p.json", "--budgets", "30")
    assert "leave out --criterion" in refused("evaluate", "other.safetensors", "--policy", "p.json", "--criterion", "margin")
    Path("p.json").write_text(Path("p.json").read_text()[:50])
    assert "cut short" in refused("evaluate", "other.safetensors", "--policy", "p.json")


def test_untrained_exits_are_pointed_out(work):
    eectl("attach-heads", "joint/model.safetensors", "--after", "0,3", "-o", "untrained.safetensors", cwd=work)
    assert "note: exits 1, 2 were never trained" in eectl("evaluate", "untrained.safetensors", cwd=work)[1]


def test_recipes_that_are_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("optimzer: {}\nepochs: many\noptimizer: {lr: -1}\n")
    err = refused("train", "r.yaml", "-o", "run")
    facts = ("optimizer.lr: is -1", "1e-12"), ("epochs: is 'many'", "integer"), ("optimzer: ", "'optimizer'")
    for line, (place, allowed) in zip(err.splitlines(), facts, strict=True):
        assert line.startswith(f"eectl: r.yaml: {place}") and allowed in line
    Path("twice.yaml").write_text("epochs: 1\nepochs: 2\n")
    assert "twice.yaml:2:1: key 'epochs'" in refused("train", "twice.yaml", "-o", "run")
    assert "--phase 4: regime joint" in refused("train", "--regime", "joint", "--phase", "4", "-o", "run")
    assert "did you mean 'mixed'" in refused("train", "--regime", "mixd", "-o", "run")
    assert "unknown backbone 'resnet19'" in refused("train", "--set", "backbone.name=resnet19", "-o", "run")
    assert "unknown data set 'cifar'" in refused("train", "--set", "data.name=cifar", "-o", "run")
    assert "--device gpu" in refused("train", "--device", "gpu", "-o", "run")
    assert "cifar10 is looked for in" in refused("train", "--set", "data.name=cifar10", "-o", "run")
    assert not Path("run").exists()


def test_an_output_is_never_an_input_nor_another_output(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (work / "joint" / "model.safetensors").read_bytes()
    Path("m.safetensors").write_bytes(whole)
    for line in [
        ("evaluate", "m.safetensors", "--save-predictions", "m.safetensors", "--overwrite"),
        ("calibrate-thresholds", "m.safetensors", "-o", "m.safetensors", "--overwrite"),
        ("attach-heads", "m.safetensors", "--after", "1", "-o", "./m.safetensors", "--overwrite"),
    ]:
        assert "is read by this command" in refused(*line)
    line = ("calibrate-thresholds", "m.safetensors", "-o", "x", "--save-predictions", "x")
    assert "named for two outputs" in refused(*line)
    assert Path("m.safetensors").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"eectl":"{', b'"eectl":"[', "its header: not JSON"),
        (b'\\"recipe\\"', b'\\"recipx\\"', "header is damaged, or of another eectl: recipe: Field required"),
        (b'\\"num_outputs\\"', b'\\"num_outputz\\"', "header is damaged, or of another eectl: model.num_outputs"),
    ],
)
def test_a_damaged_header_is_one_line(old, new, words, work, tmp_path):
    path = tmp_path / "m.safetensors"
    whole = (work / "joint" / "model.safetensors").read_bytes()
    assert whole.count(old) >= 1
    path.write_bytes(unsealed(whole.replace(old, new, 1)))
    for verb in ("info", "evaluate"):
        assert words in refused(verb, path)
    path.write_bytes(whole.replace(old, new, 1))
    assert refused("info", path).startswith(f"eectl: {path}: ")


def unsealed(checkpoint):
    """The bytes of a checkpoint whose header has no digest, as those that another tool wrote."""
    assert checkpoint.count(b'\\"digest\\"') == 1
    return checkpoint.replace(b'\\"digest\\"', b'\\"digesT\\"')


def test_a_recipe_of_another_version_stops_no_measuring(work, tmp_path):
    """A key that this version does not take: measuring goes on, training from it names the key."""
    whole = (work / "joint" / "model.safetensors").read_bytes()
    path = tmp_path / "m.safetensors"
    path.write_bytes(unsealed(whole.replace(b'\\"precision\\"', b'\\"precisioN\\"', 1)))
    assert "unlimited" in eectl("evaluate", path)[0]
    assert "precisioN: no such key" in refused("train", "--from", path, "-o", tmp_path / "run")


def test_set_is_for_recipes(work):
    assert "--set" in refused("flops", work / "joint" / "model.safetensors", "--set", "a=1")


@pytest.mark.slow
@pytest.mark.process
def test_signals_before_and_outside_of_training(work):
    """While torch is being imported, early and late, and after it. `-X importtime` says on stderr what has just been imported."""
    line = [sys.executable, "-X", "importtime", "-m", "eectl", "evaluate", "joint/model.safetensors"]
    for number, code, module in (
        (signal.SIGINT, 130, "torch._utils"),
        (signal.SIGTERM, 143, "torch.nn"),
        (signal.SIGINT, 130, "torch"),
    ):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(line, cwd=work, env=environment(), text=True, **pipes) as process:
            assert any(line.rstrip().endswith(f" {module}") for line in process.stderr)
            process.send_signal(number)
            said = process.stderr.read()
        assert process.returncode == code
        assert f"eectl: stopped by {signal.Signals(number).name}; nothing is left half-written" in said


def test_usage_mistakes_exit_with_2():
    for line in (["trian"], ["train", "--nope"], ["evaluate"], ["train", "--phase", "0"], ["train", "--epochs", "x"]):
        refused(*line, code=2)


def test_an_output_that_cannot_be_written(work, tmp_path):
    (tmp_path / "file").write_text("")
    err = refused("calibrate-thresholds", work / "joint" / "model.safetensors", "-o", tmp_path / "file" / "p.json")
    assert "cannot be written" in err


def test_an_evaluation_and_its_picture_are_written_both_or_none(work, tmp_path, monkeypatch):
    """The picture fits on the disk and the numbers do not."""
    monkeypatch.chdir(tmp_path)
    joint = work / "joint" / "model.safetensors"
    eectl("evaluate", joint, "--save-predictions", "test.safetensors", "-o", "e.json", "--plot", "c.pdf")
    before = {name: Path(name).read_bytes() for name in ("test.safetensors", "e.json", "c.pdf")}
    line = ["evaluate", joint, "--predictions", "test.safetensors", "--budgets", "30,60", "-o", "e.json", "--plot", "c.pdf"]
    limit = (len(before["c.pdf"]) + len(before["e.json"])) // 2
    _, err = in_child(lambda: eectl(*line, "--overwrite", code=1), most_bytes=limit)
    assert "cannot be written (File too large)" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    eectl(*line, "--overwrite")
    assert all(Path(name).read_bytes() != before[name] for name in ("e.json", "c.pdf"))


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_several_lines_and_exit_code_of_an_error(monkeypatch, capsys):
    def fail(**_):
        raise EectlError("one", "two\nhalves" + "x" * 10**6, "three", exit_code=3)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    one, two, three = capsys.readouterr().err.splitlines()
    assert (one, three) == ("eectl [process 1]: one", "eectl [process 1]: three")
    assert two.startswith(r"eectl [process 1]: two\nhalvesx") and two.endswith("x") and " … " in two and len(two) < 3000
