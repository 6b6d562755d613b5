"""What is minimised and what is reported: losses and scores per task, and how exits are weighted. Knows no model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eectl.errors import EectlError, lookup
from eectl.models.heads import ExitOutput


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    `loss(outputs [row, …], targets, label_smoothing)` → the mean over rows. `points(outputs, targets)` → [row], whose mean is
    the score. `higher_is_better` is the score's direction; `score_name` its name in tables.
    """

    loss: Callable[[Tensor, Tensor, float], Tensor]
    points: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    score_name: str


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == targets).float()


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().squeeze(1) - targets.float()).square()


def _mean_squared_error(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    assert label_smoothing == 0
    return _squared_error(outputs, targets).mean()


def exit_weights(weights: Literal["uniform"] | Sequence[float], *, num_exits: int, taking_part: Sequence[int]) -> list[float]:
    """The weight of each exit in `taking_part` (numbers from 1), summing to 1.

    `uniform` is the mean over the exits that take part (methods: the default everywhere except GPF); a list has one number
    per exit of the network. Raises EectlError for a list of another length or with nothing left.
    """
    if weights == "uniform":
        return [1 / len(taking_part)] * len(taking_part)
    if len(weights) != num_exits:
        raise EectlError(
            f"loss_weights: {len(weights)} numbers for {num_exits} exits; give one per exit, the last one's included"
        )
    chosen = [float(weights[k - 1]) for k in taking_part]
    if sum(chosen) <= 0:
        raise EectlError(f"loss_weights: the exits {list(taking_part)} that train in this phase all have weight 0")
    return [weight / sum(chosen) for weight in chosen]


def imitation(outputs: Sequence[ExitOutput | None]) -> Tensor | None:
    """How badly exits foresee the states of later ones (GPF): 1 − cosine to the actual states, which are detached.

    The mean over rows and later exits, then over the exits that foresee; exits that were skipped (None) are left out, and None
    is returned where nothing is left.
    """
    terms = []
    for number, output in enumerate(outputs, 1):
        if output is None or output.guesses is None:
            continue
        later = zip(output.guesses.unbind(dim=1), outputs[number:], strict=False)
        pairs = [
            (guess.float(), real.state.detach().float()) for guess, real in later if real is not None and real.state is not None
        ]
        if pairs:
            guesses, states = (torch.cat(side) for side in zip(*pairs, strict=True))
            terms.append(F.cosine_embedding_loss(states, guesses, states.new_ones(len(states))))
    return torch.stack(terms).mean() if terms else None


def with_auxiliary(name: str | None, loss: Tensor, outputs: Sequence[ExitOutput | None]) -> Tensor:
    """The loss to minimise: the exits' weighted `loss`, and what heads with the auxiliary term `name` add to it (none: none)."""
    if name is None:
        return loss
    term, share = lookup(AUXILIARY, name, what="auxiliary loss")
    value = term(outputs)
    return loss if value is None else share * (loss + value)


AUXILIARY: dict[str, tuple[Callable[[Sequence[ExitOutput | None]], Tensor | None], float]] = {  # the term; a factor for the sum
    "imitation": (imitation, 1.0),
    "imitation-halved": (imitation, 0.5),
}
TASKS: dict[str, Task] = {
    "classification": Task(_cross_entropy, _correct, True, "accuracy"),
    "regression": Task(_mean_squared_error, _squared_error, False, "MSE"),
}
