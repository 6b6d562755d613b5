"""The recipe's sections `optimizer`, `schedule` and `ema`: how weights move, how fast, and what is averaged. No torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from eectl.recipe.section import Epochs, Factor, Fraction, Rate, RateOrZero, Section, Switch


class OptimizerSection(Section):
    """The optimizer and its settings."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum.")
    lr: Rate = Field(1e-3, description="The highest learning rate; `schedule` says how it changes.")
    weight_decay: RateOrZero = Field(0.0, description="How strongly weights are pulled to 0; decoupled in AdamW.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments.")
    momentum: Fraction = Field(0.9, description="SGD's momentum.")
    clip_norm: Factor | None = Field(
        None, description="Gradients with a larger norm than this are scaled down to it. Default: they are not."
    )


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
