"""Match weights: find the permutations of one network's units that bring its weights closest to another's.

Coordinate ascent over groups, each step a linear assignment (git re-basin: Ainsworth et al., 2023, algorithm 1). It finds a
local optimum that depends on the order of the groups, so several random orders are tried. Forwards no rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.analyses.connectivity.permutations import Piece, Specification
from eectl.core.seeds import derive_seed

MOST_SWEEPS = 100
LEAST_GAIN = 1e-7  # of the product of both networks' norms; what float32 sums cannot tell apart is no progress


@dataclass(frozen=True)
class Matching:
    """Permutations for `Specification.apply`, and the cosine of both networks' permutable parameters before and after.

    `orders` are the cosines that each order led to, `sweeps` those of the best.
    """

    permutations: list[Tensor]
    before: float
    after: float
    orders: tuple[float, ...]
    sweeps: int

    @property
    def moved(self) -> int:
        """The number of units that changed place."""
        return sum(int((order != torch.arange(len(order))).sum()) for order in self.permutations)


@dataclass
class _Part:
    """The same part of a parameter in both networks, an axis per digit; `moved` is permuted as matching goes on."""

    piece: Piece
    fixed: Tensor
    moved: Tensor


def match(
    spec: Specification, first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, seed: int, orders: int = 5
) -> Matching:
    """Find permutations of the second network's units that maximise the product of its learned parameters with the first's.

    The best of `orders` random orders of the groups; buffers, such as BatchNorm's statistics, count for nothing.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "matching"))
    norm = _norm(spec, first) * _norm(spec, second)
    found = [_ascend(spec, first, second, norm=norm, generator=generator) for _ in range(orders)]
    values = tuple(value for _, value, _ in found)
    permutations, after, sweeps = found[values.index(max(values))]
    before = _total(_parts(spec, first, second)) / norm if norm else 1.0
    return Matching(permutations, before, after, values, sweeps)


def _norm(spec: Specification, weights: Mapping[str, Tensor]) -> float:
    return math.sqrt(_total(_parts(spec, weights, weights)))


def _parts(spec: Specification, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[_Part]:
    named = [(name, piece) for name in spec.learned for piece in spec.pieces.get(name, ())]
    return [_Part(piece, piece.of(first[name]), piece.of(second[name])) for name, piece in named]


def _total(parts: Sequence[_Part]) -> float:
    return sum(float((part.fixed * part.moved).sum(dtype=torch.float64)) for part in parts)


def _ascend(
    spec: Specification, first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, norm: float, generator: torch.Generator
) -> tuple[list[Tensor], float, int]:
    """Improve one group after another until none gains anything; return permutations, cosine and sweeps."""
    permutations, sweeps, gained = spec.identity(), 0, True
    parts = _parts(spec, first, second)
    using = [[part for part in parts if part.piece.places(group)] for group in range(len(spec.sizes))]
    while gained and sweeps < MOST_SWEEPS:
        gained, sweeps = False, sweeps + 1
        for group in torch.randperm(len(spec.sizes), generator=generator).tolist():
            order = _improve(using[group], group, least=LEAST_GAIN * norm)
            if order is not None:
                permutations[group] = permutations[group][order]
                gained = True
    return permutations, _total(parts) / norm if norm else 1.0, sweeps


def _improve(parts: Sequence[_Part], group: int, *, least: float) -> Tensor | None:
    """Permute one group's units as its best assignment says; return None, and change nothing, where that gains nothing."""
    from scipy.optimize import linear_sum_assignment

    products = sum(_products(part, place) for part in parts for place in part.piece.places(group))
    assert isinstance(products, Tensor)
    order = torch.from_numpy(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1])
    moved = [_permuted(part, group, order) for part in parts]
    gain = sum(
        float((part.fixed * (now - part.moved)).sum(dtype=torch.float64)) for part, now in zip(parts, moved, strict=True)
    )  # the products foretell it, but for parameters with this group on two axes
    if gain <= least:
        return None
    for part, now in zip(parts, moved, strict=True):
        part.moved = now
    return order


def _products(part: _Part, place: int) -> Tensor:
    """Return the products [unit of the first, unit of the second] of all weights that belong to two units."""
    one, other = (tensor.movedim(place, 0).reshape(tensor.shape[place], -1) for tensor in (part.fixed, part.moved))
    return (one @ other.T).double()


def _permuted(part: _Part, group: int, order: Tensor) -> Tensor:
    moved = part.moved
    for place in part.piece.places(group):
        moved = moved.index_select(place, order.to(moved.device))
    return moved
