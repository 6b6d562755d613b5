"""The kind of data at a path, told by the names of its files: images by class, or texts. Opens no file; no torch."""

from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.recipe.choices import FILE_CHOICES, listed


def expand(path: str | Path) -> Path:
    """Return a path with the user's home in place of a leading ~; `~name` of somebody who is not there stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def kind_of(data: str | Path) -> tuple[str, str]:
    """Return whether `data` is a `folder` of images or `text`, and a name for runs on it; raises EectlError if it is neither."""
    path = expand(data)
    with reading(path):
        if path.is_dir():
            tables = [path / f"train{suffix}" for suffix in FILE_CHOICES]
            holds_text = any(table.is_file() for table in tables) or any(path.glob("train-[0-9]*-of-[0-9]*.parquet"))
            return "text" if holds_text else "folder", path.resolve().name or "data"
        if path.is_file() and path.suffix in FILE_CHOICES:
            return "text", path.stem
        fault = f"a file of kind '{path.suffix}'" if path.is_file() else "no such folder or file"
    raise EectlError(f"--data {data}: {fault}; give a folder of images by class, or a file of texts ({listed(FILE_CHOICES)})")


def not_a_recipe(source: str) -> str | None:
    """Return what to say of a path that was given as a recipe and is data or a run; None: it may be a recipe."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return f"{source} is a run's folder; its recipe is {path / 'recipe.yaml'}"
    if path.is_dir() and kind_of(path)[0] == "folder":
        line = f"eectl train --data {source} --backbone timm/resnet18"
        return f"{source} is a folder, not a recipe; to train on its images: {line}"
    if path.is_dir() or (path.is_file() and path.suffix in FILE_CHOICES):
        line = f"eectl train --data {source} --text COLUMN --target COLUMN --backbone hf/NAME"
        return f"{source} holds data and is not a recipe; to train on its texts: {line}"
    return None
