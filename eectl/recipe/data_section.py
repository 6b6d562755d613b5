"""The recipe's section `data`: which data set and how it is split. No torch; reads no file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from eectl.core.errors import EectlError, closest
from eectl.recipe.augment_section import AugmentSection
from eectl.recipe.choices import (
    COPY_CHOICES,
    DAMAGE_CHOICES,
    HUB_CHOICES,
    HUB_PREFIX,
    IMAGE_CHOICES,
    KIND_CHOICES,
    TASK_CHOICES,
    TEXT_CHOICES,
    TaskName,
    described,
    listed,
)
from eectl.recipe.data_paths import expand
from eectl.recipe.section import (
    Count,
    Factor,
    PathText,
    Pixels,
    Section,
    Share,
    ShortText,
    Switch,
    whole_or_none,
)
from eectl.recipe.text_sets import TEXT_SETS, is_text, kind_asked

OWN_FILES = ("folder", "text", "wds")  # data sets of the user's own, which may lack a test split; so may those of a library
MOST_TARGETS = 10_000  # columns, or levels
ROOTLESS = ("digits",)  # data sets that need no folder
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MOST_PATTERNS = 100  # of a split's shards
HEX_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


def _one_or_more(value: Any) -> Any:
    """Read one text without a list around it."""
    return (value,) if isinstance(value, str) else value


_PATTERNS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_PATTERNS},
        {"type": "null"},
    ]
}
Patterns = Annotated[
    Annotated[tuple[ShortText, ...], Field(min_length=1, max_length=MOST_PATTERNS)] | None,
    BeforeValidator(_one_or_more),
    WithJsonSchema(_PATTERNS_SCHEMA),
]


class ShardsSection(Section):
    """Which shards hold which split, relative to `data.root`, and the order in which their rows are read to train."""

    train: Patterns = Field(
        None,
        description="The shards to train on, such as 'train-{000..099}.tar' or 'train/*.tar', or several of these. Default: "
        "train*.tar and train/*.tar.",
    )
    validation: Patterns = Field(
        None, description="Those of early stopping. Default: val*.tar and val/*.tar where there are some."
    )
    calibration: Patterns = Field(None, description="Those of thresholds. Default: calibration*.tar and calibration/*.tar.")
    test: Patterns = Field(None, description="Those that results are reported on. Default: test*.tar and test/*.tar.")
    buffer: Annotated[int, Field(ge=1, le=10**9, strict=True)] = Field(
        10_000,
        description="Shards that are not kept in memory are read to train one after another, in a random order, and of the next "
        "so many rows a random one is taken. With as many as there are training rows any order may come, in leaps.",
    )
    damaged: Literal["error", "skip"] = Field(
        "error", description=f"What becomes of a shard that is cut short. {described(DAMAGE_CHOICES)}."
    )


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
    known = (*IMAGE_CHOICES, *TEXT_CHOICES, *HUB_CHOICES)
    if name.startswith(HUB_PREFIX):
        own = name.removeprefix(HUB_PREFIX)
        if not own.startswith((".", "/", "~")) and not HUB_NAME.fullmatch(own):
            raise ValueError(
                f"'{name[:200]}' names no data set of the hub, which is hfds/OWNER/NAME, nor a folder, which is hfds/./FOLDER"
            )
    elif name not in known:
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

    name: Annotated[ShortText, AfterValidator(_known_data)] = Field(
        "digits",
        description=f"The data set. {described(IMAGE_CHOICES | TEXT_CHOICES | HUB_CHOICES)}.",
        json_schema_extra={
            "anyOf": [{"enum": [*IMAGE_CHOICES, *TEXT_CHOICES]}, {"pattern": "^hfds/"}],
        },
    )
    kind: Literal["images", "texts"] | None = Field(
        None,
        description=f"What hfds/NAME holds. {described(KIND_CHOICES)}. Default: texts where data.text is given, else images.",
    )
    root: PathText = Field(
        Path("data"),
        description="The folder with the data set, relative to where eectl runs. For `text`, and for `folder` with images in "
        "Parquet, it may be one file, which is then the training file; for `wds` the training shards, as in "
        "'shards/train-{000..099}.tar'. digits and hfds/NAME need none.",
    )
    shards: ShardsSection | None = Field(
        None, description="Which shards of `wds` hold which split, and how they are read. Default: told by their names."
    )
    variant: ShortText | None = Field(
        None,
        description="Which published form of the data set: full, 320px or 160px of imagenette; of hfds/NAME the name of a "
        "configuration. Default: the one that is there.",
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
    epoch_rows: Annotated[int, Field(ge=1, le=10**8, strict=True)] | None = Field(
        None,
        description="The rows of an epoch; the next one goes on where it ended, in passes over all rows, each in an order of its "
        "own. Default: an epoch is one pass.",
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
        tuple[ShortText, ...], BeforeValidator(_one_or_more), Field(min_length=1, max_length=2), WithJsonSchema(_TEXT_SCHEMA)
    ] = Field(
        ("text",),
        description="The column with the text, or the two columns of a pair of texts. Published data sets bring their own.",
    )
    image: ShortText | None = Field(
        None,
        description="The column with the images, of hfds/NAME and Parquet; the extension of their members, of wds. Default: the "
        "only one there is.",
    )
    target: ShortText | Annotated[tuple[ShortText, ...], Field(min_length=1, max_length=MOST_TARGETS)] = Field(
        "label",
        description="The column to predict, of texts, or of images in a table or listed in metadata.csv; the key of a shard's "
        "JSON. For regression and multilabel several may be named, as [a, b]; one column of labels has them as a list, as a|b, "
        "or as a 0 or 1 for each. Published data sets bring their own; hfds/NAME and Parquet of images the only one that the "
        "task may have, where there is no column label.",
    )
    task: TaskName = Field("classification", description=f"What the target of data of your own is. {described(TASK_CHOICES)}.")
    levels: Annotated[tuple[ShortText, ...], Field(min_length=2, max_length=MOST_TARGETS)] | None = Field(
        None,
        description="ordinal: the classes in their order, the lowest first. Default: those of the training rows, which must then "
        "be whole numbers.",
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
        return is_text(self.name, self.kind)

    @property
    def is_of_library(self) -> bool:
        """True where the datasets library has the data set, by an id on the hub or in a folder."""
        return self.name.startswith(HUB_PREFIX)

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns that `target` names."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def folder(self) -> Path:
        """The folder, or file, that `root` names, with the user's home in place of ~."""
        return expand(self.root)

    def at(self, root: Path | None) -> "DataSection":
        """Return the section with its data in `root` (None: where it says); raises EectlError where the data set needs none."""
        if root is None:
            return self
        if self.name in ROOTLESS or self.is_of_library:
            raise EectlError(f"--data-root {root}: {self.name} needs no data.root; leave it out")
        return self.model_copy(update={"root": root})

    @model_validator(mode="before")
    @classmethod
    def _known_columns(cls, value: Any) -> Any:
        """Fill in the columns and the task of a published data set, and what one of the datasets library holds."""
        if not isinstance(value, Mapping):
            return value
        known = TEXT_SETS.get(str(value.get("name")))
        own = {} if known is None else {"text": known.text, "target": known.target, "task": known.task}
        kind = kind_asked(value)
        return own | dict(value) | ({} if kind is None else {"kind": kind})

    @model_validator(mode="after")
    def _needs_its_root(self) -> "DataSection":
        if (self.name in ROOTLESS or self.is_of_library) and self.root != type(self).model_fields["root"].default:
            raise ValueError(f"root is '{self.root}', and {self.name} needs none; leave out data.root (--data-root)")
        return self

    @model_validator(mode="after")
    def _something_left(self) -> "DataSection":
        shares = {"validation": self.validation, "calibration": self.calibration} | ({"test": self.test} if self.test else {})
        if sum(shares.values()) >= 1:
            raise ValueError(f"{' + '.join(shares)} is {sum(shares.values()):g}; it must leave training rows")
        if self.test is not None and not self.is_of_library and self.name not in OWN_FILES:
            raise ValueError(f"test is {self.test:g}, and {self.name} has a test split of its own; leave it out")
        return self

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> "DataSection":
        foreign, other = (_IMAGE_KEYS, "images") if self.is_text else (_TEXT_KEYS, "text")
        both = ("variant",) if self.is_of_library else ()
        changed = [key for key in foreign if key not in both and getattr(self, key) != type(self).model_fields[key].get_default()]
        if changed:
            verb = "is" if len(changed) == 1 else "are"
            kind = "text" if self.is_text else "images"
            it = "it" if len(changed) == 1 else "them"
            raise ValueError(f"{', '.join(changed)} {verb} for {other}, and {self.name} holds {kind}; leave {it} out")
        own = [key for key in _TARGET_KEYS if getattr(self, key) != type(self).model_fields[key].get_default()]
        if own and not (self.is_text or self.is_of_library or self.name in OWN_FILES):
            it, verb = ("it", "is") if len(own) == 1 else ("them", "are")
            raise ValueError(
                f"{listed(own)} {verb} for data of your own ({listed(OWN_FILES)}) and hfds/NAME, and this is {self.name}; leave "
                f"{it} out"
            )
        known = TEXT_SETS.get(self.name)
        if known is not None and (self.text, self.target, self.task) != (known.text, known.target, known.task):
            raise ValueError(f"{self.name} has its own columns and task ({known.task}); leave out text, target and task")
        if self.strip and self.name != "20newsgroups":
            raise ValueError(f"strip is for 20newsgroups, and this is {self.name}; leave it out")
        return self

    @model_validator(mode="after")
    def _targets_of_its_task(self) -> "DataSection":
        if len(self.targets) > 1 and self.task not in ("regression", "multilabel"):
            raise ValueError(f"target names {len(self.targets)} columns, and {self.task} has one; name one")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"target has a column twice: {listed(self.targets)}")
        if self.levels is not None and self.task != "ordinal":
            raise ValueError(f"levels are for task ordinal, and this is {self.task}; leave them out")
        if self.levels is not None and len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels has one twice: {listed(self.levels)}")
        return self

    @model_validator(mode="after")
    def _keys_of_one_source(self) -> "DataSection":
        if self.kind is not None and not self.is_of_library:
            raise ValueError(f"kind is for hfds/NAME, and {self.name} says itself what it holds; leave it out")
        if self.shards is not None and self.name != "wds":
            raise ValueError(f"shards is for wds, and this is {self.name}; leave it out")
        if self.image is not None and not self.is_of_library and self.name not in ("folder", "wds"):
            raise ValueError(f"image is for hfds/NAME, wds and Parquet in a folder, and this is {self.name}; leave it out")
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


def num_outputs(task: str, *, num_classes: int, num_targets: int) -> int:
    """Return how many outputs a network has: a logit per class or label, one less than levels, or a number per target."""
    if task == "regression":
        return max(num_targets, 1)
    return num_classes - 1 if task == "ordinal" else num_classes


def describe_outputs(task: str, outputs: int) -> str:
    """Return in words what a network with so many outputs gives."""
    words = {
        "classification": f"{outputs} classes",
        "regression": "a number (regression)" if outputs == 1 else f"{outputs} numbers (regression)",
        "multilabel": f"{outputs} labels (multilabel)",
        "ordinal": f"{outputs + 1} levels (ordinal)",
    }
    return words[task]


_IMAGE_KEYS = (
    "image",
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
_TEXT_KEYS = ("text", "tokenizer", "max_length", "strip")
_TARGET_KEYS = ("target", "task", "levels")  # of data of one's own
