"""Pool convolutional maps as Shallow-Deep Networks do, with a backward pass that is fast on CPUs too."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 4  # of the grid that a map is pooled over


def pool_grid(x: Tensor) -> Tensor:
    """Return the maxima of all channels over a 4×4 grid of a map, then the means: [row, 2 · channel, 4, 4]."""
    return torch.cat([_maxima(x), _means(x)], dim=1)


def mix_pools(pooled: Tensor, mix: Tensor) -> Tensor:
    """Return mix · max + (1 − mix) · mean of what `pool_grid` returned, [row, 16 · channel]; `mix` is one number."""
    largest, mean = pooled.chunk(2, dim=1)
    return (mix * largest + (1 - mix) * mean).flatten(1)


def _maxima(x: Tensor) -> Tensor:
    """Return adaptive_max_pool2d, in operations that ONNX has too where the network is exported."""
    if not torch.compiler.is_exporting():
        return functional.adaptive_max_pool2d(x, SIDE)
    for axis in (2, 3):
        x = torch.stack([x.narrow(axis, start, end - start).amax(axis) for start, end in _windows(x.shape[axis])], dim=axis)
    return x


def _windows(size: int) -> list[tuple[int, int]]:
    """Return where each adaptive window of an axis begins and ends."""
    return [(window * size // SIDE, -(-(window + 1) * size // SIDE)) for window in range(SIDE)]


def _means(x: Tensor) -> Tensor:
    lies = x.is_cpu and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    if lies and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        means: Tensor = _Means.apply(x)
        return means
    return functional.adaptive_avg_pool2d(x, SIDE)


class _Means(torch.autograd.Function):
    """adaptive_avg_pool2d with another backward pass: two matrix products spread the gradient, one for each axis.

    PyTorch's own goes through a channels_last map element by element on a CPU. This one can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[2:]
        return functional.adaptive_avg_pool2d(x, SIDE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = ctx.size
        across = _shares(width, grad).T @ grad.permute(0, 2, 3, 1)  # [row, 4, width, channel]
        down = _shares(height, grad).T @ across.flatten(2)  # [row, height, width · channel]
        return down.view(*down.shape[:2], width, -1).permute(0, 3, 1, 2)


def _shares(size: int, like: Tensor) -> Tensor:
    """Return the share that each position of an axis has in the mean of each adaptive window, [4, size]."""
    table = like.new_zeros(SIDE, size)
    for window, (start, end) in enumerate(_windows(size)):
        table[window, start:end] = 1 / (end - start)
    return table
