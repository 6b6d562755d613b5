"""The adapters of transformers' image classifiers whose layers run in a row, as `tower` runs them: of tokens, and of maps.

A block is a layer or, where stages lie in one list, a stage. How tokens lie in the image is found by changing its corners. Builds
no network.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.models.adapters.tower import (
    ROWS,
    CannotBeCutError,
    Layout,
    Recorded,
    finish,
    layers_at_the_end,
    layout_on_meta,
    look_for_layers,
    reasons_for,
    record,
    run_layer,
    while_looked_at,
)
from eectl.models.adapters.transformers_parts import library_names
from eectl.models.backbone import Backbone, Feature, Hidden, MapFeature, TokenFeature

_MOST_PREFIX = 16  # class, distillation and register tokens


@dataclass(frozen=True)
class Grid:
    """How the tokens of the first hidden state lie in the image: `prefix` special ones, then patches, row by row."""

    height: int
    width: int
    prefix: int


@dataclass(frozen=True)
class ScatteredFeature(TokenFeature):
    """Tokens that do not lie in the image row by row."""

    def map(self) -> Tensor:
        raise EectlError(
            "exits.head: this kind pools over height and width, which this network's tokens do not keep; take linear or mlp-WIDTH"
        )


class ImageTower(Backbone):
    """The adapter of networks of tokens: ViT, DINOv2, BEiT and their like, and Swin's stages.

    What layers are called with depends on the images' size and not on what they show, so it is found anew, from one black image,
    where rows have left.

    Raises:
        CannotBeCutError: where the network does not run so. It is looked at with two images, except on the device meta.
    """

    net: Any

    def __init__(self, net: Any, input_shape: Sequence[int], layout: Layout, expected: Tensor | None) -> None:
        super().__init__(net, block_names=layout.blocks, head_names=layout.after, classifiers=layers_at_the_end(net, layout))
        self._layout = layout
        self._shape = tuple(input_shape)
        self._grid: Grid | None = None
        if expected is not None:
            with reasons_for("images"), while_looked_at(net):
                self._check_bits(expected)
                self._grid = self._find_grid()

    def stem(self, inputs: Tensor) -> Hidden:
        x, recorded = record(self.net, self._layout, {"pixel_values": inputs})
        return Hidden(x, known=recorded)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        assert isinstance(hidden.x, Tensor)
        recorded = self._known(hidden)
        return replace(hidden, x=run_layer(self.net, self._layout, recorded, index, hidden.x), known=recorded)

    def head(self, hidden: Hidden) -> Tensor:
        assert isinstance(hidden.x, Tensor)
        unread = {"pixel_values": self._black(len(hidden.x), hidden.x.device)}
        logits: Tensor = finish(self.net, self._layout, self._known(hidden), hidden.x, unread).logits
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        grid = self._grid
        if hidden.x.dim() == 4:
            return MapFeature(hidden.x)
        size = None if grid is None else _size_at(grid, hidden.x.shape[1])
        if grid is None or size is None:
            return ScatteredFeature(hidden.x, (0, 0), prefix=0, has_cls=False)
        return TokenFeature(hidden.x, size, prefix=grid.prefix, has_cls=grid.prefix > 0)

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return library_names(self.net, weights)

    def _known(self, hidden: Hidden) -> Recorded:
        """Return what the layers are called with: as noted before, or found anew where rows have left or come."""
        if isinstance(hidden.known, Recorded):
            return hidden.known
        assert isinstance(hidden.x, Tensor)
        return record(self.net, self._layout, {"pixel_values": self._black(1, hidden.x.device)})[1]

    def _black(self, rows: int, device: torch.device) -> Tensor:
        """Return black images that take the memory of one number."""
        return torch.zeros((), dtype=next(self.net.parameters()).dtype, device=device).expand(rows, *self._shape)

    def _check_bits(self, expected: Tensor) -> None:
        """Raise CannotBeCutError where the parts do not give the library's logits, with what is noted and with it found anew."""
        images = _example_images(self.net, self._shape)
        found = self(images)
        x = self.stem(images).x
        for index in range(self.depth):
            x = self.block(index, Hidden(x)).x
        if not (torch.equal(found, expected) and torch.equal(self.head(Hidden(x)), expected)):
            raise CannotBeCutError("its layers depend on more than the hidden state of the layer before")

    def _find_grid(self) -> Grid | None:
        """Return the grid in which a change of the image's corners changes the tokens of these corners most; else None."""
        for side, grid in _grids(self._shape[1], self._shape[2], self._layout.shape[1]):
            right, low, half = (grid.width - 1) * side, (grid.height - 1) * side, side // 2
            found = self._most_changed(half, right + half), self._most_changed(low + half, half)
            if found == (grid.prefix + grid.width - 1, grid.prefix + (grid.height - 1) * grid.width):
                return grid
        return None

    def _most_changed(self, row: int, column: int) -> int:
        """Return the place of the first hidden state that changes most where one pixel of a black image becomes white."""
        height, width = self._shape[1:]
        images = self._black(ROWS, next(self.net.parameters()).device).contiguous()
        images[1, :, min(row, height - 1), min(column, width - 1)] = 1
        x = self.stem(images).x
        assert isinstance(x, Tensor)
        change = (x[1] - x[0]).abs()
        return int(change.sum(dim=0 if x.dim() == 4 else -1).flatten().argmax())


class MapTower(ImageTower):
    """The adapter of networks of maps [row, channel, height, width]: ConvNeXt, ResNet and their like."""

    default_head = "sdn"
    prefers_channels_last = True

    def _find_grid(self) -> None:
        """Raise CannotBeCutError where the corners of a map are not the image's."""
        height, width = self._shape[1:]
        rows, columns = self._layout.shape[2:]
        right, low = width - width // columns // 2 - 1, height - height // rows // 2 - 1
        top_right, bottom_left = self._most_changed(0, right), self._most_changed(low, 0)
        near = (top_right // columns, columns - 1 - top_right % columns, rows - 1 - bottom_left // columns, bottom_left % columns)
        if max(near) > 1:  # pooling may move a change by one
            raise CannotBeCutError("its hidden states are no maps [row, channel, height, width]")


def image_tower(net: Any, input_shape: Sequence[int]) -> ImageTower:
    """Return the adapter of an image classifier for images of one size; raises CannotBeCutError where there is none."""
    if next(net.parameters()).is_meta:
        return ImageTower(net, input_shape, layout_on_meta(net), None)
    images = _example_images(net, input_shape)
    with reasons_for("images"):
        layout, output = look_for_layers(net, {"pixel_values": images}, check=_check_form)
    expected = getattr(output, "logits", None)
    if not isinstance(expected, Tensor):
        raise CannotBeCutError("its classifier gives no logits")
    return (MapTower if len(layout.shape) == 4 else ImageTower)(net, input_shape, layout, expected)


def _example_images(net: Any, input_shape: Sequence[int]) -> Tensor:
    """Return images of noise, always the same."""
    parameter = next(net.parameters())
    noise = torch.randn(ROWS, *input_shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=parameter.device, dtype=parameter.dtype)


def _check_form(layout: Layout) -> None:
    """Raise CannotBeCutError unless hidden states are [row, token, channel] or [row, channel, height, width]."""
    if len(layout.shape) not in (3, 4) or layout.shape[0] != ROWS:
        raise CannotBeCutError("its hidden states are neither tokens nor maps, rows first")


def _grids(height: int, width: int, num_tokens: int) -> Iterator[tuple[int, Grid]]:
    """Yield the sides of square patches that cut an image into so many tokens, and the grids of these patches."""
    for side in range(1, max(height, width) + 1):
        for rows, columns in {(height // side, width // side), (-(-height // side), -(-width // side))}:
            prefix = num_tokens - rows * columns
            if rows and columns and 0 <= prefix <= _MOST_PREFIX:
                yield side, Grid(rows, columns, prefix)


def _size_at(grid: Grid, num_tokens: int) -> tuple[int, int] | None:
    """Return the height and width of the patches after a layer that may have halved them, once or more; None if it has not."""
    height, width = grid.height, grid.width
    while height * width + grid.prefix > num_tokens and (height, width) != (1, 1):
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width + grid.prefix == num_tokens else None
