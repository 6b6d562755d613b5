"""Augmentation by several operations in turn: RandAugment, AutoAugment, and 3-Augment with its colour jitter.

Each draws for every image which operations it gets and how strong they are; `operations` does them.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from eectl.data.operations import OPERATIONS, plan_operations
from eectl.data.variations import Drawn, Shape, Work

RAND_BINS, AUTO_BINS = 31, 10  # magnitudes of an operation
SOLARIZED, LEAST_BLUR, MOST_BLUR = 128.0, 0.1, 2.0  # 3-Augment's threshold, and its range of standard deviations in pixels


class RandAugment:
    """RandAugment (arXiv 1909.13719), torchvision's: `num_ops` operations for each image, all at one of 31 magnitudes.

    `mode` says how geometry reads between pixels.
    """

    def __init__(self, num_ops: int, magnitude: int, mode: str = "nearest") -> None:
        self._num_ops, self._mode = num_ops, mode
        space = strengths(RAND_BINS)
        self._magnitudes = torch.stack([magnitudes[magnitude] for magnitudes, _ in space.values()])
        self._signed = torch.tensor([signed for _, signed in space.values()])

    def draw(self, count: int) -> Drawn:
        """Draw operations and their signed magnitudes, [count, turn] each; shifts are shares of the side."""
        operations = torch.randint(len(self._magnitudes), (count, self._num_ops))
        return operations, _signed(self._magnitudes[operations], self._signed[operations])

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply the operations of each image in turn."""
        operations, magnitudes = drawn
        return _plan_turns(operations, magnitudes, shape, mode=self._mode)


class AutoAugment:
    """AutoAugment (arXiv 1805.09501), torchvision's: one of a policy's 25 pairs of operations for each image.

    `policy` is imagenet, cifar10 or svhn; `mode` says how geometry reads between pixels.
    """

    def __init__(self, policy: str, mode: str = "nearest") -> None:
        from torchvision.transforms import AutoAugment as Published
        from torchvision.transforms import AutoAugmentPolicy

        self._mode = mode
        space = strengths(AUTO_BINS)
        space["Invert"] = (torch.zeros(AUTO_BINS), False)  # which is to solarize from 0 on
        pairs = Published(AutoAugmentPolicy(policy)).policies
        self._operations = torch.tensor(
            [[OPERATIONS.index("Solarize" if name == "Invert" else name) for name, _, _ in pair] for pair in pairs]
        )
        self._magnitudes = torch.tensor([[float(space[name][0][number or 0]) for name, _, number in pair] for pair in pairs])
        self._signed = torch.tensor([[space[name][1] for name, _, _ in pair] for pair in pairs])
        self._probabilities = torch.tensor([[probability for _, probability, _ in pair] for pair in pairs])

    def draw(self, count: int) -> Drawn:
        """Draw operations and their signed magnitudes, [count, 2] each; shifts are shares of the side."""
        pairs = torch.randint(len(self._operations), (count,))
        chosen = torch.rand(count, 2) <= self._probabilities[pairs]
        operations = torch.where(chosen, self._operations[pairs], OPERATIONS.index("Identity"))
        return operations, _signed(self._magnitudes[pairs], self._signed[pairs])

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply the two operations of each image in turn."""
        operations, magnitudes = drawn
        return _plan_turns(operations, magnitudes, shape, mode=self._mode)


class ThreeAugment:
    """The choice of 3-Augment (DeiT III, arXiv 2204.07118): each image in grey, solarized, or blurred by up to 2 pixels."""

    def __init__(self) -> None:
        self._operations = torch.tensor([OPERATIONS.index(name) for name in ("Color", "Solarize", "GaussianBlur")])

    def draw(self, count: int) -> Drawn:
        """Draw operations and their magnitudes; grey is a colour factor of 0."""
        chosen = torch.randint(3, (count,))
        deviations = torch.rand(count) * (MOST_BLUR - LEAST_BLUR) + LEAST_BLUR
        strong = torch.stack([torch.full((count,), -1.0), torch.full((count,), SOLARIZED), deviations])
        return self._operations[chosen], strong.gather(0, chosen[None])[0]

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply the operation of each image."""
        operations, magnitudes = drawn
        return plan_operations(operations, magnitudes, shape)


class ColorJitter:
    """Brightness, contrast and saturation of each image times factors within 1 ± `amount`, in random order, as torchvision's."""

    def __init__(self, amount: float) -> None:
        self._amount = amount
        self._operations = torch.tensor([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")])

    def draw(self, count: int) -> Drawn:
        """Draw orders of the operations and what to add to factors of 1, [count, turn] each."""
        order = torch.rand(count, 3).argsort(dim=1)
        return self._operations[order], (torch.rand(count, 3) * 2 - 1) * self._amount

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply the three operations of each image in turn."""
        operations, magnitudes = drawn
        return _plan_turns(operations, magnitudes, shape)


def strengths(bins: int) -> dict[str, tuple[Tensor, bool]]:
    """Return the magnitudes of RandAugment's and AutoAugment's operations, [bins] each, and whether their sign is drawn too.

    Shifts are shares of the side.
    """
    none, steps = torch.zeros(bins), torch.arange(bins) / (bins - 1)
    return {
        "Identity": (none, False),
        **dict.fromkeys(("ShearX", "ShearY"), (torch.linspace(0, 0.3, bins), True)),
        **dict.fromkeys(("TranslateX", "TranslateY"), (torch.linspace(0, 150 / 331, bins), True)),
        "Rotate": (torch.linspace(0, 30, bins), True),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (torch.linspace(0, 0.9, bins), True)),
        "Posterize": (8 - (steps * 4).round(), False),
        "Solarize": (torch.linspace(255, 0, bins), False),
        **dict.fromkeys(("AutoContrast", "Equalize"), (none, False)),
    }


def _signed(magnitudes: Tensor, signed: Tensor) -> Tensor:
    """Draw a sign for each magnitude, and use it where the operation has one."""
    return torch.where(signed & (torch.rand(magnitudes.shape) < 0.5), -magnitudes, magnitudes)


def _plan_turns(operations: Tensor, magnitudes: Tensor, shape: Shape, *, mode: str = "nearest") -> Work:
    """Return the operations [n, turn] at magnitudes [n, turn], shifts as shares of the side, as the work of one turn each."""
    _, height, width = shape
    for name, side in (("TranslateX", width), ("TranslateY", height)):
        magnitudes = torch.where(operations == OPERATIONS.index(name), magnitudes * side, magnitudes)
    turns = zip(operations.unbind(1), magnitudes.unbind(1), strict=True)
    return _in_turn([plan_operations(chosen, strong, shape, mode=mode) for chosen, strong in turns])


def _in_turn(works: Sequence[Work]) -> Work:
    """Return works on the same images as one that does them one after the other."""

    def act(images: Tensor, *parameters: Tensor) -> Tensor:
        sent = iter(parameters)
        for work in works:
            images = work.act(images, *(next(sent) for _ in work.parameters))
        return images

    return Work(tuple(chain.from_iterable(work.parameters for work in works)), act)
