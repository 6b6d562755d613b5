"""Losses and scores of each task, and the loss terms by which exits learn from each other. Knows no network.

How the exits' losses are weighted is decided in recipe/weighting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eectl.core.errors import lookup
from eectl.models.heads import ExitOutput
from eectl.recipe.choices import TASK_CHOICES, in_order
from eectl.recipe.recipe import SCORE_NAMES


@dataclass(frozen=True)
class Task:
    """One kind of problem: its loss and its score; outputs are logits [row, class] or numbers [row, 1].

    Attributes:
        name: its key in TASKS.
        loss: (outputs, targets, label_smoothing) → the mean over rows.
        points: (outputs, targets) → [row]; their mean is the score.
        higher_is_better: the direction of the score.
        score_name: what tables call the score.
        losses: (outputs, targets, label_smoothing) → [row], `loss` before the mean.
        distil: (student's outputs, teachers' outputs, temperature) → how far the student is from its teachers, mean over rows.
        predicts_number: whether a row's outputs are one number [1]; else they are logits [class].
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


def exit_losses(task: Task, outputs: Sequence[Tensor], targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean loss over rows of each exit [exit], all of them computed in one call.

    Args:
        task: the kind of problem.
        outputs: each exit's outputs, [row, …].
        targets: [row], or [row, class] of mixed images.
        label_smoothing: as `Task.loss` takes it.
    """
    rows, repeats = torch.cat([each.float() for each in outputs]), (len(outputs), *(1 for _ in targets.shape[1:]))
    return task.losses(rows, targets.repeat(repeats), label_smoothing).view(len(outputs), -1).mean(dim=1)


def weighted_exit_losses(
    outputs: Sequence[Tensor], targets: Tensor, label_smoothing: float, *, class_weights: Tensor, total: Tensor
) -> Tensor:
    """Return `exit_losses` of a classification in which rows count by their class, as torch's CrossEntropyLoss(weight=) has it.

    Args:
        outputs: each exit's logits.
        targets: as for `exit_losses`.
        label_smoothing: as for `exit_losses`.
        class_weights: how much a row of each class counts [class].
        total: what the sum over rows is divided by, as `total_weight` says.
    """
    rows, repeats = torch.cat([each.float() for each in outputs]), (len(outputs), *(1 for _ in targets.shape[1:]))
    losses = F.cross_entropy(
        rows, targets.repeat(repeats), weight=class_weights, label_smoothing=label_smoothing, reduction="none"
    )
    return losses.view(len(outputs), -1).sum(dim=1) / total


def total_weight(targets: Tensor, class_weights: Tensor) -> Tensor:
    """Return what torch divides the weighted losses of rows by: the sum of their weights, or of mixed images their number."""
    return class_weights.new_full((), len(targets)) if targets.dim() > 1 else class_weights[targets].sum()


def balanced_weights(labels: Tensor) -> Tensor:
    """Return how much a row of each class [class] counts where classes count alike: N / (C · n_c), in float64.

    `labels` are those of N rows. C is the number of classes that have rows; one that has none counts 0.
    """
    counts = torch.bincount(labels).double()
    return torch.where(counts > 0, len(labels) / (counts.count_nonzero() * counts), 0.0)


def exit_points(task: Task, outputs: Sequence[Tensor], targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return each exit's points summed over rows [exit], in one call; with `weights` [row], how much each row counts.

    Other arguments as for `exit_losses`.
    """
    points = task.points(torch.cat(list(outputs)), targets.repeat(len(outputs))).view(len(outputs), -1)
    return (points if weights is None else points * weights).sum(dim=1)


def _divergence(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ student) at temperature T (Hinton et al., 2015); several teachers' probabilities are averaged."""
    mean = torch.stack([F.log_softmax(logits.detach().float() / temperature, dim=1) for logits in teachers]).exp().mean(dim=0)
    own = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(own, mean, reduction="batchmean") * temperature**2


def _distance(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:  # noqa: ARG001
    """Return the squared error against the mean of the teachers' outputs; the temperature is not used."""
    return (student.float() - torch.stack([output.detach().float() for output in teachers]).mean(dim=0)).square().mean()


def distil(outputs: Sequence[Tensor], *, teacher: str, temperature: float, task: Task) -> Tensor:
    """Return the distillation loss: the mean over exits of their distance from later exits, which get no gradient from it.

    Args:
        outputs: [row, …] of each exit that takes part in the step, in the order of the exits; one alone has no teacher, and the
            loss is 0.
        teacher: `last`: the last exit teaches all others (Phuong & Lampert, 2019); `next`: each teaches the one before it;
            `later`: each learns from the mean of all later ones. Raises EectlError for another word.
        temperature: divides the logits of classes before they are compared.
        task: the kind of problem, which says what the distance is.
    """
    choose = lookup(TEACHERS, teacher, what="distillation.teacher")
    if len(outputs) == 1:
        return outputs[0].new_zeros((), dtype=torch.float32)
    distances = [task.distil(own, choose(outputs[k + 1 :]), temperature) for k, own in enumerate(outputs[:-1])]
    return torch.stack(distances).mean()


def imitation(outputs: Sequence[ExitOutput | None]) -> Tensor | None:
    """Return GPF's imitation loss: 1 − cosine between the states that exits predict for later ones and the real, detached ones.

    It is the mean over rows and later exits, then over the exits that predict. Exits that were skipped (None) are left out;
    where nothing is left the result is None.
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
    """Return the loss to minimise: the exits' weighted `loss` and the auxiliary term `name` of their heads (None: no term)."""
    if name is None:
        return loss
    term, share = lookup(AUXILIARY, name, what="auxiliary loss")
    value = term(outputs)
    return loss if value is None else share * (loss + value)


AUXILIARY: dict[str, tuple[Callable[[Sequence[ExitOutput | None]], Tensor | None], float]] = {
    "imitation": (imitation, 1.0),  # the term, and the factor of loss and term together
    "imitation-halved": (imitation, 0.5),
}
TASKS: dict[str, Task] = in_order(
    TASK_CHOICES,
    {
        "classification": Task(
            "classification", _cross_entropy, _correct, True, SCORE_NAMES["classification"], _cross_entropies, _divergence, False
        ),
        "regression": Task(
            "regression", _mean_squared_error, _squared_error, False, SCORE_NAMES["regression"], _squared_errors, _distance, True
        ),
    },
)
TEACHERS: dict[str, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = {
    "last": lambda later: later[-1:],
    "later": lambda later: later,
    "next": lambda later: later[:1],
}
