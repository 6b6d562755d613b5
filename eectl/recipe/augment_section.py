"""The recipe's section `data.augment`: how training images are varied. No torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from eectl.recipe.section import Fraction, Probability, Section, Switch

LEAST_ALPHA = 1e-3  # of Mixup and CutMix, where float32 still draws shares


def _off_or_enough(alpha: float) -> float:
    if 0 < alpha < LEAST_ALPHA:
        raise ValueError(f"input should be 0 (off), or from {LEAST_ALPHA:g}: below that one image of a pair takes all")
    return alpha


MixAlpha = Annotated[
    float, Field(ge=0, le=1e3, allow_inf_nan=False, strict=True), AfterValidator(_off_or_enough)
]  # of Mixup and CutMix


class RandAugmentSection(Section):
    """RandAugment: operations drawn for each image, all of them at one strength."""

    ops: Annotated[int, Field(ge=1, le=16, strict=True)] = Field(2, description="Operations for each image, one after the other.")
    magnitude: Annotated[int, Field(ge=0, le=30, strict=True)] = Field(
        9, description="How strong they are: one of torchvision's 31 steps, from 0."
    )


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
        "nearest", description="How TrivialAugmentWide, RandAugment or AutoAugment reads between pixels when it warps an image."
    )
    rand_augment: RandAugmentSection | None = Field(
        None, description="RandAugment, as torchvision has it; {} takes its defaults. Default: off."
    )
    auto_augment: Literal["imagenet", "cifar10", "svhn"] | None = Field(
        None,
        description="AutoAugment: for each image one of the 25 pairs of operations that were found for this data set. Default: "
        "off.",
    )
    three_augment: Switch = Field(
        False,
        description="3-Augment of DeiT III: each image is grey, solarized or blurred, and its colour jittered. Default: off.",
    )
    color_jitter: Fraction | None = Field(
        None,
        description="Multiply each image's brightness, contrast and saturation by random factors within 1 ± this, in random "
        "order. Default: 0.3 with three_augment, as in DeiT III, else 0: off.",
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
    repeats: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(
        1,
        description="Repeated augmentation: each image comes this often in a row, varied anew each time, and an epoch, which "
        "keeps its number of rows, has that many times fewer images.",
    )

    @property
    def is_random(self) -> bool:
        """True where two looks at one image may differ."""
        plain = {"trivial_interpolation": "nearest", "color_jitter": self.jitter or None, "repeats": 1}
        return self.model_copy(update=plain) != AugmentSection()

    @property
    def jitter(self) -> float:
        """How far factors of brightness, contrast and saturation may be from 1."""
        return (0.3 if self.three_augment else 0.0) if self.color_jitter is None else self.color_jitter

    @model_validator(mode="after")
    def _one_policy(self) -> "AugmentSection":
        chosen = [key for key in ("trivial", "rand_augment", "auto_augment", "three_augment") if getattr(self, key)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: each is a whole policy of its own; keep one")
        return self

    @model_validator(mode="after")
    def _varied_repeats(self) -> "AugmentSection":
        if self.repeats > 1 and not self.is_random:
            raise ValueError(
                f"repeats is {self.repeats}, and nothing varies an image, so they would be equal; vary it or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_range(self) -> "AugmentSection":
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1]:
            raise ValueError(f"resized_crop is {list(self.resized_crop)}; give two areas above 0, the smaller first")
        return self
