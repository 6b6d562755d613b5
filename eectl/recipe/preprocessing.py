"""Keys of a recipe's data section that follow from a published image network: the preprocessing of its preprocessor_config.json.

The file is taken for hostile. No torch; nothing is downloaded unless that is allowed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError
from eectl.core.files import read_text, reading
from eectl.core.json_files import parse_json
from eectl.recipe.data_paths import expand
from eectl.recipe.data_section import DataSection
from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import BackboneSection, Recipe

FILES = {"preprocessor_config.json": (), "processor_config.json": ("image_processor",)}
"""The names under which transformers saves the preprocessing of images, older first, and where it stands in the file."""
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_OF_FILES = ("folder", "imagenette", "imagenet", "tinyimagenet")  # data sets whose images are resized one by one
_MOST = 1e4  # of any number in such a file


def with_preprocessing(recipe: Recipe, *, download: bool = False) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with images prepared as its published network takes them, and notes on that.

    Keys that the recipe changes stay as they are, and all do where there are no published weights of `hf/NAME`.

    Args:
        recipe: the recipe.
        download: whether a network on the Hugging Face hub may be asked; else its file is looked for in the local cache.

    Raises:
        EectlError: for a file that cannot be read, or whose values eectl does not take.
    """
    if recipe.data.is_text or recipe.init is not None:
        return recipe, ()
    path = _find(recipe.backbone, download=download)
    if path is None:
        return recipe, ()
    keys = {key: value for key, value in _keys(path).items() if getattr(recipe.data, key) == _default(key) != value}
    if recipe.data.name not in _OF_FILES or recipe.data.image_size is not None:
        keys.pop("resize", None)
    if not keys:
        return recipe, ()
    plain = recipe.plain()
    made = make_recipe({**plain, "data": {**plain["data"], **keys}}, where=f"{path}, as keys of data")
    said = ", ".join(f"{key}={value}" for key, value in keys.items())
    return made, (f"images are prepared as {recipe.backbone.name} takes them ({path.name}): {said}",)


def image_size_of(backbone: BackboneSection) -> int | None:
    """Return the side of the squares that a published network of transformers takes; None where no file on this machine says."""
    path = _find(backbone, download=False)
    return None if path is None else _keys(path).get("image_size")


def _default(key: str) -> Any:
    return DataSection.model_fields[key].get_default()


def _find(backbone: BackboneSection, *, download: bool) -> Path | None:
    """Return the file with the preprocessing of a published network of transformers; None where there is none."""
    if not backbone.name.startswith("hf/") or not (backbone.pretrained or backbone.weights):
        return None
    name = backbone.name.removeprefix("hf/")
    folder = expand(name)
    with reading(folder):
        if folder.is_dir():
            return next((folder / file for file in FILES if (folder / file).is_file()), None)
    if "/" not in name or name.startswith((".", "/", "~")):
        return None
    return next((path for file in FILES if (path := _on_hub(name, file, download=download))), None)


def _on_hub(name: str, file: str, *, download: bool) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if download:
            return Path(hf_hub_download(name, file))
        found = try_to_load_from_cache(name, file)
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None  # the network itself, which is read next, says what is wrong
    return Path(found) if isinstance(found, str) else None


def _keys(path: Path) -> dict[str, Any]:
    """Return the keys of the data section that a file of transformers' image processors amounts to."""
    value = parse_json(read_text(path), where=path, again="save the network's image processor again")
    for key in FILES[path.name]:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise EectlError(f"{path}: it holds no image processor of transformers'; save it again, or take the file away")
    keys = _size(path, value) | _constants(path, value)
    interpolation = _INTERPOLATIONS.get(value.get("resample", 2)) if isinstance(value.get("resample", 2), int) else None
    return keys | ({"interpolation": interpolation} if interpolation else {})


def _size(path: Path, value: Mapping[str, Any]) -> dict[str, int]:
    """Return image_size, and resize where the centre is cut out of a larger image."""
    if not value.get("do_resize", True):
        return {}
    short, side = _side(path, value.get("size")), _side(path, value.get("crop_size"))
    share = value.get("crop_pct")
    if value.get("do_center_crop") and side is not None:
        return {"image_size": side} | ({"resize": short} if short is not None and short > side else {})
    if short is None:
        return {}
    if isinstance(share, (int, float)) and 0.1 < share < 1 and short < 384:  # as ConvNeXt's: larger images are squeezed
        return {"image_size": short, "resize": int(short / share)}
    return {"image_size": short}


def _side(path: Path, size: object) -> int | None:
    """Return the side of a square in one of the forms that the library has for sizes."""
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if isinstance(size.get(key), int)}
        if len(sides) > 1:
            raise EectlError(f"{path}: images of {dict(size)} are no squares, which eectl makes; set data.image_size")
        size = next(iter(sides), None)
    return size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _MOST else None


def _constants(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return normalize, for pixels in 0..1, and channels."""
    factor = value.get("rescale_factor", 1 / 255) if value.get("do_rescale", True) else 1.0
    mean, std = (
        ([0.0] * 3, [1.0] * 3) if not value.get("do_normalize", True) else (value.get("image_mean"), value.get("image_std"))
    )
    if mean is None or std is None:
        return {}
    numbers = [factor, *_list(mean), *_list(std)]
    fits = all(isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= _MOST for number in numbers)
    if not (fits and factor > 0 and len(_list(mean)) == len(_list(std)) in (1, 3)):
        raise EectlError(f"{path}: image_mean, image_std or rescale_factor are not numbers for each channel; set data.normalize")
    scale = 255 * factor  # the library divides pixels of 0..255, or does not
    return {
        "normalize": ([number / scale for number in mean], [number / scale for number in std]),
        "channels": len(mean),
    }


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [None]
