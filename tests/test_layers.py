"""Who may import whom: a room imports its own modules and those of rooms below it; and start-up imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", NO_TORCH)
def test_import_without_torch(name):
    code = f"import sys, eectl.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
