"""The arithmetic of augmentation on pixels: batches of uint8 images, each by its own parameters, which are on the images' device.

No random number is drawn here, no value is read back, and an image comes out the same whatever batch it is in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLUR_RADIUS = 6  # pixels of a Gaussian blur on each side: three of the largest standard deviations that are drawn


def warp(images: Tensor, matrices: Tensor, *, mode: str = "nearest", padding: str = "zeros") -> Tensor:
    """Warp each image by its matrix [n, 2, 3], as `for_warp` makes them.

    No matmul: TF32 or bf16 would blur the coordinates.
    """
    height, width = images.shape[-2:]
    matrix = matrices[..., None, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    grid = x * matrix[:, :, 0] + y * matrix[:, :, 1] + matrix[:, :, 2]
    warped = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), mode, padding, align_corners=False)
    return warped.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots


def for_warp(matrices: Tensor, height: int, width: int) -> Tensor:
    """Return matrices [n, 2, 3], which map where a pixel goes to where it comes from, in the units that `warp` samples in.

    Coordinates are pixels (x, y) from the image's centre.
    """
    return matrices / torch.tensor([width / 2, height / 2]).view(1, 2, 1)


def per_image(values: Tensor) -> Tensor:
    """Shape one value per image [n] as [n, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def grey(images: Tensor) -> Tensor:
    """Return luma in whole grey levels, float32 [n, 1, H, W], as torchvision's rgb_to_grayscale does."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def mean_grey(greys: Tensor) -> Tensor:
    """Return the mean [n, 1, 1, 1] of whole grey levels: what contrast is measured from."""
    return greys.mean(dim=(1, 2, 3), keepdim=True)


def blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """Go from `other` towards each image, and beyond it, by its factor [n]."""
    factors = per_image(factors)
    return (factors * images + (1 - factors) * other).clamp_(0, 255).to(torch.uint8)


def blurred(images: Tensor) -> Tensor:
    """Return images as float32, blurred by torchvision's 3×3 kernel; the outermost pixels stay.

    Sums of shifted images are exact in whole numbers, and need no plan for each new number of images, as a convolution would.
    """
    result = images.float()
    across = result[..., :-2] + result[..., 1:-1] + result[..., 2:]
    square = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    inner = result[..., 1:-1, 1:-1]
    inner.copy_(square.add_(inner, alpha=4).div_(13).round_())
    return result


def gaussian_weights(deviations: Tensor) -> Tensor:
    """Return the weights [n, tap] of Gaussian blurs by these standard deviations in pixels [n], as torchvision has them."""
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    return torch.softmax(-(taps**2) / (2 * deviations[:, None] ** 2), dim=1)


def gaussian_blur(images: Tensor, weights: Tensor) -> Tensor:
    """Blur each image by its weights [n, tap], along both axes; what lies outside is mirrored.

    Of an image too small to be mirrored that far, fewer taps are used.
    """
    pixels = images.float()
    for axis in (-1, -2):
        size = pixels.shape[axis]
        radius = min(BLUR_RADIUS, size - 1)
        taps = weights[:, BLUR_RADIUS - radius : BLUR_RADIUS + radius + 1]
        taps = taps / taps.sum(1, keepdim=True)
        padded = F.pad(pixels, (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius), mode="reflect")
        pixels = torch.zeros_like(pixels)
        for number, weight in enumerate(taps.unbind(1)):
            pixels.addcmul_(padded.narrow(axis, number, size), per_image(weight))
    return pixels.round_().to(torch.uint8)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels that reach their image's threshold [n]."""
    return torch.where(images >= per_image(thresholds), 255 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0..255; one of a single value stays."""
    pixels = images.float()
    low, high = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    flat, scale = low == high, (high - low) * (1 / 255)
    stretched = (pixels - low.masked_fill(flat, 0.0)) / scale.masked_fill(flat, 1.0)
    return stretched.clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Even out each channel's histogram, as torchvision does."""
    from torchvision.transforms.v2 import functional

    result: Tensor = functional.equalize(images)
    return result


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels [n, 1, H, W] lie in boxes [n, 4] of left, top, right and bottom, the last two not included."""
    left, top, right, bottom = (per_image(edge) for edge in boxes.unbind(1))
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)[:, None]
    return ((y >= top) & (y < bottom)) & ((x >= left) & (x < right))
