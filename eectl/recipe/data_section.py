"""The recipe's section `data`: which data set, how it is split, and how training images are varied. No torch; reads no file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from eectl.core.errors import EectlError, closest
from eectl.recipe.choices import COPY_CHOICES, IMAGE_CHOICES, TEXT_CHOICES, described, listed
from eectl.recipe.data_paths import expand
from eectl.recipe.section import (
    Count,
    Factor,
    Fraction,
    PathText,
    Pixels,
    Probability,
    Section,
    Share,
    ShortText,
    Switch,
    whole_or_none,
)
from eectl.recipe.text_sets import TEXT_SETS, is_text

OWN_FILES = ("folder", "text")  # data sets of the user's own, which may lack a test split
LEAST_ALPHA = 1e-3  # of Mixup and CutMix, where float32 still draws shares
ROOTLESS = ("digits",)  # data sets that need no folder
HEX_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


def _off_or_enough(alpha: float) -> float:
    if 0 < alpha < LEAST_ALPHA:
        raise ValueError(f"input should be 0 (off), or from {LEAST_ALPHA:g}: below that one image of a pair takes all")
    return alpha


MixAlpha = Annotated[
    float, Field(ge=0, le=1e3, allow_inf_nan=False, strict=True), AfterValidator(_off_or_enough)
]  # of Mixup and CutMix


class AugmentSection(Section):
    """The variation of training images, in this order, a batch at a time on the device.

    Validation, calibration and test images are never varied.
    """

    resized_crop: tuple[Probability, Probability] | None = Field(
        None,
        description="Cut a random box out of each image and bring it to size: [smallest, largest] share of its area, such as "
        "[0.35, 1.0]. Default: no such crop.",
    )
    trivial: Switch = Field(False, description="TrivialAugmentWide: one random operation for each image. Default: off.")
    trivial_interpolation: Literal["nearest", "bilinear", "bicubic"] = Field(
        "nearest", description="How TrivialAugmentWide reads between pixels when it warps an image."
    )
    crop: Annotated[int, Field(ge=0, le=8192, strict=True)] = Field(
        0, description="Pad each image by this many pixels and cut a random square of the old size out of it. 0: off."
    )
    flip: Switch = Field(False, description="Mirror each image from left to right with probability 1/2. Default: off.")
    rotation: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False, strict=True)] = Field(
        0.0, description="Turn each image by a random angle of up to this many degrees either way. 0: off."
    )
    contrast: Fraction = Field(0.0, description="Multiply each image's contrast by a random factor within 1 ± this. 0: off.")
    erasing: Probability = Field(0.0, description="The probability that a random box of an image is erased. 0: off.")
    mixup: MixAlpha = Field(0.0, description="Mixup's alpha: images of a batch are blended in pairs. 0: off.")
    cutmix: MixAlpha = Field(
        0.0,
        description="CutMix's alpha: boxes of images are swapped in pairs. 0: off. With Mixup on too, a fair coin decides for "
        "each batch.",
    )

    @property
    def is_random(self) -> bool:
        """True where two looks at one image may differ."""
        return self.model_copy(update={"trivial_interpolation": "nearest"}) != AugmentSection()

    @model_validator(mode="after")
    def _a_range(self) -> "AugmentSection":
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1]:
            raise ValueError(f"resized_crop is {list(self.resized_crop)}; give two areas above 0, the smaller first")
        return self


class LimitSection(Section):
    """The most rows that each split may have; rows are drawn by class and by `split_seed`."""

    train: Count | None = Field(None, description="At most this many rows to train on. Default: all that are left.")
    validation: Count | None = Field(None, description="At most this many rows for early stopping. Default: all.")
    calibration: Count | None = Field(None, description="At most this many rows for thresholds. Default: all.")
    test: Count | None = Field(None, description="At most this many rows to report results on. Default: all.")

    def of(self, split: str) -> int | None:
        """Return the most rows that `split` may have; None: no limit."""
        limit: int | None = getattr(self, split)
        return limit


def _of_train(value: Any) -> Any:
    """Read a plain number as the limit of the training rows."""
    if value is None:
        return LimitSection()
    if isinstance(value, int) and not isinstance(value, bool):
        return {"train": value}
    if not isinstance(value, (Mapping, LimitSection)):
        raise ValueError("give a number of training rows, or numbers by split, such as {train: 5000, test: 1000}")
    return value


def _known_data(name: str) -> str:
    known = (*IMAGE_CHOICES, *TEXT_CHOICES)
    if name not in known:
        raise ValueError(f"unknown data set '{name}'{closest(name, known)}; known: {listed(known)}")
    return name


def _colour(value: Any) -> Any:
    """Check a colour's name, as Pillow knows them, or #rrggbb."""
    if value is None or not isinstance(value, str):
        raise ValueError("give a colour's name, such as white, or '#rrggbb' in quotes, since # begins a comment in YAML")
    if value == "white" or HEX_COLOUR.fullmatch(value):
        return value
    from PIL.ImageColor import colormap

    if value.lower() not in colormap:
        raise ValueError(f"unknown colour{closest(value.lower(), colormap)}; give a name, such as white, or '#rrggbb' in quotes")
    return value


def _one_or_two(value: Any) -> Any:
    """Read one column without a list around it."""
    return (value,) if isinstance(value, str) else value


_COUNT_SCHEMA = {"type": "integer", "minimum": 1, "maximum": 10**9}
_LIMIT_SCHEMA = {
    "anyOf": [
        _COUNT_SCHEMA,
        {
            "type": "object",
            "properties": {
                name: {"anyOf": [_COUNT_SCHEMA, {"type": "null"}], "description": field.description}
                for name, field in LimitSection.model_fields.items()
            },
            "additionalProperties": False,
        },
    ]
}
_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2}]}


_Mean = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False, strict=True)]


def _one_for_each_channel(
    normalize: str | tuple[tuple[float, ...], tuple[float, ...]],
) -> str | tuple[tuple[float, ...], tuple[float, ...]]:
    if not isinstance(normalize, str) and (len(normalize[0]) != len(normalize[1]) or len(normalize[0]) not in (1, 3)):
        means, deviations = map(len, normalize)
        raise ValueError(f"{means} means and {deviations} deviations; give one of each for grey images, three for colour")
    return normalize


class DataSection(Section):
    """Which data set, how it is split, and how training images are varied."""

    name: Annotated[str, AfterValidator(_known_data)] = Field(
        "digits",
        description=f"The data set. {described(IMAGE_CHOICES | TEXT_CHOICES)}.",
        json_schema_extra={"enum": [*IMAGE_CHOICES, *TEXT_CHOICES]},
    )
    root: PathText = Field(
        Path("data"),
        description="The folder with the data set, relative to where eectl runs. For `text` it may be one file, which is then "
        "the training file. digits needs none.",
    )
    variant: ShortText | None = Field(
        None,
        description="Which published form of the data set: full, 320px or 160px of imagenette. Default: the one that is there.",
    )
    image_size: Pixels | None = Field(
        None, description="The side in pixels of the squares that images become. Default: the size that the data set has."
    )
    resize: Pixels | None = Field(
        None,
        description="The pixels that the short side of an image file is brought to before the centre square of `image_size` is "
        "cut out. Default: image_size.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="How images are resized.")
    channels: Annotated[Literal[1, 3] | None, BeforeValidator(whole_or_none)] = Field(
        None, description="1 makes all images grey, 3 makes them colour. Default: as the data set has them; 3 for a folder."
    )
    background: Annotated[str, BeforeValidator(_colour)] = Field(
        "white",
        description="The colour behind the transparent pixels of images, in training and in predict: a name, such as black, or "
        "'#rrggbb' in quotes.",
    )
    normalize: Annotated[
        Literal["auto", "imagenet"] | tuple[tuple[_Mean, ...], tuple[Factor, ...]], AfterValidator(_one_for_each_channel)
    ] = Field(
        "auto",
        description="What is subtracted from pixels (in 0..1) and what they are divided by. auto: the data set's own mean and "
        "standard deviation (those of ImageNet for a folder); imagenet; or [means, deviations], one of each per channel. With "
        "published weights hf/NAME the default is what their preprocessor_config.json says, and so are image_size, resize, "
        "interpolation and channels.",
    )
    validation: Share = Field(
        0.1,
        description="The share of the training rows that early stopping watches, drawn by class. Not used where the data set has "
        "validation rows of its own.",
    )
    calibration: Share = Field(
        0.1, description="The share of the training rows that exit thresholds are chosen on, drawn by class."
    )
    test: Share | None = Field(
        None,
        description="The share of the training rows that results are reported on, drawn by class, for data of your own without "
        "test rows. Default: none; evaluate, bench and report then have nothing to report on.",
    )
    split_seed: Annotated[int, Field(ge=0, le=10**18, strict=True)] = Field(
        42, description="What the draws of validation, calibration and test rows and of limits depend on."
    )
    copies: Literal["error", "drop", "keep"] = Field(
        "error",
        description=f"What becomes of rows that stand in two splits, by content. {described(COPY_CHOICES)}.",
    )
    limit: Annotated[
        LimitSection,
        BeforeValidator(_of_train),
        WithJsonSchema(_LIMIT_SCHEMA),
    ] = Field(
        LimitSection(),
        description="The most rows to use, drawn by class: a number of training rows, or numbers by split, such as "
        "{train: 5000, validation: 500, test: 1000}. Default: all rows.",
    )
    in_memory: Switch | Literal["auto"] = Field(
        "auto",
        description="true keeps all images on the device, false reads files as needed. auto: in memory up to 4 GB of pixels.",
    )
    workers: Annotated[int, Field(ge=0, le=1024, strict=True)] = Field(
        4, description="Processes that read image files when these are not kept in memory; 0 reads them in the main process."
    )
    augment: AugmentSection = AugmentSection()
    text: Annotated[
        tuple[ShortText, ...], BeforeValidator(_one_or_two), Field(min_length=1, max_length=2), WithJsonSchema(_TEXT_SCHEMA)
    ] = Field(
        ("text",),
        description="The column with the text, or the two columns of a pair of texts. Published data sets bring their own.",
    )
    target: ShortText = Field("label", description="The column to predict, for texts. Published data sets bring their own.")
    task: Literal["classification", "regression"] = Field(
        "classification",
        description="What the target of texts is: a class, scored by accuracy, or a number, scored by mean squared error.",
    )
    tokenizer: ShortText | None = Field(
        None,
        description="The tokenizer for texts: a folder, or an id on the Hugging Face hub. Default: that of backbone hf/NAME.",
    )
    max_length: Annotated[int, Field(ge=3, le=65_536, strict=True)] = Field(
        128, description="The most tokens of a text (special ones included); longer texts are cut, and a note says how many."
    )
    strip: tuple[Literal["headers", "footers", "quotes"], ...] = Field(
        (),
        max_length=3,
        description="What is taken out of the posts of 20newsgroups, by scikit-learn's rules. Default: nothing, since the paper "
        "names no stripping.",
    )

    @property
    def is_text(self) -> bool:
        """True where the data set holds texts, and not images."""
        return is_text(self.name)

    @property
    def folder(self) -> Path:
        """The folder, or file, that `root` names, with the user's home in place of ~."""
        return expand(self.root)

    def at(self, root: Path | None) -> "DataSection":
        """Return the section with its data in `root` (None: where it says); raises EectlError where the data set needs none."""
        if root is None:
            return self
        if self.name in ROOTLESS:
            raise EectlError(f"--data-root {root}: {self.name} needs no data on disk; leave it out")
        return self.model_copy(update={"root": root})

    @model_validator(mode="before")
    @classmethod
    def _known_columns(cls, value: Any) -> Any:
        """Fill in the columns and the task of a published data set."""
        if not isinstance(value, Mapping):
            return value
        known = TEXT_SETS.get(str(value.get("name")))
        own = {} if known is None else {"text": known.text, "target": known.target, "task": known.task}
        return own | dict(value)

    @model_validator(mode="after")
    def _needs_its_root(self) -> "DataSection":
        if self.name in ROOTLESS and self.root != type(self).model_fields["root"].default:
            raise ValueError(f"root is '{self.root}', and {self.name} needs no data on disk; leave out data.root (--data-root)")
        return self

    @model_validator(mode="after")
    def _something_left(self) -> "DataSection":
        shares = {"validation": self.validation, "calibration": self.calibration} | ({"test": self.test} if self.test else {})
        if sum(shares.values()) >= 1:
            raise ValueError(f"{' + '.join(shares)} is {sum(shares.values()):g}; it must leave training rows")
        if self.test is not None and self.name not in OWN_FILES:
            raise ValueError(f"test is {self.test:g}, and {self.name} has a test split of its own; leave it out")
        return self

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> "DataSection":
        foreign, other = (_IMAGE_KEYS, "images") if self.is_text else (_TEXT_KEYS, "text")
        changed = [key for key in foreign if getattr(self, key) != type(self).model_fields[key].get_default()]
        if changed:
            verb = "is" if len(changed) == 1 else "are"
            kind = "text" if self.is_text else "images"
            it = "it" if len(changed) == 1 else "them"
            raise ValueError(f"{', '.join(changed)} {verb} for {other}, and {self.name} holds {kind}; leave {it} out")
        known = TEXT_SETS.get(self.name)
        if known is not None and (self.text, self.target, self.task) != (known.text, known.target, known.task):
            raise ValueError(f"{self.name} has its own columns and task ({known.task}); leave out text, target and task")
        if self.strip and self.name != "20newsgroups":
            raise ValueError(f"strip is for 20newsgroups, and this is {self.name}; leave it out")
        return self

    @model_validator(mode="after")
    def _normalized_by_channel(self) -> "DataSection":
        if self.channels is not None and not isinstance(self.normalize, str) and len(self.normalize[0]) != self.channels:
            raise ValueError(f"normalize has {len(self.normalize[0])} means, and channels is {self.channels}; give one for each")
        return self

    @model_validator(mode="after")
    def _room_for_the_crop(self) -> "DataSection":
        if self.resize is not None and self.resize < (self.image_size or self.resize + 1):
            wanted = "it needs image_size" if self.image_size is None else f"it must be image_size, {self.image_size}, or more"
            raise ValueError(f"resize is {self.resize}; {wanted}, the square that is cut out of the resized image")
        return self


_IMAGE_KEYS = (
    "image_size",
    "channels",
    "background",
    "normalize",
    "in_memory",
    "workers",
    "augment",
    "variant",
    "resize",
    "interpolation",
)
_TEXT_KEYS = ("text", "target", "task", "tokenizer", "max_length", "strip")
