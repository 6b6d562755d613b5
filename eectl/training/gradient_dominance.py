"""Gradient dominance (paper §3.1): how far each exit's gradient points the way of the sum that moves the shared backbone.

From one forward pass: one backward pass per exit, their Gram matrix by segment, and what follows from it. `Tracker` keeps the
sums of an epoch; it changes nothing that training reads. Which batches come, and what is written, is the caller's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eectl.core.distributed import total
from eectl.core.errors import EectlError, lookup
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.regimes import Phase

PIECE = 2**20  # numbers of a gradient that are widened at once
SHARE = 0.1  # tracking may take this share of the time
BACKWARD = 1.0  # steps that a backward pass through the whole backbone is taken to cost; 0.65 to 0.8 on CPUs
_TOOK_PART, _COSINE, _PREFIX, _NORMS = 0, 1, 3, 5  # columns of Tracker.sums: each cosine is a count and a sum


@dataclass(frozen=True)
class Dominance:
    """Agreement of exits' gradients, read from their Gram matrix; NaN where a gradient is 0.

    `cosine` [exit]: of the exit's gradient and the weighted sum of all; `prefix` [exit]: the same over the segments that the exit
    stands on, since past them its gradient is 0 and the cosine cannot reach 1; `norms` [exit, segment]: of the unweighted
    gradients; `pairs` [exit, exit]: of two exits' gradients.
    """

    cosine: Tensor
    prefix: Tensor
    norms: Tensor
    pairs: Tensor


def shared_parameters(model: MultiExitModel) -> list[list[Tensor]]:
    """Return the backbone's parameters that train, by segment 1..K.

    Heads are left out, the network's own among them: nothing but their own exit moves them. A parameter that several blocks use
    (ALBERT) counts in the first segment that names it.
    """
    groups: list[list[Tensor]] = [[] for _ in range(model.num_exits)]
    backbone = model.backbone
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and backbone.locate(name.removeprefix("net.")) < backbone.depth:
            groups[model.part(f"backbone.{name}")[1] - 1].append(parameter)
    return groups


def gram_matrices(losses: Sequence[Tensor], segments: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the inner products of the losses' gradients over each segment's parameters: float64 [segment, exit, exit].

    One backward pass per loss; the graph can still be used, and no `.grad` or hook of a parameter is touched. All gradients are
    held at once, and those of one segment twice: up to K + 1 times the memory of the parameters. float32 on mps.
    """
    flat = [parameter for segment in segments for parameter in segment]
    rows: list[list[Tensor]] = [[] for _ in segments]
    for loss in losses:
        given: Sequence[Tensor | None] = [None] * len(flat)
        if loss.requires_grad and flat:
            given = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        found = iter(given)
        for row, segment in zip(rows, segments, strict=True):
            row.append(_joined([next(found) for _ in segment], segment, (flat or losses)[0]))
    device = losses[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    grams = torch.zeros(len(segments), len(losses), len(losses), dtype=dtype, device=device)
    for gram, row in zip(grams, rows, strict=True):
        for pieces in zip(*(torch.split(gradient, PIECE) for gradient in row), strict=True):
            wide = torch.stack(pieces).to(dtype)
            gram += wide @ wide.T
        row.clear()
    return grams


def _joined(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return one vector of a segment's gradients; zeros that take no memory where there is none at all."""
    if all(gradient is None for gradient in gradients):
        return like.detach().new_zeros(()).expand(sum(parameter.numel() for parameter in parameters))
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(own) if gradient is None else gradient).flatten() for gradient, own in pairs])


def dominance(grams: Tensor, weights: Tensor, exits: Sequence[int]) -> Dominance:
    """Return the dominance of the exits with these numbers (from 1) and loss weights [exit], from their Gram matrices.

    GD_i = Σ_j a_j G_ij / sqrt(G_ii · aᵀGa), G being the sum over all segments, or those up to the exit's own.
    """
    weights = weights.to(grams.dtype)
    up_to = grams.cumsum(dim=0)
    prefixes = torch.stack([up_to[number - 1] for number in exits])  # [exit, exit, exit]
    whole = up_to[-1]
    norms = whole.diagonal().sqrt()
    return Dominance(
        cosine=_cosines(whole.expand_as(prefixes), weights),
        prefix=_cosines(prefixes, weights),
        norms=grams.diagonal(dim1=1, dim2=2).sqrt().T,
        pairs=_ratio(whole, norms[:, None] * norms),
    )


def _cosines(grams: Tensor, weights: Tensor) -> Tensor:
    """Return for each i the cosine of gradient i and the weighted sum by Gram matrix i of [exit, exit, exit]."""
    towards = grams @ weights  # [i, j]: of gradient j and the sum, by matrix i
    length = (towards @ weights).clamp(min=0).sqrt()
    return _ratio(towards.diagonal(), grams.diagonal(dim1=1, dim2=2).diagonal().sqrt() * length)


def _ratio(products: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, products / lengths, math.nan).clamp(-1, 1)


class Tracker:
    """The sums of an epoch's measured batches, `sums` [exit, column]: what a resume state keeps, and processes add up.

    Make it once the phase's parameters are set to train. `every`: of the batches that several exits take part in, which are
    measured; none: so few that it costs at most a tenth of the time.
    """

    def __init__(self, model: MultiExitModel, phase: Phase, *, every: int | None, device: torch.device) -> None:
        self._segments = shared_parameters(model)
        self._exits = sorted(phase.scored)
        self._cycle = len(phase.losses)
        self.every = every or auto_interval(model, phase)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(model.num_exits, _NORMS + model.num_exits, dtype=dtype, device=device)

    def due(self, step: int, exits: Sequence[int]) -> bool:
        """Return whether the batch of this step, which trains `exits`, is to be measured. A function of the step alone."""
        return len(exits) > 1 and (step // self._cycle + 1) % self.every == 0  # short runs, too, stay below the tenth

    def measure(self, losses: Sequence[Tensor], weights: Tensor, exits: Sequence[int], index: Tensor) -> None:
        """Add a batch to the sums, from the losses of `exits` (`index`: the same from 0, on the device) with their graph."""
        found = dominance(gram_matrices(losses, self._segments), weights, exits)
        cosines = [part for each in (found.cosine, found.prefix) for part in (~each.isnan(), each.nan_to_num(0))]
        columns = torch.stack([torch.ones_like(found.cosine), *(each.to(self.sums.dtype) for each in cosines)], dim=1)
        self.sums.index_add_(0, index, torch.cat([columns, found.norms], dim=1))

    def take(self) -> dict[str, Any]:
        """Return the epoch's means for metrics.jsonl, over all processes; the sums start again from 0.

        `exits` are those that the phase trains, the lists follow them; `norms` are [exit][segment]. `batches` counts each
        process's part of a batch, or its pieces where rows accumulate. NaN where nothing was measured, or the gradient was 0 in
        all batches.
        """
        sums = total(self.sums).cpu().double()[[number - 1 for number in self._exits]]
        self.sums.zero_()
        return {
            "exits": list(self._exits),
            "cosine": (sums[:, _COSINE + 1] / sums[:, _COSINE]).tolist(),
            "prefix_cosine": (sums[:, _PREFIX + 1] / sums[:, _PREFIX]).tolist(),
            "norms": (sums[:, _NORMS:] / sums[:, _TOOK_PART, None]).tolist(),
            "batches": int(sums[:, _TOOK_PART].max()),
            "every": self.every,
        }


def auto_interval(model: MultiExitModel, phase: Phase) -> int:
    """Return the interval at which measuring takes at most a tenth of the time.

    It depends on the network's shape alone, so a resumed run has the same.

    An exit's backward pass goes through its share of the blocks, taken as equally expensive.
    """
    reach = [(block + 1) / model.backbone.depth for block in model.after] + [1.0]
    costs = [BACKWARD * sum(reach[number - 1] for number in exits) for exits in phase.losses if len(exits) > 1]
    return math.ceil(sum(costs) / (SHARE * len(phase.losses))) if costs else 1


def why_untracked(model: MultiExitModel, phase: Phase, weighting: str | Sequence[float]) -> str | None:
    """Return why a phase, its parameters set to train, has no gradient dominance; None where it has."""
    if max(map(len, phase.losses)) == 1:
        return "it trains on one exit at a time, so there is nothing to compare"
    if not any(shared_parameters(model)):
        return "the backbone is frozen, so there are no shared weights that exits pull at"
    if weighting == "l2w":
        return "l2w weighs every row by itself, so there is no one gradient per exit"
    return None


def check_track(name: str, *, compiled: bool) -> None:
    """Raise EectlError for what cannot be tracked."""
    lookup({"gradient-dominance": None}, name, what="--track")
    if compiled:
        raise EectlError(
            f"--track {name} takes several backward passes through one forward pass, which compiled networks do not allow; "
            "--set compile=false"
        )
