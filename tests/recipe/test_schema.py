"""The recipe's JSON schema, read by the jsonschema library: takes every shipped recipe, refuses what a recipe refuses."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from running import eectl

from eectl.core.errors import EectlError
from eectl.recipe import choices
from eectl.recipe.reading import make_recipe, read_recipe, shipped_recipes
from eectl.recipe.recipe import Recipe
from eectl.recipe.schema import EDITOR_COMMENT, first_comment, recipe_schema
from eectl.recipe.yaml_text import parse_yaml

SHIPPED = Path(__file__).parents[2] / "recipes" / "eectl.schema.json"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


def test_the_shipped_file_is_fresh(monkeypatch, capsys):
    out, _ = eectl("schema")
    assert SHIPPED.read_text() == out, "stale: run eectl schema > recipes/eectl.schema.json"
    assert json.loads(out) == recipe_schema()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_taken_and_so_is_its_full_form(name, validator):
    validator.validate(json.loads(json.dumps(parse_yaml(shipped_recipes()[name], where=name))))
    validator.validate(read_recipe(name).model_dump(mode="json"))


@pytest.mark.parametrize(
    "text",
    [
        *("data: {limit: 5}", "data: {limit: {train: 5, test: 3}}", "data: {name: folder, test: 0.15}", "loss_weights: l2w"),
        *("data: {name: text, text: a}", "data: {name: text, text: [a, b]}", "loss_weights: [1, 2, 0.5]"),
        *(
            "phases: {3: {lr: 0.1}}",
            "regime: separate",
            "exits: {after: [1, 3], head: mlp-64}",
            "data: {normalize: [[0.1], [0.2]]}",
        ),
        *(
            "channels_last: true",
            "channels_last: auto",
            "compile: true",
            "compile: auto",
            "deterministic: true",
            "data: {in_memory: false}",
            "backbone: {args: {anything: 1}}",
        ),
    ],
)
def test_what_a_recipe_takes_the_schema_takes(text, validator):
    value = parse_yaml(text, where="x")
    make_recipe({"data": {"tokenizer": "x"} | value.pop("data", {})} | value if "name: text" in text else value, where="x")
    validator.validate(json.loads(json.dumps(parse_yaml(text, where="x"))))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "optimzer: {}",
            "data: {augment: {mixpu: 1}}",
            "data: {limit: {tset: 3}}",
            "phases: {3: {epoch: 1}}",
            "exits: {afer: [1]}",
        ),
        *("regime: disjont", "data: {name: cifar-10}", "epochs: 0", "optimizer: {lr: -1}", "optimizer: {name: adam}"),
        *("data: {limit: 0}", "loss_weights: liner", "data: {text: []}", "data: {test: 1}", "seed: a"),
    ],
)
def test_what_a_recipe_refuses_the_schema_refuses(text, validator):
    value = parse_yaml(text, where="x")
    with pytest.raises(EectlError):
        make_recipe(value, where="x")
    assert not validator.is_valid(json.loads(json.dumps(value)))


def test_names_come_from_the_table():
    schema = recipe_schema()
    data = schema["$defs"]["DataSection"]["properties"]
    assert schema["properties"]["regime"]["enum"] == list(choices.REGIME_CHOICES)
    assert schema["properties"]["precision"]["enum"] == list(choices.PRECISION_CHOICES)
    assert data["name"]["anyOf"][0]["enum"] == [*choices.IMAGE_CHOICES, *choices.TEXT_CHOICES]
    for line in choices.HEAD_CHOICES.values():
        assert line in schema["$defs"]["ExitsSection"]["properties"]["head"]["description"]


def test_every_key_says_what_it_does():
    sections = [Recipe]
    for section in sections:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                sections.append(inner)
                assert inner.__doc__
            else:
                assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"
    assert len(sections) == 11  # phases hold sections of a kind of their own


def test_recipes_are_listed_by_what_they_say_of_themselves(monkeypatch, capsys):
    assert first_comment(f"{EDITOR_COMMENT}\n# eectl train x    (about)\ndata: {{}}\n") == "eectl train x    (about)"
    out, _ = eectl("recipes")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(lines) == set(shipped_recipes()) and all(line.startswith("eectl train") for line in lines.values())
    out, _ = eectl("recipes", "folder")
    assert out == shipped_recipes()["folder"] and out.startswith(EDITOR_COMMENT + "\n")
