"""The kind of data at a path, told by the names of its files: images by class or in shards, texts, or what a library saved.

Opens no file; no torch.
"""

from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.recipe.choices import FILE_CHOICES, HUB_PREFIX, listed

SAVED_AS = ("dataset_dict.json", "state.json")  # what save_to_disk of the datasets library leaves
USUAL_SHARDS = ("train*.tar", "train/*.tar")


def expand(path: str | Path) -> Path:
    """Return a path with the user's home in place of a leading ~; `~name` of somebody who is not there stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def kind_of(data: str | Path) -> tuple[str, str]:
    """Return the data.name of `data`, `folder`, `text`, `wds` or `hfds/NAME`, and a name for runs on it.

    Raises EectlError if it is none of these.
    """
    if str(data).startswith(HUB_PREFIX) and not Path(str(data).removeprefix(HUB_PREFIX)).is_dir():
        return str(data), str(data).rpartition("/")[2]
    path = expand(str(data).removeprefix(HUB_PREFIX))
    with reading(path):
        if path.is_dir() and (str(data).startswith(HUB_PREFIX) or any((path / name).is_file() for name in SAVED_AS)):
            return HUB_PREFIX + (str(path) if path.is_absolute() else f"./{path}"), path.resolve().name or "data"
        if path.suffix == ".tar" or (path.is_dir() and any(any(path.glob(usual)) for usual in USUAL_SHARDS)):
            return "wds", path.resolve().name if path.is_dir() else path.parent.resolve().name or "data"
        if path.is_dir():
            tables = [path / f"train{suffix}" for suffix in FILE_CHOICES]
            holds_text = any(table.is_file() for table in tables) or any(path.glob("train-[0-9]*-of-[0-9]*.parquet"))
            return "text" if holds_text else "folder", path.resolve().name or "data"
        if path.is_file() and path.suffix in FILE_CHOICES:
            return "text", path.stem
        fault = f"a file of kind '{path.suffix}'" if path.is_file() else "no such folder or file"
    raise EectlError(
        f"--data {data}: {fault}; give a folder of images by class, shards, hfds/OWNER/NAME, or a file of texts "
        f"({listed(FILE_CHOICES)})"
    )


def not_a_recipe(source: str) -> str | None:
    """Return what to say of a path that was given as a recipe and is data or a run; None: it may be a recipe."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return f"{source} is a run's folder; its recipe is {path / 'recipe.yaml'}"
    if path.is_dir() and kind_of(path)[0] in ("folder", "wds"):
        line = f"eectl train --data {source} --backbone timm/resnet18"
        return f"{source} is a folder, not a recipe; to train on its images: {line}"
    if path.is_dir() or (path.is_file() and path.suffix in FILE_CHOICES):
        line = f"eectl train --data {source} --text COLUMN --target COLUMN --backbone hf/NAME"
        return f"{source} holds data and is not a recipe; to train on its texts: {line}"
    return None
