"""Write and read checkpoints: one .safetensors file that holds a network's weights and all that is needed to build it again.

No recipe has to lie beside it. What a file says beside its weights is read without torch. Training state is kept elsewhere.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from eectl import __version__
from eectl.core import tensor_files
from eectl.core.errors import EectlError
from eectl.core.kinds import Text, Whole
from eectl.core.tensor_files import digest, write_tensors
from eectl.models.build import build_model
from eectl.models.checkpoint_form import check_header, check_identity, check_run_facts
from eectl.recipe.data_section import DataSection
from eectl.recipe.recipe import ModelSpec

if TYPE_CHECKING:
    import torch

    from eectl.models.multi_exit import MultiExitModel

KIND = "checkpoint"
SCHEMA = 1
AGAIN = "write it again with eectl train, or take another copy of it"
_HERE = f"this is eectl {__version__}"


@dataclass(frozen=True)
class About:
    """A checkpoint's facts beside its weights.

    Attributes:
        spec: what `build.build_model` builds the network from.
        recipe: the one that it was last trained with, as plain data: a key that this version does not take stops no measuring.
        data: the data set's name, task, classes and normalisation.
        splits: the size and fingerprint of each split, by its name.
        history: one entry for each step that made the network, first to last: a phase, attached heads, or ensembles.
        parent: the digest of the weights that it was made from; None where training began with it.
    """

    spec: ModelSpec
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    parent: str | None = None

    @property
    def data_spec(self) -> DataSection:
        """The data section of the recipe."""
        return DataSection.model_validate(self.recipe["data"])

    @property
    def eval_batch_size(self) -> int:
        """The number of rows that the recipe evaluates at once."""
        return int(self.recipe["eval_batch_size"])

    @property
    def task(self) -> str:
        """The kind of problem that the network solves, an entry of losses.TASKS."""
        return str(self.data["task"])

    @property
    def precision(self) -> str:
        """The precision of the phase that was trained last; float32 where no phase says one."""
        return next((str(entry["precision"]) for entry in reversed(self.history) if "precision" in entry), "float32")

    @property
    def untrained(self) -> list[int]:
        """The numbers (from 1) of the attached exits that no phase has trained since they were attached."""
        trained: set[int] = set()
        for entry in self.history:
            trained = set() if "attached" in entry else trained | set(entry.get("heads", ()))
        return [number for number in range(1, len(self.spec.after) + 1) if number not in trained]

    @property
    def origin(self) -> "Origin":
        """The part that an evaluation keeps. Its backbone section says what the first phase started from, not the last one."""
        starts = [entry["start"] for entry in self.history if entry.get("start")]  # only a phase without --from names one
        backbone = {"start": starts[0]} if starts else dict(self.recipe.get("backbone", {}))
        backbone |= {"name": self.spec.backbone.name, "args": self.spec.backbone.args}
        return Origin({**self.recipe, "backbone": backbone}, self.spec.after, self.spec.heads)

    def to_json(self) -> dict[str, Any]:
        """Return it as the file's metadata holds it."""
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
    """A loaded network in eval mode, its file, what that says, and the digest (SHA-256) of its weights."""

    path: Path
    model: "MultiExitModel"
    about: About
    digest: str

    @property
    def channels_last(self) -> bool:
        """True where the network and its inputs lie in memory channels last, as they did in training."""
        return self.model.backbone.lies_channels_last(self.about.recipe.get("channels_last", "auto"))


def save_checkpoint(path: Path, model: "MultiExitModel", about: About, *, overwrite: bool = True) -> str:
    """Write a network, in one step, and return the digest of its weights; raises EectlError where it cannot be written."""
    tensors = model.state_dict()
    weights = digest(tensors)
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"eectl": __version__, "python": platform.python_version()}
    metadata = {"kind": KIND, "schema": SCHEMA, "weights": weights, "versions": versions, **about.to_json()}
    write_tensors(path, tensors, metadata, overwrite=overwrite)
    return weights


def read_checkpoint_metadata(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint's file says beside its weights, as plain data; raises EectlError where it is no checkpoint."""
    metadata = tensor_files.read_metadata(path, kind=KIND, schema=SCHEMA, again=AGAIN)
    check_identity(metadata, where=f"{path}: its header is damaged, or of another eectl", again=_HERE)
    return metadata


def read_about(path: Path) -> About:
    """Return what a checkpoint says beside its weights, without reading them; raises EectlError where it is no checkpoint."""
    return about_in(path, read_checkpoint_metadata(path))


def about_in(path: Path, metadata: Mapping[str, Any]) -> About:
    """Return what the metadata of the checkpoint `path` says; raises EectlError where it has not the form of a checkpoint's."""
    spec = check_header(metadata, where=f"{path}: its header is damaged, or of another eectl", again=_HERE)
    return About(
        spec=spec,
        recipe=metadata["recipe"],
        data=metadata["data"],
        splits=metadata["splits"],
        history=metadata["history"],
        parent=metadata["parent"],
    )


def load_checkpoint(path: Path, *, device: "torch.device | str" = "cpu") -> Checkpoint:
    """Build a checkpoint's network again, with its weights and in eval mode.

    torch's generators are left as they were. Raises EectlError where the file is missing, no checkpoint, cut short or altered,
    or where the libraries here build the network otherwise than those it was saved with.
    """
    import torch

    from eectl.models.limits import building_within, limit_of_weights

    tensors, metadata = tensor_files.read_tensors(path, kind=KIND, schema=SCHEMA, again=AGAIN)
    about = about_in(path, metadata)
    name = about.spec.backbone.name
    with torch.random.fork_rng(devices=[]), building_within(limit_of_weights(tensors, where=path), name=name):
        try:
            model = build_model(about.spec)
        except EectlError as error:
            raise EectlError(f"{path}: its network cannot be built: {error}") from error
    own = model.state_dict()
    odd = [key for key in {**own, **tensors} if key not in own or key not in tensors or own[key].shape != tensors[key].shape]
    if odd:
        made_with = ", ".join(f"{library} {number}" for library, number in metadata["versions"].items())
        raise EectlError(
            f"{path}: {', '.join(odd[:3])} do not fit {name} as it is built here; the file was made with {made_with:.300}"
        )
    model.load_state_dict(tensors)
    return Checkpoint(path, model.to(device).eval(), about, metadata["weights"])


@dataclass(frozen=True)
class Origin:
    """The run that a network came from: its recipe as plain data, and the blocks and kinds of the exits that it really has."""

    recipe: Annotated[Mapping[str, Any], AfterValidator(check_run_facts)]
    after: tuple[Whole, ...]
    heads: tuple[Text, ...]
