"""`eectl report` as a user meets it: where evaluations are found, what is refused in one line, and what is written."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import made, save

from eectl.cli import app as cli
from eectl.core.errors import EectlError
from eectl.evaluation.results import read_evaluation, write_evaluation
from eectl.models.build import build_model
from eectl.models.checkpoint import About, save_checkpoint
from eectl.recipe.recipe import ModelSpec
from eectl.reports.report import summarize


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two seeds of two regimes as run folders, and a run that was not evaluated."""
    monkeypatch.chdir(tmp_path)
    for regime in ("joint", "mixed"):
        for seed in (0, 1):
            run = made((0.5, 0.6, 0.7 + seed / 10), regime=regime, seed=seed)
            save(run, Path("runs", f"{regime}-{seed}", "evaluation.json"))
    Path("runs/backbone").mkdir()
    return tmp_path


def run_report(*arguments, monkeypatch, capsys, code=0):
    monkeypatch.setattr(sys, "argv", ["eectl", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    return out, err


@pytest.fixture
def report(monkeypatch, capsys):
    return lambda *arguments, code=0: run_report(*arguments, monkeypatch=monkeypatch, capsys=capsys, code=code)


def test_a_folder_of_runs(folder, report):
    out, err = report(*sorted(Path("runs").iterdir()), "--json", "-o", "t.md", "-o", "deep/c.svg", "-o", "t.tex")
    found = json.loads(out)
    assert [(row["regime"], row["seeds"]) for row in found["rows"]] == [("joint", [0, 1]), ("mixed", [0, 1])]
    assert found["rows"][0]["cells"][2]["mean"] == pytest.approx(0.75)
    assert err.splitlines()[0] == (
        "runs/backbone: left out, there is no evaluation.json; eectl evaluate runs/backbone/model.safetensors -o "
        "runs/backbone/evaluation.json writes it"
    )
    assert err.splitlines()[1:] == ["t.md: written", "deep/c.svg: written", "t.tex: written"]
    assert "| joint | 2 |" in Path("t.md").read_text() and r"\toprule" in Path("t.tex").read_text()
    assert Path("deep/c.svg").read_text().startswith("<?xml")


def test_files_labels_and_published(folder, report):
    files = [f"runs/{name}/evaluation.json" for name in ("joint-0", "mixed-0", "mixed-1")]
    out, _ = report(*files, "--label", "runs/mixed-*=1L", "--published", "20", "--format", "csv")
    assert out.splitlines()[1:3] == [  # the paper's variant first, then what it does not have
        "1L,mixed,25,2,50.00,0.00,20.00,82.21,0.08", "1L,mixed,50,2,60.00,0.00,45.00,83.20,0.39",
    ]  # fmt: skip
    assert ",joint,25,1,50.00,,20.00,," in out.splitlines()
    assert "2L-2048" in report("--list-published")[0]


REFUSED = [
    ([], "report: name the runs, such as runs/*"),
    (["runs"], "runs is a folder of runs; name the runs in it, as runs/*"),
    (["runs/backbone"], "there is nothing to report; run eectl evaluate CKPT -o RUN/evaluation.json"),
    (["runs/nowhere"], "runs/nowhere: no such file or folder"),
    (["notes.txt"], "notes.txt: not a run; name run folders"),
    (["policy.json"], "policy.json: not an evaluation of eectl's (it says it is a policy)"),
    (["broken.json"], "broken.json: budgets.0.value: Input should be a valid number"),
    (["cut.json"], "cut.json: not JSON, or cut short"),
    (["runs/joint-0", "runs/joint-0"], "runs/joint-0 and runs/joint-0 are both seed 0 of joint; give each seed once"),
    (["runs/joint-0", "mnist.json"], "do not belong in one table: data.name is digits and mnist; report them apart"),
    (["runs/joint-0", "--label", "x"], "--label x: write it as PATTERN=TEXT"),
    (["runs/joint-0", "--label", "x=y"], "--label x=y: no run's name fits the pattern; the first run is runs/joint-0"),
    (["runs/joint-0", "--published", "2"], "unknown published table '2'"),
    (["runs/joint-0", "--lookup", "mean"], "unknown lookup 'mean'"),
    (["runs/joint-0", "--lookup", "average-first"], "runs/joint-0 has no values at the authors' thresholds"),
    (["runs/joint-0", "--format", "html"], "unknown format 'html'"),
    (["runs/joint-0", "-o", "t.doc"], "-o t.doc: allowed are files that end in .md, .tex, .csv, .json, .png, .pdf, .svg"),
    (["runs/joint-0", "-o", "notes.txt"], "-o notes.txt: allowed are"),
    (["runs/joint-0", "-o", "mine.md"], "mine.md exists; give another name, or --overwrite"),
    (["runs/joint-0", "-o", "runs/joint-0/evaluation.json", "--overwrite"], "is read by this command"),
    (["runs/joint-0", "-o", "a.md", "-o", "./a.md"], "named for two outputs"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refused_in_one_line(folder, report, arguments, words):
    Path("notes.txt").write_text("x")
    Path("mine.md").write_text("mine")
    Path("policy.json").write_text('{"kind": "policy", "schema": 1}')
    run = made((0.5, 0.6, 0.7))
    write_evaluation(Path("old.json"), run.evaluation)
    save(made((0.5, 0.6, 0.7), recipe=["data.name=mnist"]), Path("mnist.json"))
    text = Path("old.json").read_text()
    Path("cut.json").write_text(text[:200])
    broken = json.loads(text)
    broken["budgets"][0]["value"] = "x"
    Path("broken.json").write_text(json.dumps(broken))
    before = sorted(folder.rglob("*"))
    out, err = report(*arguments, code=1)
    lines = [line for line in err.splitlines() if "left out" not in line]
    assert out == "" and len(lines) == 1 and words in lines[0]
    assert sorted(folder.rglob("*")) == before and Path("mine.md").read_text() == "mine"


def test_an_evaluation_belongs_to_the_checkpoint_beside_it(folder):
    run = made((0.5, 0.6, 0.7), regime="mixed", seed=7)
    spec = ModelSpec.model_validate({"backbone": {"name": "resnet20"}, "input_shape": (1, 8, 8), "num_outputs": 10})
    splits = {"test": {"size": 10, "fingerprint": "recorded"}}
    about = About(spec, run.origin.recipe, {"name": "digits", "classes": []}, splits, [])
    digest = save_checkpoint(Path("run/model.safetensors"), build_model(spec), about)
    old = replace(run.evaluation, checkpoint=digest)
    write_evaluation(Path("run/evaluation.json"), old)
    for source in ("run", "run/model.safetensors", "run/evaluation.json"):
        (row,) = summarize([Path(source)], say=print).rows
        assert (row.regime, row.seeds) == ("mixed", (7,))
    write_evaluation(Path("run/evaluation.json"), replace(old, checkpoint="another"))
    for source in ("run", "run/model.safetensors"):
        with pytest.raises(EectlError, match=r"evaluation\.json was made for another checkpoint .* --overwrite"):
            summarize([Path(source)], say=print)
    Path("run/evaluation.json").unlink()
    with pytest.raises(EectlError, match=r"there is no evaluation.json beside it; run eectl evaluate run/model\.safetensors -o"):
        summarize([Path("run/model.safetensors")], say=print)


def test_an_evaluation_reads_back_as_it_was(tmp_path):
    run = made((None, 0.6, 0.7), grid=[(0.2, 0.5), (1.1, 0.9)])
    assert read_evaluation(save(run, tmp_path / "e.json")) == run.evaluation


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_compiles(folder, report):
    report("runs/joint-0", "runs/mixed-0", "--published", "10", "--label", r"*joint*=a_b & 5% {#}\^~$", "-o", "t.tex")
    Path("doc.tex").write_text("\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n\\input{t}\n\\end{document}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "doc.tex"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-800:]
