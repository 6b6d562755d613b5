"""The README: short, its commands exist with the options it shows, its links lead somewhere, its two lines set themselves up."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from eectl.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_it_is_read_in_one_go():
    assert len(README.split()) <= 900


def test_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_figure_is_small():
    picture = ROOT / re.search(r"!\[[^\]]+\]\(([^)]+)\)", README)[1]
    assert 1_000 < picture.stat().st_size < 150_000


def test_the_two_lines_make_their_own_environment():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(lines) == 2
    assert "eectl train digits --regime mixed" in lines[0]
    assert lines[1].endswith("pytest -n 2")


def test_the_python_block_uses_public_names():
    import eectl

    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    compile(block, "README.md", "exec")
    assert set(re.findall(r"\beectl\.(\w+)\(", block)) <= set(eectl.__all__)
