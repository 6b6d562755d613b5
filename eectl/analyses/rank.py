"""Measure the numerical rank (paper §3.3, Figure 4): how many dimensions each block's activations fill.

It counts eigenvalues of the activations' covariance. The paper names neither sample, centring nor tolerance; what is taken here
is settable and reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.probe import probe, resolve_view
from eectl.analyses.question import Answer, Context, Subject, check_split, sample_batches, sample_rows
from eectl.analyses.settings import RankSettings
from eectl.analyses.tables import Listing, Scalar
from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.evaluation.opened import preparing

MEMORY = 2**30  # bytes of running sums that one pass may hold; more blocks than that take another pass


@dataclass(frozen=True)
class Rank:
    """The ranks of a spectrum: `rank` eigenvalues are above the tolerance, `effective` is Roy & Vetterli's (2007) rank."""

    rank: int
    effective: float
    largest: float


class Covariance:
    """The centred covariance of rows that come in batches, in float64.

    Held is the smaller of features × features (running sums) and rows × rows (the rows are kept, in float32): both have the
    same spectrum.
    """

    def __init__(self, num_rows: int, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self._num_rows = num_rows
        self._keeps = num_rows < num_features
        self._wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._rows: list[Tensor] = []
        self._shift: Tensor | None = None
        self._sum = torch.zeros(num_features, dtype=self._wide, device=device)
        size = 0 if self._keeps else num_features
        self._products = torch.zeros(size, size, dtype=self._wide, device=device)
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """Add rows [row, feature]."""
        self.seen += len(rows)
        if self._keeps:
            self._rows.append(rows.float())
            return
        wide = rows.to(self._wide)
        if self._shift is None:  # about the mean: sums of squares about 0 would lose the digits of features far from it
            self._shift = wide.mean(dim=0)
        wide = wide - self._shift
        self._sum += wide.sum(dim=0)
        self._products.addmm_(wide.T, wide)

    def eigenvalues(self) -> Tensor:
        """Return the spectrum of the sample covariance, float64 on the CPU, largest first, none below 0."""
        assert self.seen == self._num_rows, f"{self.seen} rows came, {self._num_rows} were announced"
        if self._keeps:
            rows = torch.cat(self._rows).to(self._wide)
            rows = rows - rows.mean(dim=0)
            matrix = rows @ rows.T
        else:
            matrix = self._products - torch.outer(self._sum, self._sum) / self.seen
        values: Tensor = torch.linalg.eigvalsh(matrix.cpu().double() / (self.seen - 1))
        return values.flip(0).clamp(min=0)


def summarize_spectrum(eigenvalues: Tensor, tolerance: float) -> Rank:
    """Return the ranks of a covariance with these eigenvalues, largest first; 0 for constant activations.

    The effective rank is exp of the entropy of the singular values' shares, which needs no tolerance.
    """
    largest = eigenvalues[0].item()
    singular = eigenvalues.sqrt()
    if largest == 0:
        return Rank(0, 0.0, 0.0)
    shares = singular / singular.sum()
    entropy = torch.special.entr(shares).sum()
    return Rank(int((eigenvalues > tolerance * largest).sum()), float(entropy.exp()), largest)


class RankReader:
    """Collects the covariances of blocks, of the same features for every network whose block has as many."""

    def __init__(self, num_rows: int, features: int, view: str, seed: int) -> None:
        self.view = view
        self._num_rows, self._features, self._seed = num_rows, features, seed
        self._chosen: dict[int, Tensor] = {}
        self.covariances: dict[int, Covariance] = {}
        self.widths: dict[int, int] = {}

    def take(self, block: int, activations: Tensor, targets: Tensor) -> None:  # noqa: ARG002
        """Add a batch's activations [row, feature] of a block."""
        width = activations.shape[1]
        if block not in self.covariances:
            self.widths[block] = width
            kept = min(width, self._features)
            self.covariances[block] = Covariance(self._num_rows, kept, device=activations.device)
        if width > self._features:
            if width not in self._chosen:
                generator = torch.Generator().manual_seed(derive_seed(self._seed, "features", width))
                self._chosen[width] = torch.randperm(width, generator=generator)[: self._features].sort().values
            activations = activations.index_select(1, self._chosen[width].to(activations.device))
        self.covariances[block].add(activations)


def ask_rank(subjects: Sequence[Subject], settings: RankSettings, context: Context) -> Answer:
    """Measure the numerical and the effective rank of every block. Raises EectlError where the rows are too few to tell."""
    found = [_measure(subject, settings, context) for subject in subjects]
    for subject, one in zip(subjects, found, strict=True):
        most = max(block["rank"] for block in one["blocks"])
        if one["rows"] - 1 <= most:
            raise EectlError(
                f"--samples {settings.samples}: {subject.label} has a rank of {most} in {one['rows']} rows, the most that they "
                "can show; take more"
            )
    return Answer(
        values={"tolerance": settings.tolerance, "networks": found},
        records=[_record(one, block) for one in found for block in one["blocks"]],
        tables=[_listing(found, "rank", "numerical rank by block"), _listing(found, "effective_rank", "effective rank by block")],
        reading=_read(found, settings),
        notes=tuple(_notes(found)),
    )


def _measure(subject: Subject, settings: RankSettings, context: Context) -> dict[str, Any]:
    """Measure every block's rank, in as many passes as memory asks for."""
    session, model = subject.session, subject.session.checkpoint.model
    view = resolve_view(settings.view, is_text=session.data.info.kind == "text", default="flattened")
    split = check_split(session, settings.split)
    rows = sample_rows(split, settings.samples, context.seed)
    size = context.rows_at_once(subject)
    side = min(len(rows), settings.features)
    at_once = max(1, MEMORY // (8 * side * settings.features))
    depth = model.backbone.depth
    parts = [range(start, min(start + at_once, depth)) for start in range(0, depth, at_once)]
    blocks: list[dict[str, Any]] = []
    with context.count(subject.label, len(parts) * -(-len(rows) // size)) as step:
        for part in parts:
            reader = RankReader(len(rows), settings.features, view, context.seed)
            probe(model, sample_batches(split, rows, size), [reader], prepare=preparing(session), blocks=part, step=step)
            for block in part:
                spectrum = reader.covariances.pop(block).eigenvalues()
                blocks.append(_entry(subject, block, spectrum, reader.widths[block], settings, len(rows)))
    return {"label": subject.label, "after": list(model.after), "view": view, "rows": len(rows), "blocks": blocks}


def _entry(subject: Subject, block: int, spectrum: Tensor, width: int, settings: RankSettings, rows: int) -> dict[str, Any]:
    if not spectrum.isfinite().all():
        raise EectlError(
            f"{subject.label}: block {block} gives activations that are not finite; the network diverged in training"
        )
    found = summarize_spectrum(spectrum, settings.tolerance)
    kept = min(width, settings.features)
    return {
        "block": block,
        "rank": found.rank,
        "effective_rank": found.effective,
        "most": min(rows - 1, kept),
        "features": kept,
        "of_features": width,
        "largest_eigenvalue": found.largest,
        "spectrum": spectrum[:50].tolist(),
    }


def _record(one: dict[str, Any], block: dict[str, Any]) -> dict[str, Scalar]:
    return {"label": one["label"]} | {key: value for key, value in block.items() if key != "spectrum"} | {"rows": one["rows"]}


def _listing(found: Sequence[dict[str, Any]], key: str, title: str) -> Listing:
    depth = max(len(one["blocks"]) for one in found)
    rows = []
    for block in range(depth):
        after = "·".join(str(one["after"].index(block) + 1) for one in found[:1] if block in one["after"])
        values = [one["blocks"][block][key] if block < len(one["blocks"]) else None for one in found]
        rows.append((block, after, *values))
    return Listing(title, ("block", "exit", *(one["label"] for one in found)), tuple(rows))


def _notes(found: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for one in found:
        full = [str(block["block"]) for block in one["blocks"] if block["rank"] == block["most"]]
        if full:
            notes.append(
                f"{one['label']}: blocks {', '.join(full)} have the full rank that their features allow; raise --features"
            )
    return notes


def _read(found: Sequence[dict[str, Any]], settings: RankSettings) -> tuple[str, str]:
    parts = []
    for one in found:
        ranks = [block["rank"] for block in one["blocks"]]
        top = ranks.index(max(ranks))
        peak = f" (highest {ranks[top]} after block {top})" if top else ""
        parts.append(f"{one['label']} from {ranks[0]} after block 0 to {ranks[-1]} after the last{peak}")
    rows = found[0]["rows"]
    first = f"The numerical rank goes: {'; '.join(parts)}{_compared(found)}."
    second = (
        f"It counts directions with more than {settings.tolerance:g} of the largest variance in {rows:,} {settings.split} rows "
        f"and at most {settings.features:,} features: another tolerance, sample or feature subset moves the level, so compare "
        "within this table; a higher rank is not by itself a better network."
    )
    return first, second


def _compared(found: Sequence[dict[str, Any]]) -> str:
    """Say which network has the highest mean rank over blocks, and which follow."""
    if len(found) == 1:
        return ""
    means = {one["label"]: sum(block["rank"] for block in one["blocks"]) / len(one["blocks"]) for one in found}
    ordered = sorted(means, key=lambda label: -means[label])
    return "; mean over blocks: " + ", ".join(f"{label} {means[label]:.4g}" for label in ordered)
