"""The operations of TrivialAugment, RandAugment, AutoAugment and 3-Augment on batches: one for each image, at its own magnitude.

Rows are sorted by their operation, so each runs once over a slice whose length the CPU knows, and nothing waits for the device.
Which operation an image gets is not decided here.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eectl.data.pixels import (
    autocontrast,
    blend,
    blurred,
    equalize,
    for_warp,
    gaussian_blur,
    gaussian_weights,
    grey,
    mean_grey,
    per_image,
    solarize,
    warp,
)
from eectl.data.variations import Shape, Work, rotations

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDED = ("Brightness", "Color", "Contrast", "Sharpness")
# By torchvision's names. Geometric ones stand together, and so do blended ones. A magnitude is a slope, pixels, degrees, a factor
# less 1, bits, a threshold, or a standard deviation in pixels.
OPERATIONS = ("Identity", *GEOMETRIC, *BLENDED, "Posterize", "Solarize", "AutoContrast", "Equalize", "GaussianBlur")


def plan_operations(operations: Tensor, magnitudes: Tensor, shape: Shape, *, mode: str = "nearest") -> Work:
    """Return how to apply operation `operations[i]` (int64, of OPERATIONS) at `magnitudes[i]` to image i of a shape.

    `mode` says how geometry reads between pixels.
    """
    channels, height, width = shape
    idle = [name for name, is_idle in (("Color", channels == 1), ("Sharpness", min(height, width) <= 2)) if is_idle]
    for name in idle:
        operations = torch.where(operations == OPERATIONS.index(name), 0, operations)
    order = operations.argsort(stable=True)
    counts = operations.bincount(minlength=len(OPERATIONS)).tolist()
    ends = list(accumulate(counts))
    slices = {name: slice(end - count, end) for name, end, count in zip(OPERATIONS, ends, counts, strict=True) if count}
    operations, magnitudes = operations[order], magnitudes[order]
    moved = slice(counts[0], ends[OPERATIONS.index(GEOMETRIC[-1])])
    matrices = for_warp(_matrices(operations[moved], magnitudes[moved], height, width), height, width)
    bits = magnitudes[slices.get("Posterize", slice(0))].long()
    weights = gaussian_weights(magnitudes[slices.get("GaussianBlur", slice(0))])
    parameters = order, order.argsort(), magnitudes, matrices, (256 - 2 ** (8 - bits)).to(torch.uint8), weights
    return Work(parameters, _Operations(slices, moved, mode))


@dataclass(frozen=True)
class _Operations:
    """All operations, each on its slice of sorted rows; operations that no row has are not in `slices`."""

    slices: dict[str, slice]
    moved: slice
    mode: str

    def __call__(
        self,
        images: Tensor,
        order: Tensor,
        places: Tensor,
        magnitudes: Tensor,
        matrices: Tensor,
        masks: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return images in their own order, of which `order` are the sorted rows and `places` the way back."""
        images = images.index_select(0, order)
        parts = [images[: self.moved.start]]
        if len(matrices):
            parts.append(warp(images[self.moved], matrices, mode=self.mode))
        parts += self._blended(images, magnitudes)
        if "Posterize" in self.slices:
            parts.append(images[self.slices["Posterize"]] & per_image(masks))
        if "Solarize" in self.slices:
            rows = self.slices["Solarize"]
            parts.append(solarize(images[rows], magnitudes[rows]))
        if "AutoContrast" in self.slices:
            parts.append(autocontrast(images[self.slices["AutoContrast"]]))
        if "Equalize" in self.slices:
            parts.append(equalize(images[self.slices["Equalize"]]))
        if "GaussianBlur" in self.slices:
            parts.append(gaussian_blur(images[self.slices["GaussianBlur"]], weights))
        return torch.cat(parts).index_select(0, places)

    def _blended(self, images: Tensor, magnitudes: Tensor) -> list[Tensor]:
        """Return the slices that are blended with something, in one part: by 1 + magnitude."""
        slices = {name: self.slices[name] for name in BLENDED if name in self.slices}
        if not slices:
            return []
        others = {name: _other(name, images[rows]).expand_as(images[rows]) for name, rows in slices.items()}
        rows = slice(min(each.start for each in slices.values()), max(each.stop for each in slices.values()))
        return [blend(images[rows], torch.cat(list(others.values())), 1 + magnitudes[rows])]


def _other(name: str, images: Tensor) -> Tensor:
    """Return what an operation blends images with, float32 that expands to [n, C, H, W]."""
    if name == "Brightness":
        return torch.zeros((), device=images.device)
    if name == "Color":
        return grey(images)
    if name == "Contrast":
        return mean_grey(grey(images))
    return blurred(images)


def _matrices(operations: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """Return matrices [n, 2, 3] of torchvision's geometric operations; it shears about the corner, not the centre."""
    shear_x, shear_y, shift_x, shift_y, degrees = (
        torch.where(operations == OPERATIONS.index(name), magnitudes, 0.0) for name in GEOMETRIC
    )
    matrices = rotations(degrees)
    matrices[:, 0, 1] += shear_x
    matrices[:, 1, 0] += shear_y
    matrices[:, 0, 2] = shear_x * height / 2 - shift_x.trunc()
    matrices[:, 1, 2] = shear_y * width / 2 - shift_y.trunc()
    return matrices
