"""Who may import whom: a room imports its own modules and those of rooms below it; and start-up imports no torch."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from eectl.cli.app import COMMANDS

ROOT = Path(__file__).parents[1] / "eectl"
ROOMS = [  # from the bottom; rooms of one line do not see each other
    {"core"},
    {"recipe"},
    {"data", "models"},
    {"exits"},
    {"training", "evaluation"},
    {"deploy", "reports", "analyses"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
NO_TORCH = [
    *("core", "core.errors", "core.files", "core.tensor_parts", "core.console", "recipe.recipe", "recipe.reading", "models"),
    *("recipe.choices", "recipe.own_data", "recipe.schema", "recipe.data_paths"),
    *("models.build", "models.checkpoint", "training.tables", "reports.published", "analyses", "cli.app"),
]


def imported(path):
    """The rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "eectl":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eectl."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("eectl."))


def test_the_house_has_these_rooms_and_two_doors():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert (folders, files) == (set(FLOOR), {"__init__.py", "__main__.py"})


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = path.relative_to(ROOT).parts[0]
    for other in imported(path):
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}, which does not lie below it"


@pytest.mark.process
def test_imports_without_torch():
    """One after another in one process, so the first that brings torch is named."""
    code = f"import sys\nfor name in {NO_TORCH}:\n    __import__('eectl.' + name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


SHARED = {  # what parallel modules have in common, by the folder that they lie in
    "ask": "analyses",
    "build": "models/adapters",
    "draw": "analyses",
    "option_names": "models/adapters",
    "records": "analyses",
    "tables": "analyses",
}


def public_names():
    """Each public class and function of the package with the modules that define it."""
    found = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(ROOT)))
    return found


def test_no_two_things_have_one_name():
    """A reader who finds a name finds one thing; only a command in cli/ has the name of the verb that it calls."""
    commands = {command.__name__ for panel in COMMANDS.values() for command in panel.values()}
    twice = {}
    for name, modules in public_names().items():
        others = [module for module in modules if not (name in commands and module.startswith("cli/"))]
        if len(others) > 1 and not (name in SHARED and all(module.startswith(f"{SHARED[name]}/") for module in others)):
            twice[name] = others
    assert not twice
