"""Data of one's own without writing YAML: what `--data`, `--text`, `--target`, `--backbone` and `--weights` say as recipe keys.

The flags are shorthands: a folder of images becomes `data.name: folder`, a file of texts `data.name: text`, shards `wds`, and
the rest of the recipe is the one that the user names, or the shipped recipe of that kind. Looks at names of files, and
into none but the preprocessing of a published network; no torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.recipe.choices import HUB_PREFIX
from eectl.recipe.data_paths import expand, kind_of
from eectl.recipe.preprocessing import image_size_of
from eectl.recipe.reading import read_recipe
from eectl.recipe.yaml_text import inline_yaml

USUAL_SIZE = 224  # what the networks of torchvision, timm and transformers are made for, unless their name says otherwise
SMALL_SIZE = 32
SMALL = re.compile(r"resnet(20|32|44|56)|msdnet")  # networks made for CIFAR


@dataclass(frozen=True)
class OwnData:
    """A training run as the flags describe it.

    `recipe` is the recipe to start from (None: as without the flags), `changes` are `key=value` changes that go before those of
    `--set`, `name` is what the run is called (None: after its recipe), and `notes` say what was chosen for the user.
    """

    recipe: str | None
    changes: tuple[str, ...]
    name: str | None = None
    notes: tuple[str, ...] = ()


def own_data(
    recipe: str | None = None,
    *,
    data: str | Path | None = None,
    text: str | Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    task: str | None = None,
    backbone: str | None = None,
    weights: str | Path | None = None,
    has_start: bool = False,
    changes: Iterable[str] = (),
) -> OwnData:
    """Say in recipe keys what the flags of `eectl train` that describe one's own data mean.

    Args:
        recipe: the recipe that the user names. Default: the shipped recipe `folder` or `text`, as `data` is one or the other.
        data: a folder of images by class, a file of texts, a folder with `train.csv` or another such file, shards of images,
            what save_to_disk wrote, or hfds/OWNER/NAME.
        text: the column of the text, or the two columns of pairs.
        target: the column to predict, or several.
        task: an entry of TASK_CHOICES.
        backbone: the network, such as `timm/resnet18` or `hf/./minilm`. The weights in a folder `hf/./FOLDER` are used.
        weights: a `.safetensors` file to start from.
        has_start: whether the run starts from a checkpoint (`--from`), whose recipe then takes the place of a shipped one.
        changes: the user's `key=value` changes, which go before everything that is chosen here.

    Raises:
        EectlError: where `data` is not there, or neither a folder nor a file of texts, or `changes` set data.root too.
    """
    keys: dict[str, Any] = {}
    name, notes = None, []
    columns = [text] if isinstance(text, str) else list(text)
    changes = list(changes)
    if data is not None and any(change.startswith("data.root=") for change in changes):
        raise EectlError(f"--data {data} says where the data lies, and so does data.root (--data-root); give one of the two")
    if backbone is not None:
        keys["backbone"] = {"name": backbone}
        if weights is None and _holds_weights(backbone):
            keys["backbone"] |= {"pretrained": True}
            notes.append(f"{backbone} starts from the weights in that folder; --set backbone.pretrained=false for random ones")
    if weights is not None:
        keys |= {"backbone.weights": str(weights)} | ({} if backbone else {"backbone.pretrained": False})
    if data is not None:
        kind, name = kind_of(data)
        is_of_library = kind.startswith(HUB_PREFIX)
        usual = "text" if kind == "text" or (is_of_library and columns) else "folder"
        recipe = recipe or (None if has_start else usual)
        keys |= {"data.name": kind} | ({} if is_of_library else {"data.root": str(data)})
    keys |= {"data.text": columns} if columns else {}
    wanted = [target] if isinstance(target, str) else list(target or ())
    target = wanted[0] if len(wanted) == 1 else wanted or None
    keys |= {f"data.{key}": value for key, value in (("target", target), ("task", task)) if value is not None}
    written = [f"{key}={inline_yaml(value)}" for key, value in keys.items()]
    if data is not None and kind != "text" and recipe is not None:
        planned = read_recipe(recipe, changes=[*written, *changes])
        if planned.data.image_size is None and not planned.data.is_text and planned.data.name == kind:
            size = image_size_of(planned.backbone) or usual_size(planned.backbone.name)
            written.append(f"data.image_size={size}")
            notes.append(
                f"images become squares of {size} pixels, as {planned.backbone.name} usually takes them; --set data.image_size=N "
                "for another size"
            )
    return OwnData(recipe, tuple(written), name, tuple(notes))


def usual_size(backbone: str) -> int:
    """Return the side in pixels of the squares that `backbone` is usually trained on: what its name says, else 224, or 32."""
    if SMALL.fullmatch(backbone):
        return SMALL_SIZE
    numbers = re.findall(r"(?<=[_-])\d{3}(?=[_-]|\.|$)", backbone)
    return int(numbers[-1]) if numbers else USUAL_SIZE


def _holds_weights(backbone: str) -> bool:
    """Return whether `backbone` is hf/FOLDER, and weights lie in that folder."""
    folder = expand(backbone.removeprefix("hf/"))
    with reading(folder):
        return backbone.startswith("hf/") and folder.is_dir() and any(folder.glob("*.safetensors"))
