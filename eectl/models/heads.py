"""Exit heads: what turns a block's Feature into logits. Widths come from an example Feature; no head knows a layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from eectl.errors import EectlError, lookup
from eectl.models.backbone import Feature


@dataclass(frozen=True)
class ExitOutput:
    """An exit's logits [row, class], and what later exits may read."""

    logits: Tensor
    state: Tensor | None = None


class ExitHead(nn.Module, ABC):
    """An exit's classifier. `uses_earlier` says that it reads the outputs of the exits before it; `kind` is its recipe name."""

    uses_earlier: ClassVar[bool] = False
    kind: str = ""

    @abstractmethod
    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Logits [row, class] from a block's feature and the outputs of the exits before this one."""


class LinearHead(ExitHead):
    """Class token (or the mean, where there is none) → Linear, without a norm before it: the paper's standard ViT head."""

    def __init__(self, feature: Feature, num_outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(feature.cls().shape[1], num_outputs)

    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        return ExitOutput(self.fc(feature.cls()))


class MlpHead(ExitHead):
    """Class token (or the mean) → Linear → GELU → Linear: the paper's two-layer ViT head (1024 or 2048 wide)."""

    def __init__(self, feature: Feature, num_outputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature.cls().shape[1], width)
        self.fc2 = nn.Linear(width, num_outputs)

    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        return ExitOutput(self.fc2(functional.gelu(self.fc1(feature.cls()))))


class SdnHead(ExitHead):
    """a · max + (1 − a) · mean over a 4×4 grid of the map → Linear; a is learnt, starts in U(0, 1) and is not clamped.

    Shallow-Deep Networks (Kaya et al., 2019), with adaptive pooling: a map below 4×4 has its cells repeated.
    """

    def __init__(self, feature: Feature, num_outputs: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(()))
        self.fc = nn.Linear(16 * feature.map().shape[1], num_outputs)

    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        x = feature.map()
        pooled = self.mix * functional.adaptive_max_pool2d(x, 4) + (1 - self.mix) * functional.adaptive_avg_pool2d(x, 4)
        return ExitOutput(self.fc(pooled.flatten(1)))


def make_head(kind: str, feature: Feature, num_outputs: int) -> ExitHead:
    """A head of `kind` (`linear`, `mlp-WIDTH` or `sdn`) for features like `feature`; raises EectlError for another kind."""
    family, dash, width = kind.partition("-")
    if family == "mlp" and dash:
        if not (width.isascii() and width.isdecimal() and int(width) > 0):
            raise EectlError(f"exit head '{kind}': the width after mlp- is a whole number from 1, such as mlp-1024")
        head: ExitHead = MlpHead(feature, num_outputs, int(width))
    else:
        head = lookup(HEADS, kind, what="exit head")(feature, num_outputs)
    head.kind = kind
    return head


HEADS: dict[str, Callable[..., ExitHead]] = {"linear": LinearHead, "mlp-WIDTH": MlpHead, "sdn": SdnHead}
