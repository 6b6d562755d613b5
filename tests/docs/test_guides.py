"""The guides' commands: every block of a page that is marked to run does, in the page's order, in one folder with small data."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import toy_text
from numpy.random import default_rng
from PIL import Image

from eectl.cli import app as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "<!-- run -->" in path.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^<!-- run -->\n+```(\w+)\n(.*?)^```$", re.M | re.S)
SIMPLE = re.compile(r"eectl [^|&;<>$`*]*")  # what needs no shell


def marked_blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def write_images(folder, classes, count, size=(40, 36)):
    draw = default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 100, (*size[::-1], 3), dtype="uint8") + 100 * number
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{index:03}.png")


def write_encoder(folder):
    """A six-layer BERT with random weights, as transformers saves it, and its tokenizer."""
    from transformers import BertConfig, BertModel

    toy_text.write_tokenizer(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=4 + len(toy_text.WORDS), **size)).save_pretrained(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the guides speak of, and `eectl` and `torchrun` on the PATH."""
    write_images(tmp_path / "photos", ("cat", "dog"), 40)
    write_images(tmp_path / "holiday", ("beach",), 3)
    runpy.run_path(str(ROOT / "docs/hooks/digit_images.py"))["write"](tmp_path / "scans")
    rows = [{"review": row["text"], "stars": {"down": 1, "level": 3, "up": 5}[row["mood"]]} for row in toy_text.make_rows(300)]
    toy_text.write_csv(tmp_path / "reviews.csv", rows)
    toy_text.write_csv(tmp_path / "new.csv", rows[:5])
    write_encoder(tmp_path / "minilm")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in {"eectl": "eectl", "torchrun": "torch.distributed.run"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run_here(line, monkeypatch):
    """Run one plain `eectl …` in this process, which spares it the imports."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    told = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        cli.main()
    assert not stop.value.code, f"{line}\n{told.getvalue()}"


def run_in_a_shell(text):
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_commands_run(page, place, monkeypatch):
    for language, text in marked_blocks(page):
        lines = text.replace("\\\n", " ").splitlines()
        if language == "python":
            exec(compile(text, str(page), "exec"), {})
        elif all(SIMPLE.fullmatch(line) for line in lines):
            for line in lines:
                run_here(line, monkeypatch)
        else:
            run_in_a_shell(text)


def test_the_guides_have_commands_that_run():
    assert {"own-images", "own-text", "regime-study", "several-gpus", "deployment"} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_mark_stands_before_a_block_that_can_run(page):
    assert page.read_text(encoding="utf-8").count("<!-- run -->") == len(marked_blocks(page))
    assert {language for language, _ in marked_blocks(page)} <= {"sh", "python"}
