"""The recipe's sections `optimizer`, `schedule` and `ema`: how weights move, how fast, and what is averaged. No torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from eectl.recipe.choices import DECAY_CHOICES, described, listed
from eectl.recipe.section import Epochs, Factor, Fraction, Rate, RateOrZero, Section, Switch

LION_BETAS = (0.9, 0.99)


class WeightDecaySection(Section):
    """A weight decay, and the kinds of parameters that are left out of it."""

    value: RateOrZero = Field(description="How strongly weights are pulled to 0.")
    exclude: Annotated[tuple[Literal["norms", "biases", "positions"], ...], Field(max_length=len(DECAY_CHOICES))] = Field(
        ("norms", "biases", "positions"),
        description=f"The kinds of parameters that do not decay. {described(DECAY_CHOICES)}. Default: all three.",
    )


class OptimizerSection(Section):
    """The optimizer and its settings."""

    name: Literal["adamw", "sgd", "lion"] = Field(
        "adamw", description="AdamW; SGD with momentum; or timm's Lion, for which a tenth of AdamW's lr is usual."
    )
    lr: Rate = Field(1e-3, description="The highest learning rate; `schedule` says how it changes.")
    weight_decay: RateOrZero | WeightDecaySection = Field(
        0.0,
        description="How strongly weights are pulled to 0; decoupled in AdamW. A number is for all parameters; {value: 0.05, "
        f"exclude: [{listed(DECAY_CHOICES)}]}} leaves kinds of them out, all three where exclude is not given. "
        f"{described(DECAY_CHOICES)}.",
    )
    layer_decay: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False, strict=True)] = Field(
        1.0,
        description="The learning rate of a layer is this times that of the next: with n blocks, block i of 0 … n - 1 learns at "
        "lr · layer_decay^(n - i), the stem at lr · layer_decay^(n + 1), the network's head (its last norm included) and all "
        "attached exits at lr. 0.75 is usual for pretrained ViTs. 1: off.",
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999),
        description="AdamW's decay rates of the two moments; Lion's of what it steps by and of what it keeps, for which the "
        "default is [0.9, 0.99].",
    )
    momentum: Fraction = Field(0.9, description="SGD's momentum.")
    clip_norm: Factor | None = Field(
        None, description="Gradients with a larger norm than this are scaled down to it. Default: they are not."
    )

    @model_validator(mode="before")
    @classmethod
    def _lions_betas(cls, value: Any) -> Any:
        """Fill in the betas of Lion's authors where the recipe names none."""
        if isinstance(value, Mapping) and value.get("name") == "lion" and "betas" not in value:
            return {**value, "betas": LION_BETAS}
        return value

    @property
    def decay(self) -> WeightDecaySection:
        """The weight decay with what it leaves out, which is nothing where it is a number."""
        if isinstance(self.weight_decay, WeightDecaySection):
            return self.weight_decay
        return WeightDecaySection(value=self.weight_decay, exclude=())

    def changed(self, *, lr: float | None, weight_decay: float | None) -> "OptimizerSection":
        """Return these settings with another learning rate and weight decay; None leaves the one there is."""
        update: dict[str, Any] = {} if lr is None else {"lr": lr}
        if weight_decay is not None:
            update["weight_decay"] = self.decay.model_copy(update={"value": weight_decay}) if self.decay.exclude else weight_decay
        return self.model_copy(update=update)


class ScheduleSection(Section):
    """The learning rate as a function of the step; each phase starts it anew. Epochs are converted to steps."""

    name: Literal["cosine-restarts", "cosine", "constant"] = Field(
        "cosine-restarts",
        description="cosine-restarts: from lr to min_lr along a cosine, again and again; cosine: once over the phase; constant: "
        "always lr.",
    )
    cycle: Annotated[Epochs, Field(ge=1e-3)] = Field(10.0, description="cosine-restarts: epochs of the first cycle.")
    cycle_factor: Annotated[int, Field(ge=1, le=1000, strict=True)] = Field(
        2, description="cosine-restarts: each cycle is this many times as long as the one before."
    )
    min_lr: RateOrZero = Field(0.0, description="The learning rate at the end of a cosine.")
    warmup: Epochs = Field(0.0, description="Epochs in which the learning rate grows from 0 to lr, before the rest.")


class EmaSection(Section):
    """The moving average of the weights over a phase's steps, which each phase starts from its first weights."""

    decay: Fraction = Field(
        0.0,
        description="How much of the average stays at each step; 0.9999 and 0.999 are usual. What is validated, stopped on and "
        "saved are then the averaged weights, BatchNorm's statistics among them. 0: no average.",
    )
    warmup: Switch = Field(
        True,
        description="Whether the decay of step n, from 0, is at most 1 − (1 + n)^(−2/3), as in timm, so that first weights are "
        "soon forgotten.",
    )


def _decay_alone(value: Any) -> Any:
    """Read a plain number as the decay of a moving average."""
    if isinstance(value, Mapping | EmaSection):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("give the decay alone, such as 0.9999, or {decay: 0.9999, warmup: true}")
    return {"decay": value}


_EMA_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, EmaSection.model_json_schema()]}
Ema = Annotated[EmaSection, BeforeValidator(_decay_alone), WithJsonSchema(_EMA_SCHEMA)]
"""The key `ema`: the section, or its decay alone."""
