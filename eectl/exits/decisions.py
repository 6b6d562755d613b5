"""Which of several labels apply: the probability that each label must exceed at each exit, chosen for F1 on some rows.

Arithmetic on probabilities; no network and no file.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.exits.scores import ScoredRows
from eectl.models.losses import f1_of_rows

Decisions = tuple[tuple[float, ...], ...]  # [exit][label]
HALF = 0.5


def decide(probabilities: Tensor, decisions: Decisions | None) -> Tensor:
    """Return which labels apply [exit, row, label]: those with a probability over that of `decisions`; default: over 1/2."""
    if decisions is None:
        return probabilities > HALF
    return probabilities.double() > torch.tensor(decisions, dtype=torch.float64)[:, None]


def choose_decisions(scored: ScoredRows) -> Decisions:
    """Return for each exit and label the probability over which the label's F1 is largest on these rows.

    Of equally good ones it is the highest; each lies halfway between two probabilities that occur. A label that no row has keeps
    1/2.
    """
    assert scored.outputs is not None
    outputs, labels = scored.outputs.numpy(), (scored.labels > 0).numpy()
    return tuple(
        tuple(_best_cut(column, own) for column, own in zip(probabilities.T, labels.T, strict=True)) for probabilities in outputs
    )


def _best_cut(probabilities: NDArray[np.float32], is_true: NDArray[np.bool_]) -> float:
    if not is_true.any():
        return HALF
    order = np.argsort(-probabilities, kind="stable")
    found = probabilities[order].astype(np.float64)
    ends = np.append(np.flatnonzero(found[1:] != found[:-1]), len(found) - 1)  # the last row of each distinct probability
    f1 = 2 * is_true[order].cumsum()[ends] / (ends + 1 + is_true.sum())
    best = int(f1.argmax())
    below = found[ends[best] + 1] if ends[best] + 1 < len(found) else 0.0
    return float(found[ends[best]] + below) / 2


def decided(scored: ScoredRows, decisions: Decisions) -> ScoredRows:
    """Return the same rows with outcomes, each row's F1, as these decisions make them."""
    assert scored.outputs is not None
    predicted = decide(scored.outputs, decisions)
    outcome = torch.stack([f1_of_rows(each, scored.labels) for each in predicted])
    return replace(scored, outcome=outcome.double())
