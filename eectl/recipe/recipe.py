"""The recipe: everything a run depends on, as frozen data. How recipes are read and written is `reading`'s; no torch.

A recipe builds nothing. `ModelSpec` is the part that a checkpoint needs to rebuild its network. The descriptions of the keys are
the recipe's reference: `eectl schema` and the documentation are made from them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from eectl.core.errors import closest
from eectl.recipe.choices import (
    AUTO_HEAD,
    HEAD_CHOICES,
    LOSS_CHOICES,
    METRIC_CHOICES,
    MOST_IN_A_NAME,
    PHASE_CHOICES,
    PLACEMENT_CHOICES,
    PRECISION_CHOICES,
    REGIME_CHOICES,
    WEIGHTING_CHOICES,
    completions,
    described,
    is_choice,
    listed,
)
from eectl.recipe.data_section import DataSection
from eectl.recipe.optimizer_section import Ema, EmaSection, OptimizerSection, ScheduleSection
from eectl.recipe.regimes import Phase
from eectl.recipe.section import (
    Block,
    Count,
    Factor,
    Fraction,
    FreeData,
    PathText,
    Rate,
    RateOrZero,
    Rows,
    Section,
    Seed,
    ShortText,
    StartText,
    Switch,
    Weight,
    Width,
)
from eectl.recipe.text_sets import is_text, kind_asked

MOST_EXITS = 1000
MOST_INPUTS = 3 * 8192 * 8192  # numbers of one row
SCORE_NAMES = {  # what is reported of each task, an entry of losses.TASKS
    "classification": "accuracy",
    "regression": "MSE",
    "multilabel": "F1",
    "ordinal": "accuracy",
}


def _known_regime(name: str) -> str:
    if name not in REGIME_CHOICES:
        raise ValueError(f"no such regime{closest(name, REGIME_CHOICES)}; known: {listed(REGIME_CHOICES)}")
    return name


def _known_weights(weights: str | tuple[float, ...]) -> str | tuple[float, ...]:
    if isinstance(weights, str) and weights not in WEIGHTING_CHOICES:
        known = f"{listed(WEIGHTING_CHOICES)}, or one number per exit"
        raise ValueError(f"no such weighting{closest(weights, WEIGHTING_CHOICES)}; known: {known}")
    return weights


def _known_head(name: str) -> str:
    if not is_choice(name, HEAD_CHOICES):
        raise ValueError(
            f"no such head{closest(name, ('auto', *HEAD_CHOICES))}; known: {listed(HEAD_CHOICES)}; WIDTH is a whole number "
            f"from 1 to {MOST_IN_A_NAME:,}"
        )
    return name


def _known_head_or_auto(name: str) -> str:
    return name if name == "auto" else _known_head(name)


def _known_placement(name: str) -> str:
    if not is_choice(name, PLACEMENT_CHOICES):
        raise ValueError(
            f"no such placement{closest(name, completions(PLACEMENT_CHOICES))}; known: {listed(PLACEMENT_CHOICES)}; write "
            "every-N as every-2"
        )
    return name


def _by_number(value: Any) -> Any:
    """Read the numbers of phases as JSON and `--set` write them too, as texts."""
    if not isinstance(value, Mapping):
        return value
    read: dict[Any, Any] = {}
    for key, each in value.items():
        number = int(key) if isinstance(key, str) and re.fullmatch(r"[1-9][0-9]{0,4}", key) else key
        if type(number) is not int:
            raise ValueError(f"{key!r:.80} is not the number of a phase; write it as {{3: {{epochs: 10}}}}")
        if number in read:
            raise ValueError(f"phase {number} stands twice; keep one")
        read[number] = each
    return read


class BackboneSection(Section):
    """Which network the exits are attached to, and what its weights start from."""

    name: ShortText = Field(
        "resnet20",
        description="The network: a name that eectl or torchvision knows (resnet20, msdnet, resnet50, vit_b_16; vit of any size "
        "by `args`), timm/NAME for one of timm's, or hf/NAME for a text or image classifier of transformers: a model type, an "
        "id on the Hugging Face hub, or a folder as hf/./FOLDER.",
    )
    args: FreeData = Field({}, description="The network's own options, such as {stem: small}. Default: the library's.")
    pretrained: Switch = Field(
        False,
        description="Start from the weights that the library publishes, which it downloads, or from those in the folder of "
        "hf/./FOLDER. Default: random weights, drawn from `seed`.",
    )
    weights: PathText | None = Field(
        None,
        description="Start from this .safetensors file, with the library's parameter names or those of an eectl checkpoint. A "
        "classifier for another number of classes is left random. Default: no file.",
    )

    drop_path: Fraction | None = Field(
        None,
        description="Drop path (stochastic depth): how often a residual branch is left out of a training step, where the library "
        "says so at the last block, less before it. Default: the network's own.",
    )
    dropout: Fraction | None = Field(
        None,
        description="Dropout: timm's drop_rate, torchvision's dropout, and all of transformers' rates but a classifier's own. "
        "Default: the network's own.",
    )

    @model_validator(mode="after")
    def _one_start(self) -> "BackboneSection":
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained and weights exclude each other")
        return self


class ExitsSection(Section):
    """The places of the exits and the kind of their heads. Give either `after` or `placement`."""

    after: Annotated[tuple[Block, ...], Field(max_length=MOST_EXITS)] | None = Field(
        None, description="The numbers of the blocks that an exit follows, from 0; `eectl flops` shows them."
    )
    placement: Annotated[ShortText, AfterValidator(_known_placement)] | None = Field(
        None,
        description=f"A rule instead of a list. {described(PLACEMENT_CHOICES)}.",
        json_schema_extra={"examples": list(completions(PLACEMENT_CHOICES))},
    )
    head: Annotated[ShortText, AfterValidator(_known_head_or_auto)] = Field(
        "auto",
        description=f"The kind of the heads. {AUTO_HEAD}; {described(HEAD_CHOICES)}.",
        json_schema_extra={"examples": ["auto", *completions(HEAD_CHOICES)]},
    )

    @model_validator(mode="after")
    def _one_way(self) -> "ExitsSection":
        if (self.after is None) == (self.placement is None):
            raise ValueError("give either after (a list of blocks) or placement")
        if self.after is not None and len(set(self.after)) != len(self.after):
            raise ValueError(f"after has a block twice: {list(self.after)}")
        return self


class DistillationSection(Section):
    """Learning of exits from later ones: weight · mean over students of T² · KL(teacher ‖ student) at temperature T is added."""

    teacher: Literal["none", "last", "later", "next"] = Field(
        "none",
        description="none: exits learn from labels alone; last: the last exit teaches all others; next: each exit teaches the "
        "one before it; later: the mean of all later exits teaches each.",
    )
    weight: Factor = Field(0.5, description="What the teaching term is multiplied by before it is added to the loss.")
    temperature: Factor = Field(3.0, description="T: what logits are divided by before the softmax.")


class L2wSection(Section):
    """Settings of the learned weights, `loss_weights: l2w`.

    The authors take these defaults on ImageNet, but interval 100; on CIFAR epsilon 0.8 and centre row.
    """

    epsilon: Factor = Field(0.3, description="How far a weight may go from 1, before centring.")
    hidden: Width = Field(500, description="The width of the network that predicts the weights.")
    centre: Literal["matrix", "row"] = Field(
        "matrix", description="What has the mean weight 1. matrix: all rows and exits of a batch; row: each row."
    )
    interval: Count = Field(1, description="Steps from one step of that network to the next.")
    p: Annotated[int, Field(ge=1, le=39, strict=True)] = Field(
        15, description="The share of the rows that exit k answers for is proportional to (p/20)^k; 20: all exits alike."
    )
    lr: Rate = Field(1e-4, description="The learning rate of that network; it follows `schedule`.")
    weight_decay: RateOrZero = Field(1e-4, description="The weight decay of that network.")


class PhaseSection(Section):
    """Settings of one phase that differ from the rest of the recipe."""

    epochs: Count | None = Field(None, description="At most this many epochs. Default: the recipe's.")
    patience: Count | None = Field(None, description="Epochs without progress before the phase ends. Default: the recipe's.")
    lr: Rate | None = Field(None, description="The highest learning rate. Default: that of `optimizer`.")
    weight_decay: RateOrZero | None = Field(None, description="The weight decay. Default: that of `optimizer`.")
    batch_size: Rows | None = Field(None, description="Rows of a step. Default: the recipe's.")
    accumulate: Rows | None = Field(None, description="The pieces in which they pass. Default: the recipe's.")


class Recipe(Section):
    """Everything a training run of eectl depends on. Every key has a default; `eectl recipes digits` prints a short one."""

    data: DataSection = DataSection()
    backbone: BackboneSection = BackboneSection()
    init: StartText | None = Field(
        None,
        description="A checkpoint to start from, as --from: its network takes the place of `backbone`. A file, or one on the "
        "Hugging Face hub, as hf://OWNER/NAME[/FILE][@REVISION], of which the run records the commit. Default: none.",
    )
    exits: ExitsSection = ExitsSection(placement="every-2")
    regime: Annotated[str, AfterValidator(_known_regime)] = Field(
        "mixed",
        description=f"Which parts train when. {described(REGIME_CHOICES)}.",
        json_schema_extra={"enum": list(REGIME_CHOICES)},
    )
    phase: Count | None = Field(
        None,
        description=f"Run this phase alone, as --phase. {described(PHASE_CHOICES)}; "
        "branch-wise, separate and mixed-gradual count their stages. Default: the whole regime.",
    )
    freeze_until: Block | None = Field(
        None,
        description="The stem and the blocks from 0 to this one keep their weights and BatchNorm's statistics in every phase, "
        "and are not run backwards. Default: the regime alone says what is frozen.",
    )
    loss_weights: Annotated[
        ShortText | Annotated[tuple[Weight, ...], Field(max_length=MOST_EXITS + 1)], AfterValidator(_known_weights)
    ] = Field(
        "auto",
        description=f"How much each exit's loss counts: one number per exit, the last one's included, or a scheme. "
        f"{described(WEIGHTING_CHOICES)}.",
        json_schema_extra={
            "anyOf": [
                {"enum": list(WEIGHTING_CHOICES)},
                {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1e6}},
            ]
        },
    )
    weight_slope: Fraction = Field(
        0.4, description="The slope of the weightings increasing and decreasing. Their authors do not give it: 0.4 is assumed."
    )
    ramp_epochs: Count | None = Field(
        None, description="sdn-ramp: the epochs after which weights no longer grow. Default: the phase's epochs."
    )
    distillation: DistillationSection = DistillationSection()
    l2w: L2wSection = L2wSection()
    loss: Literal["cross-entropy", "bce"] = Field(
        "cross-entropy", description=f"The loss of classes; other tasks have their own. {described(LOSS_CHOICES)}."
    )
    bce_target_threshold: Fraction | None = Field(
        None,
        description="bce: targets over this become 1 and others 0, after smoothing and Mixup. Default: they stay as they are.",
    )
    label_smoothing: Fraction = Field(0.0, description="The share of each target that goes to all classes alike. 0: off.")
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="How much a row counts in the training loss by its class. none: all rows count alike; balanced: all classes "
        "do, a row N / (C · n) in training rows N, classes C and rows n of its class.",
    )
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: Ema = Field(
        EmaSection(),
        description="A moving average of the weights: its decay alone, such as 0.9999, or {decay: 0.9999, warmup: true}. What is "
        "validated, stopped on and saved are then the averaged weights of what trains, BatchNorm's statistics among them. Each "
        "phase starts its average from its first weights. warmup (the default): the decay of step n, from 0, is at most "
        "1 − (1 + n)^(−2/3), as timm has it. Default: no average.",
    )
    epochs: Count = Field(100, description="At most this many epochs in each phase.")
    patience: Count = Field(10, description="A phase ends when no exit has improved on the validation rows for this many epochs.")
    metric: Literal["score", "balanced", "loss"] = Field(
        "score", description=f"What early stopping compares and thresholds are chosen by. {described(METRIC_CHOICES)}."
    )
    batch_size: Rows = Field(128, description="Rows of a training step, over all processes together.")
    accumulate: Rows = Field(
        1,
        description="The pieces in which the rows of a step pass, one after the other, before the weights move: less memory, and "
        "the same result, but that BatchNorm takes its statistics of each piece and dropout draws other numbers.",
    )
    eval_batch_size: Rows = Field(500, description="Rows that are evaluated at once, in each process.")
    phases: Annotated[dict[Count, PhaseSection], BeforeValidator(_by_number)] = Field(
        {}, description="What single phases do differently, by number, as {3: {epochs: 10}}."
    )
    precision: Literal["auto", "float32", "tf32", "bf16"] = Field(
        "auto",
        description=f"The numbers that networks are trained in, and measured in unless --precision says otherwise. "
        f"{described(PRECISION_CHOICES)}.",
    )
    deterministic: Switch = Field(
        False,
        description="Whether a GPU gives the same weights from the same seed, bit for bit, after a resume too, as a CPU always "
        "does. Slower algorithms are then taken where the fastest differ from run to run, and an operation that has no other "
        "form is an error.",
    )
    channels_last: Switch | Literal["auto"] = Field(
        "auto", description="Whether images lie in memory channel by channel for each pixel. auto: for convolutional networks."
    )
    compile: Switch | Literal["auto"] = Field(
        "auto",
        description="Whether training steps are compiled and run as CUDA graphs. auto: on a GPU, in phases that are long enough "
        "to gain from it; true: compiled on any device; false: neither.",
    )
    cache_features: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False, strict=True)] = Field(
        2e9,
        description="The bytes that each process may use to keep what heads read of a frozen backbone, so that the backbone runs "
        "once and not every epoch. Not used where augmentation is random. 0: off.",
    )
    checkpoint_activations: Switch = Field(
        False, description="Compute blocks again in the backward pass instead of keeping activations: less memory, more time."
    )
    seed: Seed = Field(
        0, description="What random weights, the order of rows and augmentation depend on. Splits depend on data.split_seed."
    )

    def plain(self) -> dict[str, Any]:
        """Return plain data without the keys that are not set, from which an equal recipe is made."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["backbone"]["args"] = self.backbone.model_dump(mode="json")["args"]  # where None is a value like any other
        return data

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_backbone(cls, value: Any) -> Any:
        """Fill in the tokenizer that belongs to `hf/NAME`, unless the recipe names another."""
        if not isinstance(value, Mapping):
            return value
        data, backbone = value.get("data"), value.get("backbone")
        if not (isinstance(data, Mapping) and isinstance(backbone, Mapping) and is_text(str(data.get("name")), kind_asked(data))):
            return value
        name = str(backbone.get("name"))
        if data.get("tokenizer") is not None or not name.startswith("hf/"):
            return value
        return {**value, "data": {**data, "tokenizer": name.removeprefix("hf/")}}

    @model_validator(mode="after")
    def _classes_to_balance(self) -> "Recipe":
        balanced = [key for key in ("metric", "class_weights") if getattr(self, key) == "balanced"]
        if balanced and self.data.task != "classification":
            of = "the target is a number" if self.data.task == "regression" else f"data.task is {self.data.task}"
            raise ValueError(f"{' and '.join(balanced)}: balanced is for classes, and {of}; leave it out")
        if "class_weights" in balanced and self.loss == "bce":
            raise ValueError("class_weights is balanced, and loss is bce, in which every row is of every class; leave one out")
        if "class_weights" in balanced and self.loss_weights == "l2w":
            raise ValueError("class_weights is balanced, and loss_weights l2w learns a weight for each row; leave one out")
        return self

    @model_validator(mode="after")
    def _one_objective(self) -> "Recipe":
        if self.loss_weights == "l2w" and self.optimizer.name == "lion":
            raise ValueError("loss_weights l2w differentiates a step of AdamW or SGD; set optimizer.name to one of them")
        if self.loss_weights == "l2w" and self.distillation.teacher != "none":
            raise ValueError("loss_weights l2w and distillation exclude each other; set distillation.teacher=none")
        return self

    @model_validator(mode="after")
    def _rows_to_accumulate(self) -> "Recipe":
        most = self.accumulate
        for number, own in [(None, PhaseSection()), *self.phases.items()]:
            place = f"phases.{number}."
            rows = (f"{place if own.batch_size else ''}batch_size", own.batch_size or self.batch_size)
            pieces = (f"{place if own.accumulate else ''}accumulate", own.accumulate or self.accumulate)
            if pieces[1] > rows[1]:
                raise ValueError(f"{pieces[0]} is {pieces[1]:,}, and {rows[0]} only {rows[1]:,}; a piece has at least a row")
            most = max(most, pieces[1])
        if most > 1 and self.loss_weights == "l2w":
            raise ValueError("loss_weights l2w takes each batch in two halves of its own; set accumulate=1")
        return self

    @model_validator(mode="after")
    def _recomputes_alone(self) -> "Recipe":
        if self.checkpoint_activations and self.compile is True:
            raise ValueError("checkpoint_activations and compile exclude each other; set one of them to false")
        if self.checkpoint_activations and self.loss_weights == "l2w":
            raise ValueError("loss_weights l2w differentiates its backward pass; set checkpoint_activations=false")
        return self

    @property
    def start(self) -> str | None:
        """The origin of the first weights, as `start_of` says it; None for a run that starts from a checkpoint."""
        return None if self.init is not None else start_of(self.backbone.model_dump())

    @model_validator(mode="after")
    def _fits_its_data(self) -> "Recipe":
        task, augment = self.data.task, self.data.augment
        if task != "classification" and self.label_smoothing:
            raise ValueError(f"label_smoothing is for classes, and data.task is {task}; set it to 0")
        if task != "classification" and self.loss == "bce":
            raise ValueError(f"loss is bce, which is for classes, and data.task is {task}, which has its own loss; leave it out")
        if task != "classification" and self.loss_weights == "l2w":
            raise ValueError(f"loss_weights: l2w ranks rows by the confidence of a classifier, and this is {task}; use uniform")
        if task != "classification" and (augment.mixup or augment.cutmix):
            raise ValueError(f"mixup and cutmix mix the classes of two images, and data.task is {task}; set both to 0")
        if self.bce_target_threshold is not None and self.loss != "bce":
            raise ValueError("bce_target_threshold is for loss: bce; leave it out")
        if self.data.is_text and self.data.tokenizer is None:
            raise ValueError("data.tokenizer: texts need one; name a folder or a hub id, or take a backbone hf/NAME")
        if self.data.is_text and self.channels_last is True:
            raise ValueError(f"channels_last is for images, and {self.data.name} holds text; leave it out")
        return self


# How the phase of ensembles trains where the recipe says nothing else: as the ViT script of gmum/Zero-Time-Waste.
ENSEMBLES = PhaseSection(epochs=2, lr=5e-3, weight_decay=0.0, batch_size=64)


def start_of(backbone: Mapping[str, Any]) -> str:
    """Say what a backbone section, as plain data, starts its weights from: `published`, a file's name, or `random`."""
    weights = backbone.get("weights")
    return "published" if backbone.get("pretrained") else Path(weights).name if weights else "random"


def phase_change(recipe: Recipe, phase: Phase) -> PhaseSection:
    """Return what `phase` does differently from the recipe: its entry in `phases`, which goes before the phase's own values."""
    own = recipe.phases.get(phase.number, PhaseSection())
    return ENSEMBLES.model_copy(update=own.model_dump(exclude_none=True)) if phase.combine else own


class ModelSpec(Section):
    """Everything that rebuilds a network without a recipe; every checkpoint holds one."""

    backbone: BackboneSection
    input_shape: tuple[Width, ...] = Field(
        min_length=2, max_length=3, description="Channels, height and width; for texts 3 and max_length."
    )
    num_outputs: Annotated[int, Field(ge=1, le=10**6, strict=True)] = Field(
        description="The number of classes or labels, of levels one less, or of the numbers of a regression."
    )
    after: tuple[Block, ...] = Field((), max_length=MOST_EXITS, description="The blocks that the attached exits follow, from 0.")
    heads: tuple[Annotated[ShortText, AfterValidator(_known_head)], ...] = Field(
        (), max_length=MOST_EXITS, description="The kind of each attached exit's head."
    )
    combine: Literal["geometric", "arithmetic"] | None = Field(
        None, description="The ensembles at the attached exits. Default: none."
    )

    @model_validator(mode="after")
    def _of_a_size_that_can_be_built(self) -> "ModelSpec":
        if math.prod(self.input_shape) > MOST_INPUTS:
            raise ValueError(f"input_shape is {list(self.input_shape)}; at most {MOST_INPUTS:,} numbers are taken")
        return self
