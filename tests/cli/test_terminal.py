"""What comes out, and what is refused: poor encodings, full disks, closed ends, hostile names, places that take no file."""

import ast
import errno
import io
import json
import os
import shlex
import subprocess
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from made_runs import made, save
from running import ROOT, eectl, environment, in_child

from eectl.cli import app as cli
from eectl.cli.options import places_starting_with
from eectl.core.console import make_console, make_table
from eectl.core.figures import render
from eectl.core.progress import Display
from eectl.core.streams import SPELLINGS, spelled, standard_streams

HOSTILE = "\x1b[31m[red]\x9b2J\u202egpj\r$a_b$\udcff"  # escapes, markup, a turned direction, a formula, half a character
SHOWN = r"\x1b[31m[red]\x9b2J\u202egpj\r$a_b$\udcff"


@contextmanager
def streams(monkeypatch, *, encoding, columns=80):
    """Stdout and stderr in this encoding; yields what came out as text."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        patched.setenv("COLUMNS", str(columns))
        yield lambda: [stream.buffer.getvalue().decode(encoding) for stream in (out, err) if not stream.flush()]


def run_main(monkeypatch, *arguments):
    """The program's exit code, with the streams as they are."""
    monkeypatch.setattr(sys, "argv", ["eectl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with the evaluations of two runs."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        save(made((0.5, 0.6, 0.7 + seed / 10), seed=seed), Path("runs", f"joint-{seed}", "evaluation.json"))
    return tmp_path


def printed_signs():
    """The characters beyond ASCII in what the program may print: in its strings, without docstrings and halves of characters."""
    for path in (ROOT / "eectl").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield from (sign for sign in node.value if not sign.isascii() and unicodedata.category(sign) != "Cs")


def test_every_sign_of_the_program_has_a_spelling():
    assert set(printed_signs()) <= set(SPELLINGS)
    assert all(text.isascii() for text in SPELLINGS.values())
    assert spelled("a ≥ 0.5 ± 1 × 2…", "ascii") == "a >= 0.5 +/- 1 x 2..."
    assert spelled("a ≥ 0.5 ± 1", "latin-1") == "a >= 0.5 ± 1"
    assert spelled("a ≥ 漢\udcff", "utf-8") == "a ≥ 漢\\udcff"


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+/-"), ("latin-1", "±"), ("utf-8", "±")])
def test_tables_in_a_poor_encoding_keep_their_columns(runs, monkeypatch, encoding, sign):
    with streams(monkeypatch, encoding=encoding) as came_out:
        assert run_main(monkeypatch, "report", "runs") == 0
        assert sys.stdout.errors == "strict"  # as it was
        out, _ = came_out()
    lines = [line.rstrip() for line in out.splitlines()]
    row = next(line for line in lines if "joint" in line)
    rule = next(line for line in lines if line.strip() and set(line.strip()) <= {"-", "─"})
    assert f"75.00{sign}7.07" in row and len(rule.strip()) >= len(row.strip())
    assert "|" not in out and (encoding == "utf-8" or "─" not in out)


def test_json_is_ascii_and_files_are_utf_8_whatever_the_terminal(runs, monkeypatch):
    with streams(monkeypatch, encoding="ascii") as came_out:
        assert run_main(monkeypatch, "report", "runs", "--json", "--label", "runs/*=größer ±", "-o", "t.md", "-o", "t.csv") == 0
        out, _ = came_out()
    assert json.loads(out)["rows"][0]["label"] == "größer ±"
    assert "größer ±" in Path("t.md").read_text(encoding="utf-8") and "größer ±" in Path("t.csv").read_text(encoding="utf-8")


def test_names_from_files_are_shown_and_not_obeyed(runs, monkeypatch):
    """In tables, notes and errors, on any terminal."""
    run, name = made((0.5, 0.6, 0.7)), HOSTILE[:-1]  # no file of JSON holds half a character
    recipe = run.evaluation.origin.recipe | {"regime": name, "data": run.evaluation.origin.recipe["data"] | {"name": name}}
    origin = replace(run.evaluation.origin, recipe=recipe)
    save(replace(run, evaluation=replace(run.evaluation, origin=origin)), Path("h", "evaluation.json"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that markup would show
    for encoding in ("utf-8", "ascii"):
        with streams(monkeypatch, encoding=encoding, columns=300) as came_out:
            assert run_main(monkeypatch, "report", "h") == 0
            out, _ = came_out()
        assert out.count(SHOWN[:-6]) == 2
        assert "\x1b[31m" not in out and "\x9b" not in out and "\u202e" not in out and "\r" not in out
    out, err = eectl("report", f"{HOSTILE}.json", code=1)
    assert err.startswith(f"eectl: {SHOWN[:-6]}") and err.count("\n") == 1
    for form in ("markdown", "latex", "csv"):
        assert "\x1b" not in eectl("report", "h", "--format", form)[0]
    label = ["--label", f"h={HOSTILE}"]
    assert SHOWN in eectl("report", "h", *label)[0].replace("\udcff", r"\udcff")
    eectl("report", "h", *label, *(word for name in ("md", "json", "svg", "pdf") for word in ("-o", f"t.{name}")))
    assert SHOWN in "".join(ET.parse("t.svg").getroot().itertext())  # half a character stops no writer


def test_consoles_and_progress_show_strings_as_they_are(monkeypatch):
    with streams(monkeypatch, encoding="utf-8", columns=200) as came_out:
        table = make_table("[bold]a")
        table.add_row(HOSTILE)
        table.add_row(":smile:")
        make_console().print(table)
        Display().say(HOSTILE)
        out, err = came_out()
    assert SHOWN.replace("\\udcff", "") in out.replace("\\udcff", "") and "[bold]a" in out and ":smile:" in out
    assert err.replace("\\udcff", "") == SHOWN.replace("\\udcff", "") + "\n"


def test_no_word_in_a_picture_is_a_formula(tmp_path):
    """A broken formula is an error of matplotlib's; powers on a logarithmic axis are its own."""

    def draw(figure):
        axes = figure.add_subplot()
        axes.plot([1, 2], [1e-3, 1e3], label=r"$\frac{$")
        axes.set_yscale("log")
        axes.set_xticks([1, 2], ["$x$", HOSTILE])
        axes.legend()
        figure.suptitle("50 $ and 60 $")

    (picture,) = render([tmp_path / "a.svg"], draw).values()
    words = "".join(ET.fromstring(picture).itertext())
    assert r"$\frac{$" in words and "50 $ and 60 $" in words and "$x$" in words and SHOWN in words
    assert "mathdefault" not in words and not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("recipes > /dev/full", 1, None, "eectl: stdout: cannot be written (No space left on device)"),
        ("recipes >&-", 1, None, "eectl: stdout: cannot be written (it is closed)"),
        ("recipes 2> /dev/full", 0, "digits", ""),
        ("recipes 2>&-", 0, "digits", ""),
        ("recipes <&- >&- 2>&-", 1, "", ""),
        ("recipes nothing 2> /dev/full", 1, "", ""),
        ("recipes > /dev/full 2>&1", 1, None, ""),
    ],
)
def test_streams_that_cannot_be_written(line, code, out, err):
    command = f"{shlex.quote(sys.executable)} -m eectl {line}"
    done = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (out or "") in done.stdout
    assert done.stderr.startswith(err) and done.stderr.count("\n") == bool(err)


@pytest.mark.process
def test_python_without_buffers_and_a_reader_that_goes():
    line = f"{shlex.quote(sys.executable)} -u -m eectl recipes > /dev/full"
    done = subprocess.run(["sh", "-c", line], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    line = f"{shlex.quote(sys.executable)} -m eectl schema | true"
    done = subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.process
def test_a_terminal_of_ascii_as_a_process():
    line = [sys.executable, "-m", "eectl", "report", "--help"]
    done = subprocess.run(line, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.isascii() and b"mean +/- std" in done.stdout and b"+---" in done.stdout


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """What a library writes to number 2 would else land in the first file that is opened."""

    def first_number():
        sys.stderr = None
        os.close(2)
        with standard_streams(), open(tmp_path / "file", "w") as file:
            print("lost", file=sys.stderr)
            return file.fileno()

    assert in_child(first_number) > 2
    assert (tmp_path / "file").read_text() == ""


def test_work_goes_on_where_nobody_hears(runs, monkeypatch):
    """What is said on stderr is lost, by print and by a run's progress, and nothing else."""
    with streams(monkeypatch, encoding="utf-8") as came_out, open("/dev/full", "wb", buffering=0) as full:
        with monkeypatch.context() as deaf:
            deaf.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(full), encoding="utf-8", line_buffering=True))
            assert run_main(monkeypatch, "report", "runs", "-o", "t.md") == 0
            with standard_streams():
                for _ in range(2):
                    Display().say("lost")
        out, err = came_out()
    assert "joint" in out and err == "" and Path("t.md").exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "x/y: Permission denied; ask for the right"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"n\xff"), "n\\udcff: File name too long; give a shorter name"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; the disk fails"),
        (OSError("two\nlines"), "two lines; look"),
    ],
)
def test_what_the_system_refuses_is_one_line(fault, words, monkeypatch):
    def fail(**_):
        raise fault

    monkeypatch.setattr(cli, "app", fail)
    with streams(monkeypatch, encoding="utf-8") as came_out:
        assert run_main(monkeypatch) == 1
        _, err = came_out()
    assert err.startswith(f"eectl: {words}") and err.count("\n") == 1


def test_a_report_is_written_whole_or_not_at_all(runs):
    """The table fits on the disk and the picture does not; then there is room."""
    outputs = ["-o", "t.md", "-o", "deep/c.pdf", "-o", "t.csv"]
    eectl("report", "runs", *outputs)
    before = {name: Path(name).read_bytes() for name in outputs[1::2]}
    save(made((0.1, 0.2, 0.3), seed=2), Path("runs", "joint-2", "evaluation.json"))
    _, err = in_child(lambda: eectl("report", "runs", *outputs, "--overwrite", code=1), most_bytes=4096)
    assert "deep/c.pdf" in err and "cannot be written (File too large)" in err and err.count("eectl:") == 1
    assert {name: Path(name).read_bytes() for name in before} == before
    assert sorted(path.name for path in runs.rglob("*") if path.is_file() and path.suffix != ".json") == [
        "c.pdf",
        "t.csv",
        "t.md",
    ]
    eectl("report", "runs", *outputs, "--overwrite")
    assert all(Path(name).read_bytes() != content for name, content in before.items())


def test_a_report_over_folders_that_are_closed_or_go_in_circles(runs):
    Path("runs/again").symlink_to(runs / "runs")
    Path("runs/closed/inside").mkdir(parents=True)
    Path("runs/closed").chmod(0)
    try:
        out, err = in_child(lambda: eectl("report", "runs", "--json"))
    finally:
        Path("runs/closed").chmod(0o755)
    assert json.loads(out)["rows"][0]["seeds"] == [0, 1]
    assert err.splitlines() == [
        "runs/closed: left out, it cannot be read (Permission denied)",
        "runs: 2 runs found",
    ]


def test_a_tab_where_nothing_can_be_read_offers_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("closed").mkdir()
    Path("closed/x.safetensors").touch()
    Path("closed").chmod(0)
    Path("loop").symlink_to("loop")
    for typed in ("closed/", "closed/x", "loop/", "loop/x", "n" * 300, f"{'n' * 300}/", "no/such/"):
        assert in_child(lambda typed=typed: places_starting_with(typed)) == []
    assert in_child(lambda: places_starting_with("")) == ["closed/", "loop"]
    Path("closed").chmod(0o755)


@pytest.mark.parametrize("command", ["info", "evaluate", "report", "predict", "flops", "attach-heads"])
def test_places_that_cannot_be_read(command, tmp_path, monkeypatch):
    """One line each that names the place, as nobody's root."""
    monkeypatch.chdir(tmp_path)
    Path("closed").mkdir()
    Path("closed/x.safetensors").touch()
    Path("closed").chmod(0)
    Path("loop").symlink_to("loop")
    Path("file").touch()
    more = {"predict": ["pictures"], "attach-heads": ["--after", "1", "-o", "y.safetensors"]}.get(command, [])
    for place in ("closed/x.safetensors", "loop/x.safetensors", "file/x.safetensors", f"{'n' * 300}.safetensors"):
        _, err = in_child(lambda place=place: eectl(command, place, *more, code=1))
        assert err.startswith(f"eectl: {place}: ") and err.count("\n") == 1
    Path("closed").chmod(0o755)


def test_names_of_undecodable_bytes(tmp_path, monkeypatch):
    with streams(monkeypatch, encoding="utf-8") as came_out:
        assert run_main(monkeypatch, "info", tmp_path / os.fsdecode(b"\xff.safetensors")) == 1
        _, err = came_out()
    assert r"\udcff.safetensors: cannot be read (No such file or directory)" in err
