"""Training-time augmentation, batched where the images live: uint8 in, normalised float32 out.

Every random number comes from torch's global CPU generator and describes one image of a batch, or one batch, so equal seeds give
equal batches on every device, and no step waits for the device. Drawing and applying are apart: what was drawn for several
batches is sent in one copy and applied in one go, and gives each batch the bits that it has alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.data.pixels import inside
from eectl.data.policies import AutoAugment, ColorJitter, RandAugment, ThreeAugment
from eectl.data.splits import DataInfo, send_all
from eectl.data.trivial import TrivialAugment
from eectl.data.variations import Contrast, Drawn, Erasing, Flip, PaddedCrop, ResizedCrop, Rotation, Variation
from eectl.recipe.augment_section import AugmentSection


@dataclass(frozen=True)
class Mix:
    """How the images of one batch are mixed with those before them.

    `own` is an image's own share. `box` (left, top, right, bottom) comes from the other image; None: all of it is blended.
    """

    own: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Draws:
    """The draws for some batches of equal size: for each variation tensors [batch · row, …], and a Mix for each batch."""

    rows: tuple[Drawn, ...] = ()
    mixes: tuple[Mix, ...] = ()


def join_draws(draws: Sequence[Draws]) -> Draws:
    """Return what was drawn for several batches as that of all of them, in this order."""
    if len(draws) == 1:
        return draws[0]
    rows = (tuple(map(torch.cat, zip(*each, strict=True))) for each in zip(*(one.rows for one in draws), strict=True))
    return Draws(tuple(rows), tuple(mix for one in draws for mix in one.mixes))


class Augmenter:
    """Turns uint8 images into what the network takes: varied as `augment` says for training, and plainly for everything else.

    Texts pass as they are.
    """

    def __init__(self, info: DataInfo, augment: AugmentSection, num_classes: int) -> None:
        self._is_text = info.kind == "text"
        self._before, self._after = ([], []) if self._is_text else _variations(augment)
        mixes = not self._is_text and (augment.mixup or augment.cutmix)
        self._mixing = _Mixing(augment.mixup, augment.cutmix, num_classes) if mixes else None
        self._mean = torch.tensor(info.mean)[None, :, None, None]
        self._std = torch.tensor(info.std)[None, :, None, None]

    def eval(self, images: Tensor) -> Tensor:
        """Return uint8 images [n, C, H, W] as normalised float32 images [n, C, H, W]; texts pass as they are."""
        if self._is_text:
            return images
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() / 255 - self._mean) / self._std

    def train(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return varied, normalised float32 images [n, C, H, W] and int64 targets [n]; of mixed images soft ones [n, class]."""
        return self.apply(images, targets, self.draw(len(images), images.shape[-2:]))

    def draw(self, count: int, size: Sequence[int]) -> Draws:
        """Draw all that varies a batch of `count` images of a size (height, width), from torch's global generator."""
        rows = tuple(variation.draw(count) for variation in (*self._before, *self._after))
        return Draws(rows, () if self._mixing is None else (self._mixing.draw(*size),))

    @torch.no_grad()
    def apply(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Do to one or more batches at once, [batch · row, …], what was drawn for them; returns what `train` returns.

        The order is the paper's: geometry and colour, normalisation, erasing (to 0, the mean), then Mixup or CutMix.
        """
        if self._is_text:
            return images, targets
        _, channels, height, width = images.shape
        variations = (*self._before, *self._after)
        work = [each.plan(drawn, (channels, height, width)) for each, drawn in zip(variations, draws.rows, strict=True)]
        mixing = () if self._mixing is None else self._mixing.parameters(draws.mixes)
        sent = iter(send_all([*(value for each in work for value in each.parameters), *mixing], images.device))
        with torch.autocast(images.device.type, enabled=False):
            for each in work[: len(self._before)]:
                images = each.act(images, *(next(sent) for _ in each.parameters))
            inputs = self.eval(images)
            for each in work[len(self._before) :]:
                inputs = each.act(inputs, *(next(sent) for _ in each.parameters))
            if self._mixing is not None:
                return self._mixing.mix(inputs, targets, draws.mixes, *sent)
        return inputs, targets


def _variations(augment: AugmentSection) -> tuple[list[Variation], list[Variation]]:
    """Return the variations before normalisation and those after it, in order."""
    before: list[Variation] = []
    if augment.resized_crop is not None:
        before.append(ResizedCrop(augment.resized_crop))
    if augment.trivial:
        before.append(TrivialAugment(augment.trivial_interpolation))
    if augment.rand_augment is not None:
        before.append(RandAugment(augment.rand_augment.ops, augment.rand_augment.magnitude, augment.trivial_interpolation))
    if augment.auto_augment is not None:
        before.append(AutoAugment(augment.auto_augment, augment.trivial_interpolation))
    if augment.three_augment:
        before.append(ThreeAugment())
    if augment.jitter:
        before.append(ColorJitter(augment.jitter))
    if augment.crop:
        before.append(PaddedCrop(augment.crop))
    if augment.flip:
        before.append(Flip())
    if augment.rotation:
        before.append(Rotation(augment.rotation))
    if augment.contrast:
        before.append(Contrast(augment.contrast))
    return before, [Erasing(augment.erasing)] if augment.erasing else []


class _Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) as torchvision has them; with both on, a fair coin decides.

    Each image of a batch is mixed with the one before it, the first with the last.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        self._mixup, self._cutmix = (_shares(alpha) if alpha else None for alpha in (mixup, cutmix))
        self._num_classes = num_classes

    def draw(self, height: int, width: int) -> Mix:
        """Draw how one batch is mixed."""
        if self._cutmix is None or (self._mixup is not None and bool(torch.rand(()) < 0.5)):
            assert self._mixup is not None
            return Mix(float(self._mixup.sample()))
        share = float(self._cutmix.sample())
        x, y = int(torch.randint(width, (1,))), int(torch.randint(height, (1,)))
        half = 0.5 * math.sqrt(1.0 - share)
        half_width, half_height = int(half * width), int(half * height)
        left, top = max(x - half_width, 0), max(y - half_height, 0)
        right, bottom = min(x + half_width, width), min(y + half_height, height)
        return Mix(1.0 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))

    def parameters(self, mixes: Sequence[Mix]) -> Drawn:
        """Return what `mix` needs on the device: own and other shares, boxes, and which batches are blended."""
        shares = torch.tensor([[mix.own, 1.0 - mix.own] for mix in mixes])
        boxes = torch.tensor([mix.box or (0, 0, 0, 0) for mix in mixes])
        return shares, boxes, torch.tensor([mix.box is None for mix in mixes])

    def mix(
        self, inputs: Tensor, targets: Tensor, mixes: Sequence[Mix], shares: Tensor, boxes: Tensor, is_blended: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mixed inputs [batch · row, C, H, W] and soft targets [batch · row, class]."""
        labels = (targets[:, None] == torch.arange(self._num_classes, device=targets.device)).float()
        return (
            self._mixed(_by_batch(inputs, mixes), mixes, shares, boxes, is_blended).flatten(0, 1),
            _blended(_by_batch(labels, mixes), shares).flatten(0, 1),
        )

    def _mixed(self, inputs: Tensor, mixes: Sequence[Mix], shares: Tensor, boxes: Tensor, is_blended: Tensor) -> Tensor:
        """Mix inputs [batch, row, C, H, W]; which of the two ways there are among the batches, the CPU knows."""
        if all(mix.box is None for mix in mixes):
            return _blended(inputs, shares)
        cut = torch.where(inside(boxes, *inputs.shape[-2:])[:, None], inputs.roll(1, 1), inputs)
        if all(mix.box is not None for mix in mixes):
            return cut
        return torch.where(is_blended.view(-1, 1, 1, 1, 1), _blended(inputs, shares), cut)


def _shares(alpha: float) -> torch.distributions.Beta:
    """Return the distribution of own shares."""
    both = torch.tensor([alpha])
    return torch.distributions.Beta(both, both, validate_args=False)


def _blended(values: Tensor, shares: Tensor) -> Tensor:
    """Blend each row of values [batch, row, …] with the one before it, by the batch's own and other shares [batch, 2]."""
    own, other = (share.view(-1, *[1] * (values.dim() - 1)) for share in shares.unbind(1))
    return values.roll(1, 1).mul_(other).add_(values * own)


def _by_batch(values: Tensor, batches: Sequence[object]) -> Tensor:
    return values.view(len(batches), -1, *values.shape[1:])
