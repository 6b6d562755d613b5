"""Gradient equilibrium (Li et al., 2019): each point of the backbone gets the mean of the exits' gradients, not their sum.

Values pass unchanged and only gradients are rescaled; the loss is the plain sum over exits. As in kalviny/IMTA,
models/msdnet_ge.py. Knows no network and no loss.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eectl.models.backbone import Hidden


class _Rescale(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def rescale(hidden: Hidden, factor: float) -> Hidden:
    """Return the same values, with a gradient that is multiplied by `factor` on its way back.

    Where there are several scales, only that of the last one is, which exits read: so does the source.

    Before the i-th (from 0) of n exits that take part the factor is 1 / (n - i), after it n - i - 1. On a network whose blocks
    form a chain this divides the gradient of each segment by the number of exits at or past its end, n - i, and leaves that of
    the heads as it is; an optimizer that takes no notice of a gradient's scale (AdamW, but for its epsilon and clipping) then
    hardly does anything else.
    """
    if factor == 1:
        return hidden
    if isinstance(hidden.x, Tensor):
        return replace(hidden, x=_Rescale.apply(hidden.x, factor))
    return replace(hidden, x=(*hidden.x[:-1], _Rescale.apply(hidden.x[-1], factor)))
