"""Pool convolutional maps as Shallow-Deep Networks do, in the operations and with the gradient that are fast on each device.

The backward pass is the library's sum of what each window passes back, but without atomic additions: it gives the same bits each
time on a GPU too, where the library's adaptive pooling raises under deterministic algorithms.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 4  # of the grid that a map is pooled over
LARGEST_TURNED = 32 * 32  # positions of a map up to which a CPU pools faster after bringing channels last


def pool_grid(x: Tensor) -> Tensor:
    """Return the maxima of all channels over a 4×4 grid of a map, then the means: [row, 2 · channel, 4, 4].

    Where the map is smaller than the grid, or does not divide by it, windows share positions. Of equal maxima in a window the
    first gets the gradient.
    """
    if x.shape[2:] == (SIDE, SIDE):
        return torch.cat([x, x], dim=1)
    if torch.compiler.is_exporting():
        return torch.cat([_exported_maxima(x), functional.adaptive_avg_pool2d(x, SIDE)], dim=1)
    library = x.is_cpu and torch.compiler.is_compiling()  # it fuses what it knows
    if not library and x.requires_grad and torch.is_grad_enabled():
        pooled: Tensor = _Pool.apply(x)
        return pooled
    x = _turned(x)
    kernel = _even_window(x)
    if kernel is None:
        return torch.cat([functional.adaptive_max_pool2d(x, SIDE), functional.adaptive_avg_pool2d(x, SIDE)], dim=1)
    return torch.cat([functional.max_pool2d(x, kernel), functional.avg_pool2d(x, kernel)], dim=1)


def mix_pools(pooled: Tensor, mix: Tensor) -> Tensor:
    """Return mix · max + (1 − mix) · mean of what `pool_grid` returned, [row, 16 · channel]; `mix` is one number."""
    largest, mean = pooled.chunk(2, dim=1)
    return (mix * largest + (1 - mix) * mean).flatten(1)


def _exported_maxima(x: Tensor) -> Tensor:
    """Return adaptive_max_pool2d in operations that ONNX has too."""
    for axis in (2, 3):
        x = torch.stack([x.narrow(axis, start, end - start).amax(axis) for start, end in _windows(x.shape[axis])], dim=axis)
    return x


def _windows(size: int) -> list[tuple[int, int]]:
    """Return where each adaptive window of an axis begins and ends."""
    return [(window * size // SIDE, -(-(window + 1) * size // SIDE)) for window in range(SIDE)]


def _even_window(x: Tensor) -> tuple[int, int] | None:
    """Return height and width of a map's windows where all are the same and share nothing; else None."""
    height, width = x.shape[2:]
    return None if height % SIDE or width % SIDE else (height // SIDE, width // SIDE)


def _turned(x: Tensor) -> Tensor:
    """Return a map with channels last where a CPU pools that faster: several times, though the map is copied for it."""
    if not x.is_cpu or x.shape[2] * x.shape[3] > LARGEST_TURNED:
        return x
    return x.contiguous(memory_format=torch.channels_last)


class _Pool(torch.autograd.Function):
    """Maxima and means of all windows; its derivative is that of `_Take` at the maxima's positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size, ctx.turn = x.shape[2:], _channels_last(x)
        x = _turned(x)
        kernel = _even_window(x)
        if kernel is None:
            largest, places = functional.adaptive_max_pool2d(x, SIDE, return_indices=True)
            mean = functional.adaptive_avg_pool2d(x, SIDE)
        else:
            largest, places = functional.max_pool2d(x, kernel, return_indices=True)
            mean = functional.avg_pool2d(x, kernel)
        ctx.save_for_backward(places)
        return torch.cat([largest, mean], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        return _spread(grad, places, ctx.size, ctx.turn)


class _Spread(torch.autograd.Function):
    """The derivative of `_Pool`, which is linear in the gradient, so that it can be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
        ctx.size, ctx.turn = size, channels_last
        ctx.save_for_backward(places)
        return _spread_now(grad, places, size, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _Take.apply(grad, places, ctx.size, ctx.turn), None, None, None


class _Take(torch.autograd.Function):
    """The values at the given place of each window, and the windows' means: the derivative of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
        ctx.size, ctx.turn = size, channels_last
        ctx.save_for_backward(places)
        taken = x.flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return torch.cat([taken, functional.adaptive_avg_pool2d(x, SIDE)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _spread(grad, places, ctx.size, ctx.turn), None, None, None


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _spread(grad: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Return the gradient of a map of `size`, from that of its maxima, which lie at `places`, and of its means.

    Args:
        grad: [row, 2 · channel, 4, 4].
        places: the position of each maximum in its map, counted row by row: int64 [row, channel, 4, 4].
        size: the map's height and width.
        channels_last: how the result lies in memory.
    """
    if torch.is_grad_enabled() and grad.requires_grad:
        spread: Tensor = _Spread.apply(grad, places, size, channels_last)
        return spread
    return _spread_now(grad, places, size, channels_last)


def _spread_now(grad: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
    largest, mean = grad.chunk(2, dim=1)
    if grad.is_cpu:
        return _spread_by_position(largest, mean, places, size, channels_last)
    if size[0] % SIDE or size[1] % SIDE:
        found = _spread_shared(largest, mean, places, size)
    else:
        found = _spread_even(largest, mean, places, size, channels_last)
    return found.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _spread_by_position(largest: Tensor, mean: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Spread the means by one matrix product and add the maxima where they belong, which a CPU does in order."""
    height, width = size
    largest, mean, places = largest.flatten(2), mean.flatten(2), places.flatten(2)
    dtype = largest.dtype
    if dtype.itemsize < 4:
        largest, mean = largest.float(), mean.float()
    shares = _shares(height, mean.dtype)[:, None, :, None] * _shares(width, mean.dtype)[:, None]
    shares = shares.view(SIDE * SIDE, height * width)
    if channels_last:
        found = shares.T @ mean.transpose(1, 2)  # [row, position, channel]
        found.scatter_add_(1, places.transpose(1, 2), largest.transpose(1, 2))
        return found.to(dtype).view(len(found), height, width, -1).permute(0, 3, 1, 2)
    return (mean @ shares).scatter_add_(2, places, largest).to(dtype).view(*mean.shape[:2], height, width)


def _shares(size: int, dtype: torch.dtype) -> Tensor:
    """Return the share that each position of an axis has in the mean of each adaptive window, [4, size]."""
    windows = _windows(size)
    shares = [[1 / (end - start) if start <= position < end else 0.0 for position in range(size)] for start, end in windows]
    return torch.tensor(shares, dtype=dtype)


def _spread_even(largest: Tensor, mean: Tensor, places: Tensor, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Give each position of a window the mean's share, and the one with the maximum that gradient too: nothing is added up."""
    height, width = (each // SIDE for each in size)
    positions = torch.arange(size[0] * size[1], device=places.device)
    share = mean / (height * width)
    here = largest + share
    if channels_last:
        places, share, here = (tensor.permute(0, 2, 3, 1)[:, :, None, :, None] for tensor in (places, share, here))
        found = torch.where(places == positions.view(SIDE, height, SIDE, width, 1), here, share)
        return found.reshape(len(found), *size, -1).permute(0, 3, 1, 2)
    places, share, here = (tensor[..., None, :, None] for tensor in (places, share, here))
    found = torch.where(places == positions.view(SIDE, height, SIDE, width), here, share)
    return found.reshape(*found.shape[:2], *size)


def _spread_shared(largest: Tensor, mean: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum at each position, in one order, what the windows it lies in pass back: it looks up its first window, its second, …."""
    positions = torch.arange(size[0] * size[1], device=places.device).view(size)
    parts = []
    for row, row_length in _windows_of(size[0], places.device):
        for column, column_length in _windows_of(size[1], places.device):
            window = (slice(None), slice(None), row[:, None], column)
            area = row_length[:, None] * column_length
            hit = (places[window] == positions) & area.isfinite()
            parts.append(torch.where(hit, largest[window], 0.0) + mean[window] / area)
    return torch.stack(parts).sum(dim=0).to(largest.dtype)


def _windows_of(size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return each position's first window of an axis, its second, …: number and length [size]; infinite where it has no such one.

    Computed on the device: a copy to it could not be part of a CUDA graph.
    """
    most = max(sum(start <= position < end for start, end in _windows(size)) for position in range(size))
    position = torch.arange(size, device=device)
    first, last = SIDE * position // size, (SIDE * (position + 1) - 1) // size
    found = []
    for number in range(most):
        window = first + number
        length = ((window + 1) * size + SIDE - 1) // SIDE - window * size // SIDE
        found.append((window.clamp(max=SIDE - 1), torch.where(window <= last, length.float(), torch.inf)))
    return found
