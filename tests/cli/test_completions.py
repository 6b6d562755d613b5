"""Completions: the shipped scripts are what the app generates, and real shells get real answers from them.

`python tests/cli/test_completions.py` writes the scripts anew.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

FOLDER = Path(__file__).parents[2] / "completions"
FILES = {"bash": "eectl.bash", "zsh": "_eectl", "fish": "eectl.fish"}
# zsh reads the file itself as the function's body at the first TAB: without this that TAB would only define things
ZSH_FIRST_TAB = '\n[[ "$funcstack[1]" = "_eectl" ]] && _eectl_completion "$@"\n'


def generated(shell):
    env = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    line = [sys.executable, "-m", "eectl", "--show-completion", shell]
    script = subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout.rstrip("\n") + "\n"
    return script + ZSH_FIRST_TAB if shell == "zsh" else script


@pytest.mark.parametrize("shell", FILES)
def test_scripts_are_fresh(shell):
    assert (FOLDER / FILES[shell]).read_text() == generated(shell), "stale: run python tests/cli/test_completions.py"


@pytest.fixture
def program(tmp_path):
    """A folder for PATH with `eectl` in it, the one under test."""
    script = tmp_path / "eectl"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m eectl "$@"\n')
    script.chmod(0o755)
    root = str(Path(__file__).parents[2])
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}


CASES = [
    ("eectl ca", ["calibrate-thresholds"]),
    ("eectl train --regime mi", ["mixed", "mixed-gradual"]),
    ("eectl train dig", ["digits"]),
    ("eectl calibrate-thresholds x --criterion ma", ["margin", "max-softmax"]),
    ("eectl evaluate x --precision ", ["auto", "bf16", "float32", "tf32"]),
    ("eectl report --published 20", ["20", "20:1L", "20:2L-1024", "20:2L-2048"]),
    ("eectl attach-heads --placement every-", ["every-1", "every-2", "every-3"]),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash(program, line, expected):
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f'source "{FOLDER / FILES["bash"]}"; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; '
    code += '_eectl_completion eectl; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], env=program, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish(program, line, expected):
    code = f"source '{FOLDER / FILES['fish']}'; complete --do-complete '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], env=program, capture_output=True, text=True, check=True)
    assert sorted(row.split("\t")[0] for row in done.stdout.splitlines()) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("line", "expected"), CASES[:2])
def test_zsh_from_its_first_tab(program, tmp_path, line, expected):
    """A real zsh on a pseudo-terminal; its completion list is read back from the screen."""
    (tmp_path / ".zshrc").write_text(
        f"fpath=('{FOLDER}' $fpath); autoload -Uz compinit; compinit -u -D; PS1='> '\nsetopt nobeep\n"
    )
    code = f"""
zmodload zsh/zpty
zpty shell zsh -i
sleep 1
zpty -w -n shell '{line}\t\t'
sleep 3
out=''
while zpty -r -t shell chunk; do out+=$chunk; done
print -r -- $out
zpty -d shell
"""
    env = program | {"ZDOTDIR": str(tmp_path), "TERM": "xterm"}
    done = subprocess.run(["zsh", "-f", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert all(word in done.stdout for word in expected), done.stdout


if __name__ == "__main__":
    for shell, name in FILES.items():
        (FOLDER / name).write_text(generated(shell))
