"""Find how the features of a traced network are read: which of the tensors that are alive, and in which layout.

What its library says of a network is here too, for it tells layouts apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from torch import Tensor

from eectl.models.backbone import Feature, MapFeature, TokenFeature


@dataclass(frozen=True)
class Facts:
    """Facts of a network that its library knows.

    Attributes:
        groups: the number of each parameter's group, in the order in which they run: stem, blocks, head.
        functions: functions of the library's that are not to be followed.
        classifiers: the names of the layers whose size is the number of outputs.
        widths: numbers of channels that its features have, as far as they are known.
        prefix: how many tokens come before those of the patches.
        output_fmt: the layout of its maps where nothing else tells.
    """

    groups: Mapping[str, int]
    functions: Sequence[Any]
    classifiers: Sequence[str]
    widths: frozenset[int] = frozenset()
    prefix: int = 0
    output_fmt: str = "NCHW"


Shapes = tuple[tuple[int, ...], ...]
"""Those of several tensors, rows left out."""


def shapes_of(tensors: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(map(int, tensor.shape[1:])) for tensor in tensors)


@dataclass(frozen=True)
class View:
    """How a feature is read.

    Attributes:
        layout: `NCHW`, `NHWC`, `tokens`, or `row` for anything else.
        grid: the (height, width) of tokens.
        prefix: how many special tokens come first.
        place: which of the tensors that are alive it is, counted from the last.
    """

    layout: str
    grid: tuple[int, int] = (1, 1)
    prefix: int = 0
    place: int = -1

    @staticmethod
    def of(facts: Facts, shapes: Shapes, input_shape: Sequence[int]) -> "View":
        """Find how what is alive after a block is to be read: the last map of a known width there is, else the last tensor."""
        views = [View._of_one(facts, shape, input_shape) for shape in shapes]
        channels = {"NCHW": 0, "NHWC": -1}
        maps = [
            place
            for place, (view, shape) in enumerate(zip(views, shapes, strict=True))
            if view.layout in channels and shape[channels[view.layout]] in facts.widths
        ]
        place = maps[-1] if maps else len(views) - 1
        return replace(views[place], place=place - len(views))

    @staticmethod
    def _of_one(facts: Facts, shape: Sequence[int], input_shape: Sequence[int]) -> "View":
        if len(shape) == 3:
            height, width = input_shape[1:]
            first, last = shape[1] * width == shape[2] * height, shape[0] * width == shape[1] * height
            if first == last:  # neither reading has the image's proportions alone
                first, last = shape[0] in facts.widths, shape[2] in facts.widths
            if first != last:
                return View("NCHW" if first else "NHWC")
            return View(facts.output_fmt)
        if len(shape) == 2:
            for prefix in dict.fromkeys((facts.prefix, 0, 1)):
                grid = _grid(shape[0] - prefix, input_shape)
                if grid is not None:
                    return View("tokens", grid, prefix)
            return View("tokens", (1, shape[0]))
        return View("row")

    def feature(self, tensors: Sequence[Tensor]) -> Feature:
        """Return one of tensors of these shapes, rows first, as a feature."""
        x = tensors[self.place]
        if self.layout == "NCHW":
            return MapFeature(x)
        if self.layout == "NHWC":
            return MapFeature(x.permute(0, 3, 1, 2))
        if self.layout == "tokens":
            return TokenFeature(x, self.grid, prefix=self.prefix, has_cls=self.prefix > 0)
        flat = x.flatten(1, -2) if x.ndim > 3 else x[:, None]
        return TokenFeature(flat, (1, flat.shape[1]), prefix=0, has_cls=False)


def _grid(count: int, input_shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the (height, width) of so many patches of an image; None where they do not fill its rectangle."""
    height, width = input_shape[1:]
    if count * height % width == 0:
        rows = isqrt(count * height // width)
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return rows, count // rows
    return None
