"""TrivialAugmentWide (arXiv 2103.10158), torchvision's: one of 14 operations for each image.

Rows are sorted by their operation, so each runs once over a slice whose length the CPU knows, and nothing waits for the device.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eectl.data.pixels import autocontrast, blend, blurred, equalize, for_warp, grey, mean_grey, per_image, solarize, warp
from eectl.data.variations import Drawn, Shape, Work, rotations


class TrivialAugment:
    """One random operation for each image; `mode` says how geometry reads between pixels."""

    def __init__(self, mode: str = "nearest") -> None:
        self._mode = mode
        self._magnitudes = torch.stack([magnitudes for magnitudes, _ in TRIVIAL.values()])
        self._signed = torch.tensor([signed for _, signed in TRIVIAL.values()])

    def draw(self, count: int) -> Drawn:
        """Draw operations (index into TRIVIAL) and their signed magnitudes."""
        operations = torch.randint(len(TRIVIAL), (count,))
        bins = torch.randint(31, (count,))
        signs = torch.randint(2, (count,)) * 2 - 1
        magnitudes = self._magnitudes[operations, bins]
        return operations, torch.where(self._signed[operations], magnitudes * signs, magnitudes)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply operation `drawn[0][i]` at magnitude `drawn[1][i]` to image i."""
        operations, magnitudes = drawn
        channels, height, width = shape
        idle = [name for name, is_idle in (("Color", channels == 1), ("Sharpness", min(height, width) <= 2)) if is_idle]
        for name in idle:
            operations = torch.where(operations == TRIVIAL_NAMES.index(name), 0, operations)
        order = operations.argsort(stable=True)
        counts = operations.bincount(minlength=len(TRIVIAL)).tolist()
        ends = list(accumulate(counts))
        slices = {name: slice(end - count, end) for name, end, count in zip(TRIVIAL_NAMES, ends, counts, strict=True) if count}
        operations, magnitudes = operations[order], magnitudes[order]
        moved = slice(counts[0], ends[TRIVIAL_NAMES.index(GEOMETRIC[-1])])
        matrices = for_warp(_matrices(operations[moved], magnitudes[moved], height, width), height, width)
        bits = magnitudes[slices.get("Posterize", slice(0))].long()
        parameters = order, order.argsort(), magnitudes, matrices, (256 - 2 ** (8 - bits)).to(torch.uint8)
        return Work(parameters, _Operations(slices, moved, self._mode))


@dataclass(frozen=True)
class _Operations:
    """All operations, each on its slice of sorted rows; operations that no row has are not in `slices`."""

    slices: dict[str, slice]
    moved: slice
    mode: str

    def __call__(
        self, images: Tensor, order: Tensor, places: Tensor, magnitudes: Tensor, matrices: Tensor, masks: Tensor
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
        torch.where(operations == TRIVIAL_NAMES.index(name), magnitudes, 0.0) for name in GEOMETRIC
    )
    matrices = rotations(degrees)
    matrices[:, 0, 1] += shear_x
    matrices[:, 1, 0] += shear_y
    matrices[:, 0, 2] = shear_x * height / 2 - shift_x.trunc()
    matrices[:, 1, 2] = shear_y * width / 2 - shift_y.trunc()
    return matrices


GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDED = ("Brightness", "Color", "Contrast", "Sharpness")
# The 31 magnitudes of each operation, and whether their sign is drawn too. Geometric ones stand together, and so do blended ones.
TRIVIAL: dict[str, tuple[Tensor, bool]] = {
    "Identity": (torch.zeros(31), False),
    "ShearX": (torch.linspace(0, 0.99, 31), True),
    "ShearY": (torch.linspace(0, 0.99, 31), True),
    "TranslateX": (torch.linspace(0, 32, 31), True),
    "TranslateY": (torch.linspace(0, 32, 31), True),
    "Rotate": (torch.linspace(0, 135, 31), True),
    "Brightness": (torch.linspace(0, 0.99, 31), True),
    "Color": (torch.linspace(0, 0.99, 31), True),
    "Contrast": (torch.linspace(0, 0.99, 31), True),
    "Sharpness": (torch.linspace(0, 0.99, 31), True),
    "Posterize": (8 - (torch.arange(31) / 5).round(), False),
    "Solarize": (torch.linspace(255, 0, 31), False),
    "AutoContrast": (torch.zeros(31), False),
    "Equalize": (torch.zeros(31), False),
}
TRIVIAL_NAMES = tuple(TRIVIAL)
