"""The recipe's JSON schema: what an editor checks a recipe against, and explains and completes its keys from. No torch."""

from typing import Any

from eectl.recipe.recipe import Recipe

EDITOR_COMMENT = "# yaml-language-server: $schema=./eectl.schema.json"  # the first line of every shipped recipe


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with a description and the default of every key; unknown keys are refused.

    It says what each key takes on its own. What two keys say together (validation + calibration below 1) only reading the recipe
    checks.
    """
    schema = Recipe.model_json_schema()
    schema.pop("title")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "eectl recipe",
        **_tidy(schema),
    }


def _tidy(schema: Any) -> Any:
    """Return the schema without the titles that only repeat a key's name."""
    if isinstance(schema, dict):
        return {
            key: {name: _tidy(each) for name, each in value.items()} if key in ("properties", "$defs") else _tidy(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_tidy(each) for each in schema] if isinstance(schema, list) else schema


def first_comment(text: str) -> str:
    """Return the first comment of a recipe's text that says something of the recipe, without its `#`."""
    lines = (line for line in text.splitlines() if line != EDITOR_COMMENT)
    return next(lines, "").lstrip("# ")
