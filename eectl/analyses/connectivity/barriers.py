"""Compute loss barriers from losses along lines; their tables and what they say. Runs no network.

A line is `{"loss": [point][exit], "score": [point][exit]}` at evenly spaced points from one network to the other.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from eectl.analyses.tables import Listing, Scalar

PATHS = ("naive", "matched")
SPLITS = ("train", "test")
FLAT = 0.05  # a mean barrier below this is called one basin in the reading, in units of the loss


def shares(points: int) -> list[float]:
    """Return λ of evenly spaced points, 0 and 1 included."""
    return [index / (points - 1) for index in range(points)]


def barrier(losses: Sequence[float]) -> float:
    """Return the largest L(λ) − ((1 − λ)·L(0) + λ·L(1)) of losses at evenly spaced λ; at least 0, as both ends give 0."""
    first, last = losses[0], losses[-1]
    return max(loss - (first + (last - first) * share) for loss, share in zip(losses, shares(len(losses)), strict=True))


def summarize_line(line: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Add to a line each exit's `barrier`, their mean, and the barrier of the mean loss over exits, which is at most that."""
    by_exit = [barrier(losses) for losses in zip(*line["loss"], strict=True)]
    of_mean = barrier([fmean(losses) for losses in line["loss"]])
    return {**line, "barrier": by_exit, "mean_barrier": fmean(by_exit), "barrier_of_mean": of_mean}


def mean_barrier(pair: Mapping[str, Any], path: str, split: str) -> float:
    """Return a pair's barrier, mean over exits."""
    return float(pair["paths"][path][split]["mean_barrier"])


def barrier_map(pairs: Sequence[Mapping[str, Any]], labels: Sequence[str], path: str, split: str) -> list[list[float]]:
    """Return the mean barrier of each two networks [first][second], symmetric, 0 on the diagonal."""
    found = {frozenset((pair["first"], pair["second"])): mean_barrier(pair, path, split) for pair in pairs}
    return [[found.get(frozenset((one, other)), 0.0) for other in labels] for one in labels]


def records(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Scalar]]:
    """Return the CSV's rows: one per pair, path, split, point and exit."""
    return [
        {
            "first": pair["first"],
            "second": pair["second"],
            "path": path,
            "split": split,
            "lambda": share,
            "exit": number,
            "loss": loss,
            "score": score,
            "barrier": found["barrier"][number - 1],
        }
        for pair in pairs
        for path in PATHS
        for split, found in pair["paths"][path].items()
        for share, losses, scores in zip(shares(len(found["loss"])), found["loss"], found["score"], strict=True)
        for number, (loss, score) in enumerate(zip(losses, scores, strict=True), 1)
    ]


def tables(pairs: Sequence[Mapping[str, Any]]) -> list[Listing]:
    """Return the table of all pairs' barriers, and for a single pair one of each exit's."""
    ways = [(path, split) for split in SPLITS for path in PATHS]
    heads = tuple(f"{path}, {split}" for path, split in ways)
    rows = tuple((_name(pair), *(f"{mean_barrier(pair, *way):.4f}" for way in ways)) for pair in pairs)
    found = [Listing("loss barrier on the line, mean over exits", ("pair", *heads), rows)]
    if len(pairs) == 1:
        by_exit = zip(*(pairs[0]["paths"][path][split]["barrier"] for path, split in ways), strict=True)
        exits = tuple((str(number), *(f"{value:.4f}" for value in values)) for number, values in enumerate(by_exit, 1))
        found.append(Listing("the same by exit", ("exit", *heads), exits))
    return found


def _name(pair: Mapping[str, Any]) -> str:
    return f"{pair['first']} – {pair['second']}"


def read(values: Mapping[str, Any]) -> tuple[str, str]:
    """Say in two sentences what the barriers on the test split show, and what they cannot."""
    pairs = values["pairs"]
    naive, matched = (fmean(mean_barrier(pair, path, "test") for pair in pairs) for path in PATHS)
    if len(pairs) == 1:
        finding = (
            f"From {pairs[0]['first']} to {pairs[0]['second']} the test loss rises {naive:.3f} above the straight line between "
            f"its ends (mean over exits), {matched:.3f} with units matched: "
            + (f"below {FLAT}, one basin." if matched < FLAT else f"not one basin (below {FLAT}) on this line.")
        )
    else:
        nearest, farthest = (
            f"{_name(pair)} ({mean_barrier(pair, 'matched', 'test'):.3f})"
            for pair in (each(pairs, key=lambda pair: mean_barrier(pair, "matched", "test")) for each in (min, max))
        )
        low = sum(mean_barrier(pair, "matched", "test") < FLAT for pair in pairs)
        finding = (
            f"Over {len(pairs)} pairs the mean test barrier is {naive:.3f}, {matched:.3f} with units matched; nearest are "
            f"{nearest}, farthest {farthest}, and {low} of {len(pairs)} share a basin (below {FLAT})."
        )
    limits = (
        f"Weight matching finds a local optimum (the best of {values['orders']} orders), so a barrier that is left does not "
        "prove two basins, narrow networks keep one in any case; only the straight line was looked at, on "
        f"{values['samples']['test']} test rows."
    )
    return finding, limits
