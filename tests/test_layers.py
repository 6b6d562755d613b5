"""Who may import whom: downwards only, as the README's tree says; and start-up imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "eectl"
LAYERS = [  # from the bottom; a module may import from its own layer (verbs excepted) and from below
    {"errors", "seeds", "text_sets"},
    {"files", "tensor_parts", "regimes", "weighting", "recipe", "published", "printing"},
    {"models", "distributed", "optim", "losses", "stopwatch"},
    {"exiting", "sweep", "per_exit", "results", "bench_file", "exit_times", "settings", "compare"},
    {"data", "costs", "l2w", "dominance", "stage_times"},
    {"scored", "predict", "feature_cache", "checkpoint", "run_folder", "report", "tables", "display", "routing", "speed_tables"},
    {"network", "session", "loop", "steps", "phase_state", "thresholds", "scoring", "describe", "analyses", "plots", "speed"},
    {"train", "attach", "calibrate", "evaluate", "plan", "summarize", "analyze", "bench"},
    {"cli_options", "cli_analyze"},
    {"cli"},
    {"__main__"},
]
VERBS = LAYERS[7]
NO_TORCH = [
    *("errors", "files", "tensor_parts", "regimes", "weighting", "recipe", "text_sets", "published", "printing"),
    *("checkpoint", "describe", "cli", "models", "analyses"),
]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().split("/")[0]
        if path.name != "__init__.py" or path.parent != ROOT:
            yield name, path


def imported(path):
    """The eectl modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "eectl":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eectl."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("eectl."))


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_go_down(name, path):
    layer = {module: index for index, layer in enumerate(LAYERS) for module in layer}
    assert name in layer, f"{name} has no layer: put it in LAYERS"
    for other in imported(path):
        assert layer[other] <= layer[name], f"{name} imports {other}, which lies above it"
        assert not (name in VERBS and other in VERBS and name != other), f"the verb {name} imports the verb {other}"


@pytest.mark.parametrize("name", NO_TORCH)
def test_import_without_torch(name):
    code = f"import sys, eectl.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
