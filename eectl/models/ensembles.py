"""Zero Time Waste's ensembles: an exit's logits as a weighted combination of the predictions of all heads up to it.

Each attached exit has its own weights over these heads; the network's own head is not combined. They are trained in a phase of
their own, when the heads are frozen. Source: Wołczyk et al., 2021, as in gmum/Zero-Time-Waste and
kamadforge/early-exit-benchmark: weights start in N(0, 0.01²), biases at 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eectl.core.errors import lookup


class GeometricEnsemble(nn.Module):
    """One exit's weighted geometric mean: logits = mean over heads j of exp(w_j) · log p_j, plus b; not normalised."""

    def __init__(self, num_heads: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, log_probabilities: Tensor) -> Tensor:
        """Return logits [row, class] from the heads' log-probabilities [head, row, class]."""
        return (self.weight.exp()[:, None, None] * log_probabilities).mean(dim=0) + self.bias


class ArithmeticEnsemble(GeometricEnsemble):
    """One exit's weighted arithmetic mean: logits = log p̄ with p̄ ∝ Σ over heads j of exp(w_j) · p_j, plus exp(b).

    It is computed from logarithms, where the source adds 1e-40 to the probabilities.
    """

    def forward(self, log_probabilities: Tensor) -> Tensor:
        terms = self.weight[:, None, None] + log_probabilities
        bias = self.bias.expand_as(terms[:1])
        return torch.cat((terms, bias)).logsumexp(dim=0).log_softmax(dim=1)


class Ensembles(nn.Module):
    """One ensemble of a kind (see ENSEMBLES) for each of `num_heads` attached exits; raises EectlError for another kind."""

    def __init__(self, kind: str, *, num_heads: int, num_outputs: int) -> None:
        super().__init__()
        self.kind = kind
        make = lookup(ENSEMBLES, kind, what="ensemble")
        self.exits = nn.ModuleList(make(number, num_outputs) for number in range(1, num_heads + 1))

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Return exit k's logits [row, class], in float32, from those of the heads 1..k, in this order."""
        log_probabilities = torch.stack([each.float().log_softmax(dim=1) for each in logits])
        result: Tensor = self.exits[len(logits) - 1](log_probabilities)
        return result


ENSEMBLES: dict[str, type[GeometricEnsemble]] = {"geometric": GeometricEnsemble, "arithmetic": ArithmeticEnsemble}
