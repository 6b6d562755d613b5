"""The variations of a training image: what each draws, and what it does with that to any number of batches at once.

Drawing is on the CPU, from torch's global generator, for one batch; TrivialAugmentWide's is in `trivial`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eectl.data.pixels import blend, for_warp, grey, inside, mean_grey, per_image, warp

Drawn = tuple[Tensor, ...]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Work:
    """A variation of some images, ready to run: `act(images, *parameters)`, with `parameters` brought to the images' device."""

    parameters: Drawn
    act: Callable[..., Tensor]


class Variation(Protocol):
    """One variation, with the settings that the recipe gives it."""

    def draw(self, count: int) -> Drawn:
        """Draw for `count` images: CPU tensors [count, …]."""

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Return what to do to images of a shape (channels, height, width) for which this was drawn, of one or more batches."""


@dataclass(frozen=True)
class ResizedCrop:
    """A random box of each image, enlarged: its share of the area is in `area`, its ratio in 3/4..4/3."""

    area: tuple[float, float]

    def draw(self, count: int) -> Drawn:
        """Draw ten boxes for each image, and places for one of them."""
        return *_draw_boxes(count, area=self.area, ratio=(3 / 4, 4 / 3)), torch.rand(count), torch.rand(count)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Cut out the whole image, at a ratio within the range, where no box fits."""
        areas, ratios, place_x, place_y = drawn
        _, height, width = shape
        box_height, box_width, found = _first_fitting(areas, ratios, height, width)
        box_height = torch.where(found, box_height, min(height, round(width * 4 / 3)))
        box_width = torch.where(found, box_width, min(width, round(height * 4 / 3)))
        free_x, free_y = width - box_width, height - box_height
        left = torch.where(found, _place(place_x, free_x), free_x // 2)
        top = torch.where(found, _place(place_y, free_y), free_y // 2)
        matrices = torch.zeros(len(areas), 2, 3)
        matrices[:, 0, 0], matrices[:, 0, 2] = box_width / width, left + (box_width - width) / 2
        matrices[:, 1, 1], matrices[:, 1, 2] = box_height / height, top + (box_height - height) / 2
        return Work((for_warp(matrices, height, width),), self._cut)

    def _cut(self, images: Tensor, matrices: Tensor) -> Tensor:
        return warp(images, matrices, mode="bilinear", padding="border")


@dataclass(frozen=True)
class PaddedCrop:
    """A shift of each image by up to `padding` pixels both ways, with zeros coming in: a random crop after padding."""

    padding: int

    def draw(self, count: int) -> Drawn:
        """Draw shifts (x, y) in pixels."""
        return (torch.randint(-self.padding, self.padding + 1, (count, 2)),)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Shift each image."""
        (shifts,) = drawn
        matrices = torch.eye(2, 3).repeat(len(shifts), 1, 1)
        matrices[:, :, 2] = shifts.float()
        return Work((for_warp(matrices, *shape[1:]),), warp)


class Flip:
    """A mirrored image, for half of them."""

    def draw(self, count: int) -> Drawn:
        """Draw which images."""
        return (torch.rand(count) < 0.5,)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:  # noqa: ARG002 (of any shape)
        """Mirror from left to right."""
        return Work(drawn, lambda images, chosen: torch.where(per_image(chosen), images.flip(-1), images))


@dataclass(frozen=True)
class Rotation:
    """A turn of each image by up to `degrees` either way."""

    degrees: float

    def draw(self, count: int) -> Drawn:
        """Draw angles in degrees."""
        return (_uniform(count, -self.degrees, self.degrees),)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Turn about the centre."""
        return Work((for_warp(rotations(drawn[0]), *shape[1:]),), warp)


@dataclass(frozen=True)
class Contrast:
    """The contrast of each image times a factor within 1 ± `amount`."""

    amount: float

    def draw(self, count: int) -> Drawn:
        """Draw factors."""
        return (_uniform(count, 1 - self.amount, 1 + self.amount),)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:  # noqa: ARG002 (of any shape)
        """Blend each image with its mean grey."""
        return Work(drawn, lambda images, factors: blend(images, mean_grey(grey(images)), factors))


@dataclass(frozen=True)
class Erasing:
    """A random box of some images set to 0, as by torchvision's RandomErasing: 2–33 % of the area, ratio 0.3..3.3.

    It comes after normalisation, so 0 is the mean.
    """

    probability: float

    def draw(self, count: int) -> Drawn:
        """Draw which images, ten boxes for each, and places for one of them."""
        chosen = torch.rand(count) < self.probability
        return chosen, *_draw_boxes(count, area=(0.02, 0.33), ratio=(0.3, 3.3)), torch.rand(count), torch.rand(count)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Erase the first box that fits, if there is one."""
        chosen, areas, ratios, place_y, place_x = drawn
        _, height, width = shape
        box_height, box_width, found = _first_fitting(areas, ratios, height, width, margin=1)
        top, left = _place(place_y, height - box_height), _place(place_x, width - box_width)
        bottom = top + torch.where(chosen & found, box_height, 0)
        return Work((torch.stack([left, top, left + box_width, bottom], dim=1),), self._erase)

    def _erase(self, inputs: Tensor, boxes: Tensor) -> Tensor:
        return inputs.masked_fill(inside(boxes, *inputs.shape[-2:]), 0.0)


def rotations(degrees: Tensor) -> Tensor:
    """Return matrices [n, 2, 3] that turn images counter-clockwise, as torchvision's rotate does."""
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)


def _uniform(count: int, low: float, high: float) -> Tensor:
    return torch.rand(count) * (high - low) + low


def _place(drawn: Tensor, free: Tensor) -> Tensor:
    """Make each number in 0..1 a whole one in 0..free."""
    return (drawn * (free + 1)).floor().long().clamp(min=0).minimum(free.clamp(min=0))


def _draw_boxes(count: int, *, area: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Draw shares of the area and ratios of height to width, [count, 10] each."""
    areas = torch.rand(count, 10) * (area[1] - area[0]) + area[0]
    return areas, torch.exp(torch.rand(count, 10) * math.log(ratio[1] / ratio[0]) + math.log(ratio[0]))


def _first_fitting(areas: Tensor, ratios: Tensor, height: int, width: int, *, margin: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return heights and widths (int64 [n]) of the first of ten boxes that fits, and which image has one."""
    pixels = areas * height * width
    heights, widths = (pixels * ratios).sqrt().round().long(), (pixels / ratios).sqrt().round().long()
    fits = (heights >= 1) & (widths >= 1) & (heights <= height - margin) & (widths <= width - margin)
    first = fits.int().argmax(dim=1, keepdim=True)
    return heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0], fits.any(dim=1)
