"""Estimate mutual information (paper §3.4, Figure 5): what each block's activations say about the input and the label.

A deterministic network's I(X;Z) is infinite or log n; so Z is the activations, projected to few dimensions, plus Gaussian noise
of a fixed share of their variance. Estimates are in nats. The formulas are those of Kolchinsky & Tracey (Entropy 2017) and of the
sampling estimator that the paper's source (Kawaguchi et al. 2023) uses; that source's own code is not followed, its density term
is one-dimensional.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.probe import probe, resolve_view
from eectl.analyses.question import Answer, Context, Subject, check_split, sample_batches, sample_rows
from eectl.analyses.settings import InformationSettings, check_count
from eectl.analyses.tables import Listing, Scalar
from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.evaluation.opened import preparing

CHUNK = 1000  # rows whose distances to all others are held at once
SATURATED = 0.9  # share of log n from which an estimate says more about n than about the network
BINS = 10  # groups of equal size that stand for a regression's target


@dataclass(frozen=True)
class Information:
    """Estimates in nats, for X uniform over `rows` rows.

    `sampled` is the Monte Carlo estimate of I(X;Z), at most log n; `leave_one_out` its upper companion; `lower` and `upper`
    Kolchinsky and Tracey's bounds. `label` is I(Y;Z) by the same mixture and `label_by_chance` the same with labels shuffled,
    what is found where nothing is; `saturated`: the estimate is next to log n.
    """

    sampled: float
    leave_one_out: float
    lower: float
    upper: float
    label: float | None
    label_by_chance: float | None
    saturated: bool


def estimate_information(features: Tensor, sigma: float, *, seed: int, labels: Tensor | None = None) -> Information:
    """Estimate I(X;Z), and I(Y;Z) for int64 `labels` [row], of Z = features [row, dimension] + N(0, sigma²), in float64.

    Memory is CHUNK × rows. Constant features give 0, and may come with `sigma` 0.
    """
    h = features.double()
    n = len(h)
    if not (h - h[0]).any():
        nothing = None if labels is None else 0.0
        return Information(0.0, 0.0, 0.0, 0.0, label=nothing, label_by_chance=nothing, saturated=False)
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
    z = h + sigma * torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.device)
    members = shuffled = None
    if labels is not None:
        members = torch.nn.functional.one_hot(labels).to(h)
        shuffled = members[torch.randperm(n, generator=generator)]
    sums = torch.zeros(6, dtype=torch.float64, device=h.device)
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        own = torch.arange(start, min(start + CHUNK, n), device=h.device)
        clean = _squares(h[rows], h) / (2 * sigma**2)
        sums[0] += torch.logsumexp(-clean / 4, dim=1).sum()
        sums[1] += torch.logsumexp(-clean, dim=1).sum()
        noisy = _squares(z[rows], h).div_(-2 * sigma**2)
        at_home = noisy.gather(1, own[:, None]).squeeze(1)
        highest = noisy.amax(dim=1, keepdim=True)
        kernel = (noisy - highest).exp()
        density = kernel.sum(dim=1)
        sums[2] += (at_home - highest.squeeze(1) - density.log()).sum()
        others = noisy.scatter(1, own[:, None], -math.inf)
        sums[3] += (at_home - torch.logsumexp(others, dim=1)).sum()
        for index, groups in ((4, members), (5, shuffled)):
            if groups is not None:
                within = (kernel @ groups * groups[rows]).sum(dim=1)
                share = (groups[rows] @ groups.sum(dim=0)) / n
                sums[index] += (within / density / share).log().sum()
    bhattacharyya, divergence, sampled, alone, label, chance = (sums / n).tolist()
    sampled = max(sampled + math.log(n), 0.0)
    return Information(
        sampled=sampled,
        leave_one_out=alone + math.log(n - 1),
        lower=math.log(n) - bhattacharyya,
        upper=math.log(n) - divergence,
        label=None if labels is None else label,
        label_by_chance=None if labels is None else chance,
        saturated=sampled > SATURATED * math.log(n),
    )


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances [row of a, row of b]."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square_()


class InformationReader:
    """Collects every block's activations, projected to few dimensions; one matrix per width, for all networks."""

    def __init__(self, dimensions: int, view: str, seed: int) -> None:
        self.view = view
        self._dimensions, self._seed = dimensions, seed
        self._matrices: dict[int, Tensor] = {}
        self.projected: dict[int, list[Tensor]] = {}
        self.widths: dict[int, int] = {}
        self.targets: list[Tensor] = []

    def take(self, block: int, activations: Tensor, targets: Tensor) -> None:
        """Add a batch's activations [row, feature] of a block, and once per batch its targets."""
        width = self.widths.setdefault(block, activations.shape[1])
        if block == min(self.widths):
            self.targets.append(targets.cpu())
        if width > self._dimensions:
            if width not in self._matrices:
                generator = torch.Generator().manual_seed(derive_seed(self._seed, "projection", width))
                matrix = torch.randn(width, self._dimensions, generator=generator, dtype=torch.float64)
                self._matrices[width] = torch.linalg.qr(matrix).Q.float().to(activations.device)
            activations = activations.float() @ self._matrices[width]
        self.projected.setdefault(block, []).append(activations.float().cpu())


def ask_information(subjects: Sequence[Subject], settings: InformationSettings, context: Context) -> Answer:
    """Estimate I(X;Z) with its bounds, and I(Y;Z), at every block. Raises EectlError where the rows are too few."""
    found = [_measure(subject, settings, context) for subject in subjects]
    tables = [_listing(found, "sampled", "I(X;Z) in nats by block, Monte Carlo")]
    tables += [_listing(found, "label", "I(Y;Z) in nats by block")]
    return Answer(
        values={"unit": "nat", "networks": found},
        records=[{"label": one["label"], **block, "rows": one["rows"]} for one in found for block in _csv_rows(one)],
        tables=tables,
        reading=_read(found, settings),
        notes=tuple(_notes(found, regression=subjects[0].session.checkpoint.about.task == "regression")),
    )


def _measure(subject: Subject, settings: InformationSettings, context: Context) -> dict[str, Any]:
    session, model = subject.session, subject.session.checkpoint.model
    view = resolve_view(settings.view, is_text=session.data.info.kind == "text", default="pooled")
    split = check_split(session, settings.split)
    rows = sample_rows(split, settings.samples, context.seed)
    check_count(len(rows), 3, option="--split", why="that is all the rows that the split has")
    size = context.rows_at_once(subject)
    reader = InformationReader(settings.dimensions, view, context.seed)
    depth = model.backbone.depth
    with context.count(subject.label, -(-len(rows) // size) + depth) as step:
        probe(model, sample_batches(split, rows, size), [reader], prepare=preparing(session), step=step)
        labels = _groups(torch.cat(reader.targets))
        blocks = []
        for block in range(depth):
            blocks.append(_entry(subject, block, reader, labels, settings, context.seed))
            step()
    return {
        "label": subject.label,
        "after": list(model.after),
        "view": view,
        "rows": len(rows),
        "most": math.log(len(rows)),
        "most_label": _entropy(labels),
        "blocks": blocks,
    }


def _entry(
    subject: Subject, block: int, reader: InformationReader, labels: Tensor, settings: InformationSettings, seed: int
) -> dict[str, Any]:
    features = torch.cat(reader.projected.pop(block)).to(subject.session.world.device)
    if not features.isfinite().all():
        raise EectlError(
            f"{subject.label}: block {block} gives activations that are not finite; the network diverged in training"
        )
    variance = features.double().var(dim=0, correction=0).mean().item()
    sigma = math.sqrt(settings.noise * variance)
    found = estimate_information(features, sigma, seed=seed, labels=labels.to(features.device))
    return {
        "block": block,
        **asdict(found),
        "sigma": sigma,
        "dimensions": features.shape[1],
        "of_features": reader.widths[block],
    }


def _groups(targets: Tensor) -> Tensor:
    """Return classes as they are, and numbers as the tenth that they lie in."""
    if not targets.is_floating_point():
        return targets
    rank = targets.argsort(stable=True).argsort()
    return rank * BINS // len(targets)


def _entropy(labels: Tensor) -> float:
    shares = labels.bincount().double() / len(labels)
    return float(torch.special.entr(shares).sum())


def _csv_rows(one: dict[str, Any]) -> list[dict[str, Scalar]]:
    return [{("labels" if key == "label" else key): value for key, value in block.items()} for block in one["blocks"]]


def _listing(found: Sequence[dict[str, Any]], key: str, title: str) -> Listing:
    """Make a table with a row per block; `*` marks estimates next to their ceiling."""
    rows = []
    for block in range(max(len(one["blocks"]) for one in found)):
        cells: list[Scalar] = []
        for one in found:
            entry = one["blocks"][block] if block < len(one["blocks"]) else None
            number = None if entry is None else entry[key]
            cells.append(f"{number:.3f}*" if entry and entry["saturated"] else None if number is None else f"{number:.3f}")
        after = "·".join(str(one["after"].index(block) + 1) for one in found[:1] if block in one["after"])
        rows.append((block, after, *cells))
    return Listing(title, ("block", "exit", *(one["label"] for one in found)), tuple(rows))


def _notes(found: Sequence[dict[str, Any]], *, regression: bool) -> list[str]:
    notes = []
    for one in found:
        full = [str(block["block"]) for block in one["blocks"] if block["saturated"]]
        if full:
            notes.append(
                f"* {one['label']}: blocks {', '.join(full)} are next to log n = {one['most']:.2f}, where every estimate ends: "
                "take more --noise, fewer --dimensions or more --samples"
            )
    if regression:
        notes.append(f"I(Y;Z) is about which tenth of the targets a row lies in (at most log {BINS} = {math.log(BINS):.2f})")
    return notes


def _read(found: Sequence[dict[str, Any]], settings: InformationSettings) -> tuple[str, str]:
    parts = []
    for one in found:
        values, labels = ([block[key] for block in one["blocks"]] for key in ("sampled", "label"))
        parts.append(
            f"{one['label']} {values[0]:.2f} nats about the input after block 0 and {values[-1]:.2f} after the last, "
            f"{labels[0]:.2f} and {labels[-1]:.2f} about the label (of {one['most_label']:.2f})"
        )
    chance = max(block["label_by_chance"] for one in found for block in one["blocks"])
    first = f"Activations under noise of {settings.noise:g} of their variance hold: {'; '.join(parts)}."
    second = (
        f"These are about {found[0]['rows']:,} {settings.split} rows and {settings.dimensions} random directions, so they "
        f"compare blocks and networks and are no property of one alone; shuffled labels already give up to {chance:.2f}, and "
        "noise is drawn at each block anew, so values may rise with depth."
    )
    return first, second
