"""The form of what a checkpoint says beside its weights: which keys there must be, and what their values may be.

Only what eectl reads is asked for: other keys may stand there, of an older or a newer version. No torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from eectl.core.json_files import checked
from eectl.core.kinds import FEW, Natural, Number, Positive, Text, Whole
from eectl.recipe.choices import TaskName
from eectl.recipe.data_section import DataSection, num_outputs
from eectl.recipe.recipe import ModelSpec


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Identity(_Form):
    """Which weights these are, and what wrote them."""

    weights: Text
    versions: Annotated[dict[Text, Text], FEW]


class _Network(_Form):
    name: Text
    args: dict[str, Any] = {}
    pretrained: bool = False
    weights: Text | None = None


class _Named(_Form):
    name: Text


class RunFacts(_Form):
    """The part of a run's recipe that tables tell runs apart by."""

    regime: Text
    seed: Whole
    data: _Named
    backbone: _Network


def _reads_data(section: dict[str, Any]) -> dict[str, Any]:
    DataSection.model_validate(section)  # it fills in columns, which no strict schema of pydantic's lets through
    return section


class _Recipe(_Form):
    regime: Text
    seed: Whole
    data: Annotated[dict[str, Any], AfterValidator(_reads_data)]
    backbone: _Network
    eval_batch_size: Annotated[int, Field(ge=1, le=2**31)]
    channels_last: bool | Literal["auto"] = "auto"


class _Data(_Form):
    name: Text
    task: TaskName
    classes: Annotated[tuple[Text, ...], Field(max_length=1_000_000)]
    input_shape: Annotated[tuple[Natural, ...], Field(min_length=2, max_length=3)]
    mean: Annotated[tuple[Number, ...], Field(max_length=3)]
    std: Annotated[tuple[Positive, ...], Field(max_length=3)]
    kind: Literal["image", "text"] = "image"
    targets: Annotated[tuple[Text, ...], FEW] = ()


class _Split(_Form):
    size: Whole
    fingerprint: Text


class _Scores(_Form):
    score: Annotated[tuple[Number | None, ...], FEW]
    loss: Annotated[tuple[Number | None, ...], FEW]

    @model_validator(mode="after")
    def _one_each(self) -> "_Scores":
        if len(self.score) != len(self.loss):
            raise ValueError(f"{len(self.score)} scores and {len(self.loss)} losses")
        return self


class _PhaseStep(_Form):
    phase: Natural
    title: Text
    regime: Text
    exits: Annotated[tuple[Natural, ...], FEW]
    heads: Annotated[tuple[Natural, ...], FEW]
    epochs: Natural
    restored_epoch: Whole
    stopped_by: Text
    validation: _Scores
    seed: Whole
    start: Text | None = None
    precision: Text = "float32"

    @model_validator(mode="after")
    def _exits_that_are_scored(self) -> "_PhaseStep":
        scores = len(self.validation.score)
        if not set(self.exits) <= set(range(1, scores + 1)):  # exits that a phase leaves alone are scored too
            raise ValueError(f"{scores} validation scores, and the phase trained exits {list(self.exits)}")
        return self


class _HeadsStep(_Form):
    attached: Annotated[tuple[Whole, ...], FEW]
    head: Text


class _EnsemblesStep(_Form):
    combined: Text | None


class _Header(Identity):
    model: ModelSpec
    recipe: _Recipe
    data: _Data
    splits: Annotated[dict[Text, _Split], Field(max_length=16)]
    history: Annotated[tuple[_PhaseStep | _HeadsStep | _EnsemblesStep, ...], FEW]
    parent: Text | None

    @model_validator(mode="after")
    def _fits_together(self) -> "_Header":
        spec = self.model
        if len(spec.heads) != len(spec.after):
            raise ValueError(f"{len(spec.heads)} heads for {len(spec.after)} exits")
        data = self.data
        outputs = num_outputs(data.task, num_classes=len(data.classes), num_targets=len(data.targets))
        if spec.num_outputs != outputs:
            raise ValueError(f"a network of {spec.num_outputs} outputs for data of {outputs}")
        if self.data.input_shape != spec.input_shape:
            raise ValueError(f"a network for inputs {spec.input_shape} and data of {self.data.input_shape}")
        channels = spec.input_shape[0]
        if self.data.kind == "image" and not len(self.data.mean) == len(self.data.std) == channels:
            raise ValueError(f"{len(self.data.mean)} means and {len(self.data.std)} deviations for {channels} channels")
        return self


def check_identity(value: Mapping[str, Any], *, where: object, again: str) -> None:
    """Raise EectlError where a header does not say which weights it belongs to; `where` and `again` are for the message."""
    checked(Identity, value, where=where, again=again)


def check_header(value: Mapping[str, Any], *, where: object, again: str) -> ModelSpec:
    """Return the network that a header describes; raises EectlError where the header has not the form of a checkpoint's."""
    return checked(_Header, value, where=where, again=again).model


def check_run_facts(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe as plain data; raises pydantic's ValidationError where it lacks what tables tell runs apart by."""
    RunFacts.model_validate(value)
    return value
