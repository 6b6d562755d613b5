"""The reference that the documentation's hook makes has every command, option, key and public name; and the pages' facts hold."""

import importlib.util
import re
from pathlib import Path

import pydantic
import pytest
import typer

import eectl
from eectl.cli.app import app
from eectl.recipe.recipe import Recipe
from eectl.recipe.regimes import REGIMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/hooks/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(text, title):
    """What stands below a heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    assert found, f"no section '{title}'"
    return found[1]


def named_commands(group, path):
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        yield from named_commands(command, f"{path} {name}") if hasattr(command, "commands") else ()


def test_every_command_and_option_with_its_help(reference):
    text = reference.commands()
    for name, command in named_commands(typer.main.get_command(app), "eectl"):
        part = " ".join(section(text, name).replace("\\|", "|").replace("&lt;", "<").split())
        assert " ".join(command.help.partition("Example:")[0].split()) in part
        for parameter in command.params:
            if parameter.name != "help":
                names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
                assert all(re.search(rf"`{re.escape(each)}[` ]", part) for each in names), (name, names)
                assert " ".join((parameter.help or "").split()) in part, (name, parameter.name)


def test_defaults_and_values_of_options(reference):
    text = section(reference.commands(), "eectl calibrate-thresholds")
    assert "| `--budgets TEXT` | `25,50,75,100` |" in text
    assert "| `--out`, `-o PATH` |  |" in text
    assert "| `--overwrite` | off |" in text
    assert "| `--batch-size NUMBER` |  |" in text


def keys_of(model, path=""):
    for name, field in model.model_fields.items():
        kind = field.annotation
        written_out = any(isinstance(each, pydantic.WithJsonSchema) for each in field.metadata)  # one key of a model
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) and not written_out:
            yield from keys_of(kind, f"{path}{name}.")
        else:
            yield f"{path}{name}", field


def test_every_recipe_key_with_its_description(reference):
    rows = {}
    for line in reference.recipe_keys().splitlines():
        if line.startswith("| `"):
            key, kind, default, about = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows[key.strip("`")] = (kind, default, about.replace("\\|", "|").replace("&lt;", "<"))
    fields = dict(keys_of(Recipe))
    assert set(rows) == set(fields)
    for key, field in fields.items():
        assert rows[key][2] == " ".join((field.description or "").split()), key
        assert rows[key][0], key
    assert rows["epochs"][:2] == ("whole number ≥\u00a01 and ≤\u00a01e9", "`100`")
    assert rows["optimizer.lr"][:2] == ("number ≥\u00a01e-12 and ≤\u00a01,000", "`0.001`")
    assert rows["metric"][:2] == ("`score`, `balanced`, `loss`", "`score`")


def test_every_public_name(reference):
    headings = re.findall(r"heading: eectl\.(\w+)", reference.api())
    assert headings == [name for name in eectl.__all__ if callable(getattr(eectl, name))]


def test_the_tree_names_the_eleven_rooms():
    rooms = {path.name for path in (ROOT / "eectl").iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = re.findall(r"^\| `(\w+)/` \|", section((ROOT / "docs/tree.md").read_text(encoding="utf-8"), "The tree"), re.M)
    tree = named[: len(rooms)]
    assert (len(rooms), set(tree)) == (11, rooms)


def test_every_regime_and_criterion_has_a_row():
    from eectl.exits.criteria import CRITERIA

    concepts = ROOT / "docs/concepts"
    regimes = re.findall(r"^\| `([a-z-]+)` \|", (concepts / "regimes.md").read_text(encoding="utf-8"), re.M)
    criteria = re.findall(r"^\| `([a-z-]+)` \|", (concepts / "exits-and-budgets.md").read_text(encoding="utf-8"), re.M)
    assert (regimes, set(criteria)) == (list(REGIMES), set(CRITERIA))


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/tree.md"])
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:eectl|tests|docs|recipes|completions|examples)/[\w./-]*)`", text))
    assert named
    assert [each for each in sorted(named) if not (ROOT / each).exists()] == []


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
