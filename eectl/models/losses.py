"""What is minimised and what is reported: losses and scores per task, and what exits learn from each other. Knows no model.

How exits are weighted is `weighting`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eectl.core.errors import lookup
from eectl.models.heads import ExitOutput
from eectl.recipe.recipe import SCORE_NAMES


@dataclass(frozen=True)
class Task:
    """A kind of problem: what is minimised, what is reported, and what a network's outputs are.

    `name` is its key in TASKS. `loss(outputs [row, …], targets, label_smoothing)` → the mean over rows; `losses` is the same for
    each row: [row]. `points(outputs, targets)` → [row], whose mean is the score. `higher_is_better` is the score's direction;
    `score_name` its name in tables. `distil(student, teachers, temperature)` → how far a student's outputs are from its
    teachers', mean over rows. `predicts_number` says that a row's outputs are one number [1]; else they are logits [class].
    """

    name: str
    loss: Callable[[Tensor, Tensor, float], Tensor]
    points: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    score_name: str
    losses: Callable[[Tensor, Tensor, float], Tensor]
    distil: Callable[[Tensor, Sequence[Tensor], float], Tensor]
    predicts_number: bool


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.max(dim=1).indices == targets).float()  # the argmax, up to four times as fast on CPUs


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().squeeze(1) - targets.float()).square()


def _mean_squared_error(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    assert label_smoothing == 0
    return _squared_error(outputs, targets).mean()


def _cross_entropies(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, reduction="none")


def _squared_errors(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    assert label_smoothing == 0
    return _squared_error(outputs, targets)


def _divergence(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T (Hinton et al., 2015), for the mean of the teachers' probabilities."""
    mean = torch.stack([F.log_softmax(logits.detach().float() / temperature, dim=1) for logits in teachers]).exp().mean(dim=0)
    own = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(own, mean, reduction="batchmean") * temperature**2


def _distance(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:  # noqa: ARG001
    """The squared error against the mean of the teachers' outputs; a temperature means nothing here."""
    return (student.float() - torch.stack([output.detach().float() for output in teachers]).mean(dim=0)).square().mean()


def distil(outputs: Sequence[Tensor], *, teacher: str, temperature: float, task: Task) -> Tensor:
    """What exits learn from later exits: the mean over the students of their distance from their teachers, which get no gradient.

    `outputs` ([row, …] each) are those of the exits that take part, in order, so exits that do not run teach nobody. `last`: the
    last of them teaches all others (Phuong & Lampert, 2019); `next`: each teaches the one before it; `later`: the mean of all
    later ones teaches each. One exit alone has no teacher: 0.
    """
    choose = lookup(TEACHERS, teacher, what="distillation.teacher")
    if len(outputs) == 1:
        return outputs[0].new_zeros((), dtype=torch.float32)
    distances = [task.distil(own, choose(outputs[k + 1 :]), temperature) for k, own in enumerate(outputs[:-1])]
    return torch.stack(distances).mean()


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
    "classification": Task(
        "classification", _cross_entropy, _correct, True, SCORE_NAMES["classification"], _cross_entropies, _divergence, False
    ),
    "regression": Task(
        "regression", _mean_squared_error, _squared_error, False, SCORE_NAMES["regression"], _squared_errors, _distance, True
    ),
}
TEACHERS: dict[str, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = {
    "last": lambda later: later[-1:],
    "later": lambda later: later,
    "next": lambda later: later[:1],
}
