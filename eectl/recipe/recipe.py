"""The recipe: everything a run depends on, as frozen data. Reads YAML and `--set`, reports all mistakes at once; no torch.

A recipe builds nothing. `ModelSpec` is the part that a checkpoint needs to rebuild its network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from eectl.core.errors import closest
from eectl.recipe.regimes import REGIMES, Phase
from eectl.recipe.text_sets import TEXT_SETS, is_text
from eectl.recipe.weighting import WEIGHTINGS

Fraction = Annotated[float, Field(ge=0, lt=1, strict=True)]
Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
SCORE_NAMES = {"classification": "accuracy", "regression": "MSE"}  # what is reported of each task, an entry of losses.TASKS


def _known_regime(name: str) -> str:
    if name not in REGIMES:
        raise ValueError(f"no such regime{closest(name, REGIMES)}; known: {', '.join(REGIMES)}")
    return name


def _known_weights(weights: str | tuple[float, ...]) -> str | tuple[float, ...]:
    if isinstance(weights, str) and weights not in WEIGHTINGS:
        known = f"{', '.join(WEIGHTINGS)}, or one number per exit"
        raise ValueError(f"no such weighting{closest(weights, WEIGHTINGS)}; known: {known}")
    return weights


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Augment(Section):
    """Training-time augmentation, batched on the device, in this order. Validation data never passes through it."""

    resized_crop: tuple[Probability, Probability] | None = Field(None, description="area range of a random resized crop")
    trivial: bool = Field(False, description="TrivialAugmentWide, one operation per image")
    trivial_interpolation: Literal["nearest", "bilinear", "bicubic"] = Field("nearest", description="how it warps images")
    crop: Annotated[int, Field(ge=0)] = Field(0, description="pixels of padding before a random crop back to size")
    flip: bool = Field(False, description="random horizontal flip")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="random rotation within ± degrees")
    contrast: Fraction = Field(0.0, description="random contrast factor within 1 ± this")
    erasing: Probability = Field(0.0, description="probability of random erasing")
    mixup: NonNegative = Field(0.0, description="Mixup's alpha; 0 is off")
    cutmix: NonNegative = Field(0.0, description="CutMix's alpha; 0 is off; with Mixup on, one of the two by a fair coin")

    @property
    def is_random(self) -> bool:
        """Whether two looks at one image may differ."""
        return self.model_copy(update={"trivial_interpolation": "nearest"}) != Augment()

    @model_validator(mode="after")
    def _a_range(self) -> "Augment":
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1]:
            raise ValueError(f"resized_crop is {list(self.resized_crop)}; give two areas above 0, the smaller first")
        return self


class Data(Section):
    """Which data, how it is split, and how it is augmented."""

    name: str = "digits"
    root: Path = Field(Path("data"), description="folder with the data set; digits needs none")
    variant: str | None = Field(None, description="which published form of the data; imagenette: full, 320px or 160px")
    image_size: Count | None = Field(None, description="images are resized to this square; none: as the data set has them")
    resize: Count | None = Field(None, description="short side of image files before the centre crop; none: image_size")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="how images are resized")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; none: as the data set has them")
    normalize: Literal["auto", "imagenet"] | tuple[tuple[float, ...], tuple[Positive, ...]] = Field(
        "auto", description="auto: the data set's own constants; imagenet; or [means, standard deviations]"
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the training rows for early stopping")
    calibration: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the training rows for thresholds")
    split_seed: int = 42
    limit: Count | None = Field(None, description="use at most this many training rows, drawn by class")
    in_memory: bool | Literal["auto"] = Field("auto", description="keep all images on the device; auto: where they fit")
    workers: Annotated[int, Field(ge=0)] = Field(4, description="processes that read images when they are not in memory")
    augment: Augment = Augment()
    text: tuple[str, ...] = Field(("text",), min_length=1, max_length=2, description="column of the text, or two of pairs")
    target: str = Field("label", description="text: the column to predict")
    task: Literal["classification", "regression"] = Field("classification", description="text: what the target is")
    tokenizer: str | None = Field(None, description="text: a folder or a hub id; none: that of backbone hf/NAME")
    max_length: Annotated[int, Field(ge=3, strict=True)] = Field(128, description="text: longer ones are cut to these tokens")
    strip: tuple[Literal["headers", "footers", "quotes"], ...] = Field(
        (), description="20newsgroups: what scikit-learn's rules take out; none: whole posts, as the paper names no stripping"
    )

    @property
    def is_text(self) -> bool:
        """Whether the data set holds texts, and not images."""
        return is_text(self.name)

    @model_validator(mode="before")
    @classmethod
    def _known_columns(cls, value: Any) -> Any:
        """Published data sets bring their columns and their task; one column may stand without a list around it."""
        if not isinstance(value, Mapping):
            return value
        known = TEXT_SETS.get(str(value.get("name")))
        own = {} if known is None else {"text": known.text, "target": known.target, "task": known.task}
        given = {**value, "text": [value["text"]]} if isinstance(value.get("text"), str) else dict(value)
        return own | given

    @model_validator(mode="after")
    def _something_left(self) -> "Data":
        if self.validation + self.calibration >= 1:
            raise ValueError(f"validation + calibration is {self.validation + self.calibration:g}; it must leave training rows")
        return self

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> "Data":
        foreign, other = (_IMAGE_KEYS, "images") if self.is_text else (_TEXT_KEYS, "text")
        changed = [key for key in foreign if getattr(self, key) != type(self).model_fields[key].get_default()]
        if changed:
            verb = "is" if len(changed) == 1 else "are"
            kind = "text" if self.is_text else "images"
            raise ValueError(f"{', '.join(changed)} {verb} for {other}, and {self.name} holds {kind}; leave {_it(changed)} out")
        known = TEXT_SETS.get(self.name)
        if known is not None and (self.text, self.target, self.task) != (known.text, known.target, known.task):
            raise ValueError(f"{self.name} has its own columns and task ({known.task}); leave out text, target and task")
        if self.strip and self.name != "20newsgroups":
            raise ValueError(f"strip is for 20newsgroups, and this is {self.name}; leave it out")
        return self

    @model_validator(mode="after")
    def _room_for_the_crop(self) -> "Data":
        if self.resize is not None and self.resize < (self.image_size or self.resize + 1):
            wanted = "it needs image_size" if self.image_size is None else f"it must be image_size, {self.image_size}, or more"
            raise ValueError(f"resize is {self.resize}; {wanted}, the square that is cut out of the resized image")
        return self


_IMAGE_KEYS = ("image_size", "channels", "normalize", "in_memory", "workers", "augment", "variant", "resize", "interpolation")
_TEXT_KEYS = ("text", "target", "task", "tokenizer", "max_length", "strip")


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


class Backbone(Section):
    """Which network: `resnet18` (torchvision), `timm/NAME`, `hf/NAME` (text), `resnet20` or `vit` (any size by `args`)."""

    name: str = "resnet20"
    args: dict[str, Any] = Field({}, description="the network's own options, such as {stem: small}")
    pretrained: bool = Field(False, description="start from the library's weights, which that library downloads")
    weights: Path | None = Field(None, description="start from a .safetensors file with the library's parameter names")

    @model_validator(mode="after")
    def _one_start(self) -> "Backbone":
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained and weights exclude each other")
        return self


class Exits(Section):
    """Where exits are attached and what they are."""

    after: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, description="blocks that an exit follows, from 0")
    placement: str | None = Field(None, description="every-N, dense-sparse or sparse-dense, instead of a list")
    head: str = Field(
        "auto",
        description="linear, mlp-WIDTH, sdn, ztw, ztw-arithmetic, gpf, gpf-WIDTH, gpf-lancopku, gpf-lancopku-WIDTH; "
        "auto: sdn on CNNs, linear on transformers",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Exits":
        if (self.after is None) == (self.placement is None):
            raise ValueError("give either after (a list of blocks) or placement")
        if self.after is not None and len(set(self.after)) != len(self.after):
            raise ValueError(f"after has a block twice: {list(self.after)}")
        return self


class Optimizer(Section):
    """AdamW or SGD."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    momentum: Fraction = 0.9
    clip_norm: Positive | None = Field(None, description="gradients are scaled down to this norm")


class Schedule(Section):
    """The learning rate as a function of the step; epochs are converted to steps."""

    name: Literal["cosine-restarts", "cosine", "constant"] = "cosine-restarts"
    cycle: Positive = Field(10.0, description="cosine-restarts: epochs of the first cycle")
    cycle_factor: Annotated[int, Field(ge=1)] = Field(2, description="cosine-restarts: each cycle is this much longer")
    min_lr: NonNegative = 0.0
    warmup: NonNegative = Field(0.0, description="epochs of linear warm-up from 0, before the rest")


class Distillation(Section):
    """What exits learn from later ones: loss + weight · mean over students of T² · KL(teacher ‖ student) at temperature T."""

    teacher: Literal["none", "last", "later", "next"] = Field(
        "none", description="last: the last exit teaches all; next: each the one before; later: the mean of all later ones"
    )
    weight: Positive = 0.5
    temperature: Positive = 3.0


class LearnedWeighting(Section):
    """`loss_weights: l2w`. Its authors' values: for ImageNet as here but interval 100; for CIFAR epsilon 0.8 and centre row."""

    epsilon: Positive = Field(0.3, description="how far a weight may go from 1, before centring")
    hidden: Count = Field(500, description="width of the weight-prediction network")
    centre: Literal["matrix", "row"] = Field("matrix", description="what has mean weight 1: all rows and exits, or each row")
    interval: Count = Field(1, description="steps from one meta step to the next")
    p: Annotated[int, Field(ge=1, le=39, strict=True)] = Field(15, description="exit k answers for (p/20)^k of the rows")
    lr: Positive = Field(1e-4, description="of the weight-prediction network; follows the schedule")
    weight_decay: NonNegative = 1e-4


class PhaseChange(Section):
    """What one phase does differently; none: as the recipe says."""

    epochs: Count | None = None
    patience: Count | None = None
    lr: Positive | None = None
    weight_decay: NonNegative | None = None
    batch_size: Count | None = None


class Recipe(Section):
    """Everything a training run depends on."""

    data: Data = Data()
    backbone: Backbone = Backbone()
    init: Path | None = Field(None, description="a checkpoint to start from, as --from")
    exits: Exits = Exits(placement="every-2")
    regime: Annotated[str, AfterValidator(_known_regime)] = "mixed"
    phase: Count | None = Field(None, description="run only this phase, as --phase")
    loss_weights: Annotated[str | tuple[NonNegative, ...], AfterValidator(_known_weights)] = Field(
        "auto", description="a scheme, or one number per exit; auto: what the heads' authors use (linear for GPF), else uniform"
    )
    weight_slope: Fraction = Field(0.4, description="increasing, decreasing: from 1 - slope to 1 + slope; assumed")
    ramp_epochs: Count | None = Field(None, description="sdn-ramp: epochs until the weights are constant; none: the phase's")
    distillation: Distillation = Distillation()
    l2w: LearnedWeighting = LearnedWeighting()
    label_smoothing: Fraction = 0.0
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: Count = Field(100, description="at most this many per phase")
    patience: Count = Field(10, description="stop when no exit has improved for this many epochs")
    metric: Literal["score", "loss"] = Field("score", description="what early stopping compares")
    batch_size: Count = Field(128, description="over all processes")
    eval_batch_size: Count = 500
    phases: dict[int, PhaseChange] = Field({}, description="changes by phase number, as {3: {epochs: 10}}")
    precision: Literal["auto", "float32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, float32 on a CPU")
    channels_last: bool | Literal["auto"] = Field("auto", description="auto: on for convolutional networks")
    compile: bool = Field(False, description="torch.compile: minutes at first, then faster steps; pays in long runs")
    cache_features: NonNegative = Field(
        2e9,
        description="bytes in each process for what heads read of a frozen backbone, where no augmentation is random; 0: off",
    )
    checkpoint_activations: bool = Field(False, description="compute blocks again in the backward pass: less memory, more time")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_backbone(cls, value: Any) -> Any:
        """Texts are read with the tokenizer that belongs to `hf/NAME`, unless the recipe names another."""
        if not isinstance(value, Mapping):
            return value
        data, backbone = value.get("data"), value.get("backbone")
        if not (isinstance(data, Mapping) and isinstance(backbone, Mapping) and is_text(str(data.get("name")))):
            return value
        name = str(backbone.get("name"))
        if data.get("tokenizer") is not None or not name.startswith("hf/"):
            return value
        return {**value, "data": {**data, "tokenizer": name.removeprefix("hf/")}}

    @model_validator(mode="after")
    def _one_objective(self) -> "Recipe":
        if self.loss_weights == "l2w" and self.distillation.teacher != "none":
            raise ValueError("loss_weights l2w and distillation exclude each other; set distillation.teacher=none")
        return self

    @model_validator(mode="after")
    def _recomputes_alone(self) -> "Recipe":
        if self.checkpoint_activations and self.compile:
            raise ValueError("checkpoint_activations and compile exclude each other; set one of them to false")
        if self.checkpoint_activations and self.loss_weights == "l2w":
            raise ValueError("loss_weights l2w differentiates its backward pass; set checkpoint_activations=false")
        return self

    @property
    def start(self) -> str | None:
        """What the weights start from, as `start_of`; None where that is a checkpoint's business."""
        return None if self.init is not None else start_of(self.backbone.model_dump())

    @model_validator(mode="after")
    def _fits_its_data(self) -> "Recipe":
        if self.data.task == "regression" and self.label_smoothing:
            raise ValueError("label_smoothing is for classes, and data.task is regression; set it to 0")
        if self.data.is_text and self.data.tokenizer is None:
            raise ValueError("data.tokenizer: texts need one; name a folder or a hub id, or take a backbone hf/NAME")
        if self.data.is_text and self.channels_last is True:
            raise ValueError(f"channels_last is for images, and {self.data.name} holds text; leave it out")
        return self


ENSEMBLES = PhaseChange(epochs=2, lr=5e-3, weight_decay=0.0, batch_size=64)
"""How ensembles train where the recipe says nothing else: the ViT script of gmum/Zero-Time-Waste."""


def start_of(backbone: Mapping[str, Any]) -> str:
    """What a backbone section, as plain data, starts its weights from: published, a file's name, or random."""
    weights = backbone.get("weights")
    return "published" if backbone.get("pretrained") else Path(weights).name if weights else "random"


def phase_change(recipe: Recipe, phase: Phase) -> PhaseChange:
    """What `phase` does differently from the recipe's own settings: `phases` over what the phase itself brings."""
    own = recipe.phases.get(phase.number, PhaseChange())
    return ENSEMBLES.model_copy(update=own.model_dump(exclude_none=True)) if phase.combine else own


class ModelSpec(Section):
    """What rebuilds a network without a recipe: stored in every checkpoint."""

    backbone: Backbone
    input_shape: tuple[Count, ...] = Field(min_length=2, max_length=3, description="channels, height, width; text: 3, max_length")
    num_outputs: Count = Field(description="classes, or 1 for regression")
    after: tuple[int, ...] = ()
    heads: tuple[str, ...] = Field((), description="the kind of each attached exit, resolved")
    combine: str | None = Field(None, description="the ensembles at the attached exits: geometric or arithmetic; none: none")
