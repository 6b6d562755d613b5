"""Training-time augmentation, batched where the images live: uint8 in, normalised float32 out.

Every random number comes from torch's global CPU generator and describes one image of the batch, so equal seeds give equal
batches on every device, and no step waits for the device. Geometry is one affine matrix per image. TrivialAugmentWide is
torchvision's (arXiv 2103.10158): one of 14 operations per image; kornia's draws one per batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from eectl.data.splits import DataInfo, send
from eectl.recipe.data_section import AugmentSection


class Augmenter:
    """Turns uint8 images into what the network takes: varied as `augment` says for training, and plainly for everything else.

    Texts pass as they are.
    """

    def __init__(self, info: DataInfo, augment: AugmentSection, num_classes: int) -> None:
        self._is_text = info.kind == "text"
        self._augment = augment
        self._num_classes = num_classes
        self._mean = torch.tensor(info.mean)[None, :, None, None]
        self._std = torch.tensor(info.std)[None, :, None, None]

    def eval(self, images: Tensor) -> Tensor:
        """Return uint8 images [n, C, H, W] as normalised float32 images [n, C, H, W]; texts pass as they are."""
        if self._is_text:
            return images
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() / 255 - self._mean) / self._std

    @torch.no_grad()
    def train(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return varied, normalised float32 images [n, C, H, W] and int64 targets [n], or soft ones [n, class] of mixed images.

        The order is the paper's: geometry and colour, normalisation, erasing (to 0, the mean), then Mixup or CutMix.
        """
        options = self._augment
        if self._is_text:
            return images, targets
        with torch.autocast(images.device.type, enabled=False):
            if options.resized_crop is not None:
                images = resized_crop(images, options.resized_crop)
            if options.trivial:
                images = trivial_augment(images, *draw_trivial(len(images)), mode=options.trivial_interpolation)
            if options.crop:
                images = padded_crop(images, options.crop)
            if options.flip:
                images = torch.where(_to(torch.rand(len(images)) < 0.5, images), images.flip(-1), images)
            if options.rotation:
                images = _warp(images, _rotations(_uniform(len(images), -options.rotation, options.rotation)))
            if options.contrast:
                images = _contrast(images, _to(_uniform(len(images), 1 - options.contrast, 1 + options.contrast), images))
            inputs = self.eval(images)
            if options.erasing:
                inputs = erase(inputs, options.erasing)
            if options.mixup or options.cutmix:
                return self._mix(inputs, targets)
        return inputs, targets

    def _mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply Mixup or CutMix to the batch; with both on, a fair coin decides."""
        from torchvision.transforms import v2

        mixup = self._augment.cutmix == 0 or (self._augment.mixup > 0 and bool(torch.rand(()) < 0.5))
        alpha = self._augment.mixup if mixup else self._augment.cutmix
        mix = (v2.MixUp if mixup else v2.CutMix)(alpha=alpha, num_classes=self._num_classes)
        mixed: tuple[Tensor, Tensor] = mix(inputs, targets)
        return mixed


def _to(values: Tensor, images: Tensor) -> Tensor:
    """Bring one value per image to the images' device, shaped [n, 1, 1, 1]."""
    return send(values, images.device).view(-1, 1, 1, 1)


def _uniform(count: int, low: float, high: float) -> Tensor:
    return torch.rand(count) * (high - low) + low


def _identities(count: int) -> Tensor:
    return torch.eye(2, 3).repeat(count, 1, 1)


def _rotations(degrees: Tensor) -> Tensor:
    """Return matrices [n, 2, 3] that turn images counter-clockwise, as torchvision's rotate does."""
    radians = torch.deg2rad(degrees)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)


def _warp(images: Tensor, matrices: Tensor, *, mode: str = "nearest", padding: str = "zeros") -> Tensor:
    """Warp each image by its matrix [n, 2, 3], which maps where a pixel goes to where it comes from.

    Coordinates are pixels (x, y) from the image's centre. No matmul: TF32 or bf16 would blur the coordinates.
    """
    height, width = images.shape[-2:]
    half = torch.tensor([width / 2, height / 2]).view(1, 2, 1)
    matrix = send(matrices / half, images.device)[..., None, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    grid = x * matrix[:, :, 0] + y * matrix[:, :, 1] + matrix[:, :, 2]
    warped = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), mode, padding, align_corners=False)
    return warped.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots


def padded_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels both ways, with zeros coming in: a random crop after padding."""
    matrices = _identities(len(images))
    matrices[:, :, 2] = torch.randint(-padding, padding + 1, (len(images), 2)).float()
    return _warp(images, matrices)


def resized_crop(images: Tensor, area: tuple[float, float]) -> Tensor:
    """Cut a random box out of each image and enlarge it: its share of the area is in `area`, its ratio in 3/4..4/3."""
    height, width = images.shape[-2:]
    box_height, box_width, found = _boxes(len(images), images.shape[-2:], area=area, ratio=(3 / 4, 4 / 3))
    box_height = torch.where(found, box_height, min(height, round(width * 4 / 3)))
    box_width = torch.where(found, box_width, min(width, round(height * 4 / 3)))
    free_x, free_y = width - box_width, height - box_height
    left = torch.where(found, _floor_uniform(free_x), free_x // 2)
    top = torch.where(found, _floor_uniform(free_y), free_y // 2)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 2] = box_width / width, left + (box_width - width) / 2
    matrices[:, 1, 1], matrices[:, 1, 2] = box_height / height, top + (box_height - height) / 2
    return _warp(images, matrices, mode="bilinear", padding="border")


def erase(inputs: Tensor, probability: float) -> Tensor:
    """Set a random box of some images to 0, as torchvision's RandomErasing does: 2–33 % of the area, ratio 0.3..3.3."""
    height, width = inputs.shape[-2:]
    chosen = torch.rand(len(inputs)) < probability
    box_height, box_width, found = _boxes(len(inputs), inputs.shape[-2:], area=(0.02, 0.33), ratio=(0.3, 3.3), margin=1)
    top, left = _floor_uniform(height - box_height), _floor_uniform(width - box_width)
    box_height = torch.where(chosen & found, box_height, 0)
    y = torch.arange(height, device=inputs.device).view(1, 1, -1, 1) - _to(top, inputs)
    x = torch.arange(width, device=inputs.device) - _to(left, inputs)
    inside = (y >= 0) & (y < _to(box_height, inputs)) & (x >= 0) & (x < _to(box_width, inputs))
    return inputs.masked_fill(inside, 0.0)


def _floor_uniform(free: Tensor) -> Tensor:
    """Draw a whole number for each element, uniform in 0..free."""
    return (torch.rand(len(free)) * (free + 1)).floor().long().clamp(min=0).minimum(free.clamp(min=0))


def _boxes(
    count: int, size: torch.Size, *, area: tuple[float, float], ratio: tuple[float, float], margin: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw heights and widths of boxes (int64 [n]), the first of ten tries that fits in `size`, and say which fit."""
    pixels = (torch.rand(count, 10) * (area[1] - area[0]) + area[0]) * size[0] * size[1]
    ratios = torch.exp(torch.rand(count, 10) * math.log(ratio[1] / ratio[0]) + math.log(ratio[0]))
    heights, widths = (pixels * ratios).sqrt().round().long(), (pixels / ratios).sqrt().round().long()
    fits = (heights >= 1) & (widths >= 1) & (heights <= size[0] - margin) & (widths <= size[1] - margin)
    first = fits.int().argmax(dim=1, keepdim=True)
    return heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0], fits.any(dim=1)


def draw_trivial(count: int) -> tuple[Tensor, Tensor]:
    """Draw an operation (index into TRIVIAL) and its signed magnitude for each of `count` images, on the CPU."""
    operations = torch.randint(len(TRIVIAL), (count,))
    bins = torch.randint(31, (count,))
    signs = torch.randint(2, (count,)) * 2 - 1
    magnitudes = torch.stack([magnitudes for magnitudes, _ in TRIVIAL.values()])[operations, bins]
    signed = torch.tensor([signed for _, signed in TRIVIAL.values()])[operations]
    return operations, torch.where(signed, magnitudes * signs, magnitudes)


def trivial_augment(images: Tensor, operations: Tensor, magnitudes: Tensor, *, mode: str = "nearest") -> Tensor:
    """Apply operation `operations[i]` at `magnitudes[i]` (both on the CPU) to uint8 image i."""
    result = images.clone()

    def rows_of(*names: str) -> Tensor:
        return torch.isin(operations, torch.tensor([TRIVIAL_NAMES.index(name) for name in names])).nonzero()[:, 0]

    moved = rows_of(*GEOMETRIC)
    if len(moved):
        rows = send(moved, images.device)
        matrices = _trivial_matrices(operations[moved], magnitudes[moved], images.shape[-2:])
        result.index_copy_(0, rows, _warp(images.index_select(0, rows), matrices, mode=mode))
    for name, operation in PIXEL_OPERATIONS.items():
        chosen = rows_of(name)
        if len(chosen):
            rows, strength = send(chosen, images.device), _to(magnitudes[chosen], images)
            result.index_copy_(0, rows, operation(images.index_select(0, rows), strength))
    return result


def _trivial_matrices(operations: Tensor, magnitudes: Tensor, size: torch.Size) -> Tensor:
    """Return matrices [n, 2, 3] of torchvision's geometric operations; it shears about the corner, not the centre."""
    shear_x, shear_y, shift_x, shift_y, degrees = (
        torch.where(operations == TRIVIAL_NAMES.index(name), magnitudes, 0.0) for name in GEOMETRIC
    )
    matrices = _rotations(degrees)
    matrices[:, 0, 1] += shear_x
    matrices[:, 1, 0] += shear_y
    matrices[:, 0, 2] = shear_x * size[0] / 2 - shift_x.trunc()
    matrices[:, 1, 2] = shear_y * size[1] / 2 - shift_y.trunc()
    return matrices


def _grey(images: Tensor) -> Tensor:
    """Return luma in whole grey levels, float32 [n, 1, H, W], as torchvision's rgb_to_grayscale does."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    return (factors * images + (1 - factors) * other).clamp_(0, 255).to(torch.uint8)


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factors)


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), 1 + strength)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images, _grey(images), 1 + strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Blend images with their 3×3 blur; the outermost pixels stay."""
    if min(images.shape[-2:]) <= 2:
        return images
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5  # whole numbers are exact in TF32; divided afterwards
    blurred = images.float()
    blurred[..., 1:-1, 1:-1] = (F.conv2d(blurred, kernel, groups=channels) / 13).round_()
    return _blend(images, blurred, 1 + strength)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional

    result: Tensor = functional.autocontrast(images)
    return result


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional

    result: Tensor = functional.equalize(images)
    return result


PIXEL_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": lambda images, strength: _contrast(images, 1 + strength),
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# The 31 magnitudes of each operation, and whether their sign is drawn too.
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
