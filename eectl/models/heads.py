"""Exit heads: what turns a block's Feature into logits. Widths come from an example Feature; no head knows a layout."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from eectl.models.backbone import Feature


@dataclass(frozen=True)
class ExitOutput:
    """An exit's logits [row, class], and what later exits may read."""

    logits: Tensor
    state: Tensor | None = None


class ExitHead(nn.Module, ABC):
    """An exit's classifier. `uses_earlier` says that it reads the outputs of the exits before it."""

    uses_earlier: ClassVar[bool] = False

    @abstractmethod
    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Logits [row, class] from a block's feature and the outputs of the exits before this one."""
