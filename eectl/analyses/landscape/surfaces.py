"""Compute with surfaces of losses: where to look, how fast they rise, how far two lie apart; and their tables."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.tables import Listing, Scalar

DISTANCES = (0.25, 0.5, 1.0)  # of the span, at which the rise is reported
CURVATURE_STEP = 0.05  # in filter norms: far above float32 rounding, small where curvature matters

Point = tuple[float, ...]


def grid_coordinates(points: int, span: float) -> list[float]:
    """Return `points` numbers from −span to span, symmetric, with 0 exactly in the middle."""
    half = points // 2
    return [span * (index - half) / half if index != half else 0.0 for index in range(points)]


def places(coordinates: Sequence[float], dimensions: int) -> list[Point]:
    """Return every point that is looked at, once: the grid, and where rises and curvatures are taken."""
    axes = [place for share in DISTANCES for place in _ends(share * coordinates[-1], dimensions)]
    near = itertools.product((-CURVATURE_STEP, 0.0, CURVATURE_STEP), repeat=dimensions)
    return list(dict.fromkeys([*itertools.product(coordinates, repeat=dimensions), *axes, *near]))


def _ends(distance: float, dimensions: int) -> list[Point]:
    """Return the points at a distance along each direction, forth and back."""
    return [_on_axis(axis, sign * distance, dimensions) for axis in range(dimensions) for sign in (1, -1)]


def _on_axis(axis: int, value: float, dimensions: int) -> Point:
    return tuple(value if index == axis else 0.0 for index in range(dimensions))


def column(losses: Mapping[Point, Tensor], index: int, coordinates: Sequence[float], dimensions: int) -> dict[str, Any]:
    """Return one exit's losses on the grid and at its centre, their mean rise at DISTANCES and the largest curvature.

    None stands for what is not finite.
    """

    def at(*place: float) -> float | None:
        return finite(losses[place][index].item())

    centre = at(*[0.0] * dimensions)
    rises = []
    for share in DISTANCES:
        ends = [at(*place) for place in _ends(share * coordinates[-1], dimensions)]
        known = [end for end in ends if end is not None]
        rises.append(sum(known) / len(known) - centre if len(known) == len(ends) and centre is not None else None)
    loss = [at(x) for x in coordinates] if dimensions == 1 else [[at(x, y) for y in coordinates] for x in coordinates]
    return {"centre": centre, "rise": rises, "curvature": curvature(at, dimensions, CURVATURE_STEP), "loss": loss}


def finite(value: float) -> float | None:
    """Return the number, or None where it is not finite."""
    return value if math.isfinite(value) else None


def curvature(at: Callable[..., float | None], dimensions: int, step: float) -> float | None:
    """Return the largest second derivative at 0 along any direction, by central differences; None where a loss is not finite."""
    near = {place: at(*place) for place in itertools.product((-step, 0.0, step), repeat=dimensions)}
    if any(value is None for value in near.values()):
        return None
    known = {place: float(value or 0.0) for place, value in near.items()}
    hessian = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    centre = known[(0.0,) * dimensions]
    for axis in range(dimensions):
        hessian[axis, axis] = sum(known[_on_axis(axis, sign * step, dimensions)] for sign in (1, -1)) - 2 * centre
    if dimensions == 2:
        across = known[step, step] - known[step, -step] - known[-step, step] + known[-step, -step]
        hessian[0, 1] = hessian[1, 0] = across / 4
    return float(torch.linalg.eigvalsh(hessian / step**2)[-1])


def differences(networks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measure how far every two networks' surfaces lie apart, for the total, the first and the last exit.

    The distance is the root mean square over the grid of the difference of decimal logarithms; points without a finite loss
    above 0 in both are left out.
    """
    found = []
    for one, other in itertools.combinations(networks, 2):
        for name, index in (("total", None), ("first exit", 0), ("last exit", -1)):
            columns = [each["total"] if index is None else each["exits"][index] for each in (one, other)]
            pairs = zip(*(flat(column["loss"]) for column in columns), strict=True)
            squares = [math.log10(a / b) ** 2 for a, b in pairs if a and b]
            distance = math.sqrt(sum(squares) / len(squares)) if squares else None
            found.append({"networks": [one["label"], other["label"]], "of": name, "rms_log10": distance, "points": len(squares)})
    return found


def flat(loss: Sequence[Any]) -> list[float | None]:
    """Return the losses of a plane, or of a line, one after another."""
    return [value for row in loss for value in row] if isinstance(loss[0], list) else list(loss)


def surface_records(one: Mapping[str, Any], coordinates: Sequence[float], dimensions: int) -> list[dict[str, Scalar]]:
    """Return the CSV's rows: one per exit (and the total) and point."""
    places = list(itertools.product(coordinates, repeat=dimensions))
    return [
        {"label": one["label"], "exit": column["exit"]}
        | dict(zip("xy", place, strict=False))
        | {"loss": loss, "rows": one["rows"]}
        for column in (*one["exits"], one["total"])
        for place, loss in zip(places, flat(column["loss"]), strict=True)
    ]


def surface_tables(networks: Sequence[Mapping[str, Any]], alike: Sequence[Mapping[str, Any]], span: float) -> list[Listing]:
    """Return the table of every exit's numbers, and one of how far the networks' surfaces lie apart where there are several."""
    rises = tuple(f"rise {share * span:g}" for share in DISTANCES)
    rows: list[tuple[Scalar, ...]] = [
        (one["label"], str(column["exit"]), column["centre"], *column["rise"], column["curvature"])
        for one in networks
        for column in (*one["exits"], one["total"])
    ]
    title = "mean loss at the weights, its mean rise at distances along the directions, and the largest curvature"
    tables = [Listing(title, ("", "exit", "loss", *rises, "curvature"), tuple(rows))]
    if alike:
        names = list(dict.fromkeys(each["of"] for each in alike))
        pairs = list(dict.fromkeys(tuple(each["networks"]) for each in alike))
        known = {(*each["networks"], each["of"]): each["rms_log10"] for each in alike}
        body = tuple((f"{one} and {other}", *(known[one, other, name] for name in names)) for one, other in pairs)
        tables.append(Listing("how far two surfaces lie apart: r.m.s. of log₁₀ of the losses' ratio", ("", *names), body))
    return tables
