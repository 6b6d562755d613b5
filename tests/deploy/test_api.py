"""The package's front: what it names, where that comes from, and that it agrees with the commands."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eectl
from eectl.cli import app as cli
from eectl.core.errors import EectlError

ROOT = Path(__file__).parents[2]
VERBS = {name: name for name in ("train", "evaluate", "bench", "report", "flops", "predict")}
VERBS |= {"attach_heads": "attach-heads", "calibrate": "calibrate-thresholds"}
CLI_ALONE = {"json", "quiet", "dry_run", "list_published", "form", "full"}  # how a command prints
CLI_ALONE |= {"find_lr"}  # a verb of its own
API_ALONE = {"say", "quiet", "each"}
PARTLY = {"recipe", "source", "out"}  # a default of the program's own, such as a run's folder


def test_importing_eectl_imports_no_torch_and_little_else():
    code = "import sys; before = set(sys.modules); import eectl; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("eectl")}
    assert ours == {"eectl"} and not {"torch", "numpy", "pydantic", "typer"} & set(done.stdout.split())


@pytest.mark.process
def test_importing_eectl_takes_less_than_50_ms():
    line = [sys.executable, "-X", "importtime", "-c", "import eectl"]
    times = []
    for _ in range(5):
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
        (found,) = re.findall(r"\| +(\d+) \| eectl$", done.stderr, flags=re.MULTILINE)
        times.append(int(found))
    assert min(times) < 50_000


def test_all_names_are_there_and_listed():
    assert set(eectl.__all__) <= set(dir(eectl))
    assert set(eectl.__all__) == set(eectl._HOMES) | {"__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = eectl.nothing


@pytest.mark.parametrize("name", sorted(eectl._HOMES))
def test_a_name_is_what_its_home_calls_so(name):
    found = getattr(eectl, name)
    assert found.__name__ == name and found.__module__ == eectl._HOMES[name]
    assert found.__doc__


def test_type_checkers_see_the_same_names():
    source = (ROOT / "eectl" / "__init__.py").read_text()
    said = {name: home for home, names in re.findall(r"^    from (\S+) import (.+)$", source, re.M) for name in names.split(", ")}
    assert said == eectl._HOMES


def command(name):
    (found,) = (each for panel in cli.COMMANDS.values() for own, each in panel.items() if own == name)
    return inspect.signature(found).parameters


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_what_its_command_takes(name):
    own, its = inspect.signature(getattr(eectl, name)).parameters, command(VERBS[name])
    assert set(own) - API_ALONE == set(its) - CLI_ALONE, set(own) ^ set(its)
    for option in set(own) & set(its) - PARTLY - API_ALONE:
        ours, theirs = own[option].default, its[option].default
        if inspect.Parameter.empty not in (ours, theirs):
            assert ours == theirs or (ours in ((), [], None) and theirs in ((), [], None)), option


@pytest.mark.parametrize("name", [*VERBS, "analyze", "load"])
def test_a_verb_is_typed_and_says_nothing_by_itself(name):
    function = getattr(eectl, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters)
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    say = inspect.signature(function).parameters.get("say")
    assert say is None or say.default.__name__ == "silent"


def test_the_example_in_the_docstring_runs():
    found = doctest.testmod(eectl)
    assert found.attempted and not found.failed


def test_an_error_of_the_package_is_the_programs():
    assert eectl.EectlError is EectlError
