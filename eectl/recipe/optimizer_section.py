"""The recipe's sections `optimizer` and `schedule`: how weights move down a gradient, and how fast. No torch."""

from typing import Annotated, Literal

from pydantic import Field

from eectl.recipe.section import Epochs, Factor, Fraction, Rate, RateOrZero, Section


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
