"""TrivialAugmentWide (arXiv 2103.10158), torchvision's: one of 14 operations for each image, and how strong it is."""

import torch
from torch import Tensor

from eectl.data.operations import plan_operations
from eectl.data.variations import Drawn, Shape, Work


class TrivialAugment:
    """One random operation for each image; `mode` says how geometry reads between pixels."""

    def __init__(self, mode: str = "nearest") -> None:
        self._mode = mode
        self._magnitudes = torch.stack([magnitudes for magnitudes, _ in TRIVIAL.values()])
        self._signed = torch.tensor([signed for _, signed in TRIVIAL.values()])

    def draw(self, count: int) -> Drawn:
        """Draw operations (index into OPERATIONS) and their signed magnitudes."""
        operations = torch.randint(len(TRIVIAL), (count,))
        bins = torch.randint(31, (count,))
        signs = torch.randint(2, (count,)) * 2 - 1
        magnitudes = self._magnitudes[operations, bins]
        return operations, torch.where(self._signed[operations], magnitudes * signs, magnitudes)

    def plan(self, drawn: Drawn, shape: Shape) -> Work:
        """Apply operation `drawn[0][i]` at magnitude `drawn[1][i]` to image i."""
        operations, magnitudes = drawn
        return plan_operations(operations, magnitudes, shape, mode=self._mode)


# The 31 magnitudes of each operation, and whether their sign is drawn too, in the order of OPERATIONS.
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
