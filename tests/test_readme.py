"""The README: its commands exist with the options it shows, its tree is the one that is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from eectl.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands


def shell_lines():
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.splitlines():
            yield from (part.strip() for part in line.split("&&") if part.strip().startswith("eectl "))


@pytest.mark.parametrize("line", list(dict.fromkeys(shell_lines())))
def test_commands_exist_with_these_options(line):
    _, verb, *rest = shlex.split(line)
    command = COMMANDS[verb].commands[rest[0]] if verb == "analyze" else COMMANDS[verb]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= options


def test_every_verb_stands_in_the_table():
    assert set(re.findall(r"^\| `eectl ([a-z-]+)", README, re.M)) == set(COMMANDS)


def test_the_tree_names_every_module():
    tree = README[README.index("```\nrecipes/") :]
    there = {path.name for path in (ROOT / "eectl").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert there == set(re.findall(r"\b([a-z0-9_]+\.py)\b", tree)) - {"backbone.py", "multi_exit.py", "heads.py"}


def test_the_two_lines_make_their_own_environment():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(lines) == 2
    assert "train digits --regime mixed" in lines[0]
    assert lines[1].endswith("pytest -n 2")
