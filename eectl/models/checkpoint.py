"""One self-describing .safetensors file per network: it rebuilds with no recipe beside it. Holds no training state.

What a file says beside its weights is read without torch.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl import __version__
from eectl.core import files
from eectl.core.errors import EectlError
from eectl.core.files import digest, write_tensors
from eectl.models.build import build_model
from eectl.recipe.data_section import DataSection
from eectl.recipe.recipe import ModelSpec

if TYPE_CHECKING:
    import torch

    from eectl.models.multi_exit import MultiExitModel

KIND = "checkpoint"
SCHEMA = 1


@dataclass(frozen=True)
class About:
    """What a checkpoint says beside its weights.

    `recipe` is the one it was last trained with, as plain data: measuring reads `data_spec` and `eval_batch_size` alone, so a
    recipe that this version no longer takes stops nobody. `data` describes the data set (name, classes, normalisation), `splits`
    holds size and fingerprint by split name, `history` one entry per step that made the network (a phase, attached heads, or
    ensembles), `parent` the digest it came from.
    """

    spec: ModelSpec
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    parent: str | None = None

    @property
    def data_spec(self) -> DataSection:
        """The recipe's data section."""
        return DataSection.model_validate(self.recipe["data"])

    @property
    def eval_batch_size(self) -> int:
        """How many rows are evaluated at once."""
        return int(self.recipe["eval_batch_size"])

    @property
    def task(self) -> str:
        """What the network does, an entry of losses.TASKS."""
        return str(self.data.get("task", "classification"))  # older files know no other

    @property
    def untrained(self) -> list[int]:
        """The attached exits (numbers from 1) that no phase has trained since they were attached."""
        trained: set[int] = set()
        for entry in self.history:
            trained = set() if "attached" in entry else trained | set(entry.get("heads", ()))
        return [number for number in range(1, len(self.spec.after) + 1) if number not in trained]

    @property
    def origin(self) -> "Origin":
        """What an evaluation keeps of it; its backbone section is the network's, not that of the last of its phases."""

        backbone = dict(self.recipe.get("backbone", {}))
        starts = [entry["start"] for entry in self.history if entry.get("start")]  # files made before this was kept have none
        if starts:
            backbone = {"start": starts[0]}
        backbone |= {"name": self.spec.backbone.name, "args": self.spec.backbone.args}
        return Origin({**self.recipe, "backbone": backbone}, self.spec.after, self.spec.heads)

    def to_json(self) -> dict[str, Any]:
        """What the file's metadata holds of it."""
        return {
            "model": self.spec.model_dump(mode="json"),
            "recipe": dict(self.recipe),
            "data": dict(self.data),
            "splits": dict(self.splits),
            "history": list(self.history),
            "parent": self.parent,
        }


@dataclass(frozen=True)
class Checkpoint:
    """A loaded network, what its file says, and the digest that names its weights."""

    path: Path
    model: "MultiExitModel"
    about: About
    digest: str


def save_checkpoint(path: Path, model: "MultiExitModel", about: About) -> str:
    """Write the network in one step and return the digest of its weights."""
    tensors = model.state_dict()
    weights = digest(tensors)
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"eectl": __version__, "python": platform.python_version()}
    metadata = {"kind": KIND, "schema": SCHEMA, "weights": weights, "versions": versions, **about.to_json()}
    write_tensors(path, tensors, metadata)
    return weights


def read_metadata(path: Path) -> dict[str, Any]:
    """Everything a checkpoint's file says, as JSON, without its weights."""
    return files.read_metadata(path, kind=KIND, schema=SCHEMA)


def read_about(path: Path) -> About:
    """What a checkpoint says beside its weights, without reading them."""
    return _about(path, read_metadata(path))


def load_checkpoint(path: Path, *, device: "torch.device | str" = "cpu") -> Checkpoint:
    """Rebuild the network of a checkpoint, in eval mode; raises EectlError where the file is not one, cut or altered."""
    import torch

    tensors, metadata = files.read_tensors(path, kind=KIND, schema=SCHEMA)
    about = _about(path, metadata)
    if digest(tensors) != metadata["weights"]:
        raise EectlError(f"{path}: the weights are not those that were saved; the file was altered or damaged, write it again")
    with torch.random.fork_rng(devices=[]):
        model = build_model(about.spec)
    wrong = model.load_state_dict(tensors, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        odd = ", ".join([*wrong.missing_keys, *wrong.unexpected_keys][:3])
        made_with = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
        raise EectlError(
            f"{path}: {odd} do not fit {about.spec.backbone.name} as it is built here; the file was made with {made_with}"
        )
    return Checkpoint(path, model.to(device).eval(), about, metadata["weights"])


def _about(path: Path, metadata: Mapping[str, Any]) -> About:
    try:
        about = About(
            spec=ModelSpec.model_validate(metadata["model"]),
            recipe=metadata["recipe"],
            data=metadata["data"],
            splits=metadata["splits"],
            history=metadata["history"],
            parent=metadata["parent"],
        )
        _ = about.data_spec, about.eval_batch_size, about.untrained, metadata["weights"]
    except (KeyError, TypeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise EectlError(f"{path}: its header is damaged, or of another eectl ({what}); this is eectl {__version__}") from error
    return about


@dataclass(frozen=True)
class Origin:
    """Which run a network came from: its recipe as plain data, and the exits (blocks and kinds) that it really has."""

    recipe: Mapping[str, Any]
    after: tuple[int, ...]
    heads: tuple[str, ...]
