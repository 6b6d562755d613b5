"""The panel Look of `eectl --help`: info, recipes and schema. Heavy imports stay inside."""

from typing import Annotated

import typer

from eectl.cli.options import Checkpoint, Json, complete_recipes


def info(checkpoint: Checkpoint, json: Json = False) -> None:
    """Show what a checkpoint holds and how it was made."""
    from eectl.core.console import show_json
    from eectl.models.checkpoint import about_in, read_checkpoint_metadata
    from eectl.training.tables import show_info

    metadata = read_checkpoint_metadata(checkpoint)
    about = about_in(checkpoint, metadata)
    if json:
        show_json(metadata)
    else:
        show_info(checkpoint, metadata, about)


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="print this one", autocompletion=complete_recipes, show_default=False)
    ] = None,
) -> None:
    """List the shipped recipes, or print one.

    folder and text are templates for data of your own.
    Example: eectl recipes folder > mine.yaml
    """
    from eectl.core.console import show_text
    from eectl.core.errors import lookup
    from eectl.recipe.reading import shipped_recipes
    from eectl.recipe.schema import first_comment

    texts = shipped_recipes()
    if name is not None:
        show_text(lookup(texts, name, what="recipe"))
        return
    width = max(map(len, texts))
    for each, text in texts.items():
        print(f"{each:{width}}  {first_comment(text)}")


def schema() -> None:
    """Print the JSON schema of recipes, which lets an editor check, explain and complete their keys.

    Recipes name it in their first line as a file beside them.
    Example: eectl schema > eectl.schema.json
    """
    from eectl.core.console import show_json
    from eectl.recipe.schema import recipe_schema

    show_json(recipe_schema())
