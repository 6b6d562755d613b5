"""Losses and scores of each task, and the loss terms by which exits learn from each other. Knows no network.

How the exits' losses are weighted is decided in recipe/weighting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eectl.core.errors import lookup
from eectl.models.heads import ExitOutput
from eectl.recipe.choices import TASK_CHOICES, in_order
from eectl.recipe.recipe import SCORE_NAMES


@dataclass(frozen=True)
class Task:
    """One kind of problem: its loss and its score; outputs are logits [row, class] or numbers [row, target].

    An ordinal task has a logit less than levels: that of y > k among the rows with y ≥ k.

    Attributes:
        name: its key in TASKS.
        loss: (outputs, targets, label_smoothing) → the mean over rows.
        points: (outputs, targets) → [row]; their mean is the score.
        higher_is_better: the direction of the score.
        score_name: what tables call the score.
        losses: (outputs, targets, label_smoothing) → [row], `loss` before the mean.
        distil: (student's outputs, teachers' outputs, temperature) → how far the student is from its teachers, mean over rows.
        predicts_number: whether a row's outputs are numbers [target]; else they are logits.
        probabilities: outputs → [row, class], each class's probability; of numbers the outputs as they are.
        predicted: outputs → [row], the class or level that is predicted; of several labels the likeliest, of numbers the first.
    """

    name: str
    loss: Callable[[Tensor, Tensor, float], Tensor]
    points: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    score_name: str
    losses: Callable[[Tensor, Tensor, float], Tensor]
    distil: Callable[[Tensor, Sequence[Tensor], float], Tensor]
    predicts_number: bool
    probabilities: Callable[[Tensor], Tensor]
    predicted: Callable[[Tensor], Tensor]


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.max(dim=1).indices == targets).float()  # the argmax, up to four times as fast on CPUs


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of each row [row], of several targets their mean."""
    if targets.dim() > 1:
        return (outputs.float() - targets.float()).square().mean(dim=1)
    return (outputs.float().squeeze(1) - targets.float()).square()


def _mean_squared_error(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    assert label_smoothing == 0
    return _squared_error(outputs, targets).mean()


def _cross_entropies(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, reduction="none")


def _squared_errors(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    assert label_smoothing == 0
    return _squared_error(outputs, targets)


def _binary_losses(logits: Tensor, targets: Tensor, label_smoothing: float, *, threshold: float | None = None) -> Tensor:
    """Return the mean over classes of the binary cross-entropy of each class against all others [row].

    As timm.loss.BinaryCrossEntropy: targets [row] or [row, class] are smoothed, then those over `threshold` become 1, others 0.
    """
    num_classes = logits.shape[1]
    if targets.dim() == 1:
        targets = targets[:, None] == torch.arange(num_classes, device=targets.device)
    soft = targets.float() * (1 - label_smoothing) + label_smoothing / num_classes
    if threshold is not None:
        soft = (soft > threshold).float()
    return F.binary_cross_entropy_with_logits(logits.float(), soft, reduction="none").mean(dim=1)


def _label_losses(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean over labels of the binary cross-entropy [row], of targets 0 or 1 [row, label]."""
    assert label_smoothing == 0
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)


def _label_f1(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the F1 of each row's labels, those with a probability over 1/2; 1 where there is none and none is predicted."""
    return f1_of_rows(logits > 0, targets)


def f1_of_rows(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return 2·TP / (predicted + true) of each row [row] of labels [row, label]; 1 where there are neither."""
    true = targets > 0
    both, either = (predicted & true).sum(dim=1), predicted.sum(dim=1) + true.sum(dim=1)
    return torch.where(either == 0, 1.0, 2 * both / either.clamp(min=1)).float()


def _level_losses(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return −log P(y) [row], where logit k is that of y > k among the rows with y ≥ k.

    This is the loss of CORN (Shi, Cao & Raschka, 2023), with the sum over the questions that a row is asked, and then the mean
    over rows, where they divide by the number of all questions.
    """
    assert label_smoothing == 0
    questions = torch.arange(logits.shape[1], device=targets.device)
    passes, is_asked = questions < targets[:, None], questions <= targets[:, None]
    losses = F.binary_cross_entropy_with_logits(logits.float(), passes.float(), reduction="none")
    return (losses * is_asked).sum(dim=1)


def sigmoid(logits: Tensor) -> Tensor:
    """Return the sigmoid in float32, the same bits for a row whatever other rows come with it.

    On a CPU torch.sigmoid has other last bits where a tensor's length ends within a vector; a softmax goes row by row.
    """
    own = logits.float()
    return torch.stack([own, torch.zeros_like(own)], dim=-1).softmax(dim=-1)[..., 0]


def _level_survival(logits: Tensor) -> Tensor:
    """Return P(y > k) [row, level − 1], which falls with k: the product of the conditional probabilities up to k."""
    return sigmoid(logits).cumprod(dim=1)


def level_probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each level [row, level] of an ordinal task's logits [row, level − 1]."""
    over = _level_survival(logits)
    ones, zeros = torch.ones_like(over[:, :1]), torch.zeros_like(over[:, :1])
    return torch.cat([ones, over], dim=1) - torch.cat([over, zeros], dim=1)


def predicted_level(logits: Tensor) -> Tensor:
    """Return the median level [row]: how many levels are more likely than not to be passed."""
    return (_level_survival(logits) > 0.5).sum(dim=1)


def _right_level(logits: Tensor, targets: Tensor) -> Tensor:
    return (predicted_level(logits) == targets).float()


def _mean_of(losses: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Return a loss that is the mean over rows of `losses`."""
    return lambda outputs, targets, label_smoothing: losses(outputs, targets, label_smoothing).mean()


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.max(dim=1).indices  # the argmax, up to four times as fast on CPUs


def _first(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


def task_of(name: str, recipe: Mapping[str, Any]) -> Task:
    """Return the task called `name` with the loss that a recipe, as plain data, trains it by; default: the task's own."""
    task = lookup(TASKS, name, what="task")
    if recipe.get("loss", "cross-entropy") != "bce":
        return task
    losses = partial(_binary_losses, threshold=recipe.get("bce_target_threshold"))
    return replace(task, loss=_mean_of(losses), losses=losses)


def exit_losses(task: Task, outputs: Sequence[Tensor], targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean loss over rows of each exit [exit], all of them computed in one call.

    Args:
        task: the kind of problem.
        outputs: each exit's outputs, [row, …].
        targets: [row], or [row, class] of mixed images, or [row, label] or [row, target] where a row has several.
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
    repeats = (len(outputs), *(1 for _ in targets.shape[1:]))
    points = task.points(torch.cat(list(outputs)), targets.repeat(repeats)).view(len(outputs), -1)
    return (points if weights is None else points * weights).sum(dim=1)


def _divergence(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ student) at temperature T (Hinton et al., 2015); several teachers' probabilities are averaged."""
    mean = torch.stack([F.log_softmax(logits.detach().float() / temperature, dim=1) for logits in teachers]).exp().mean(dim=0)
    own = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(own, mean, reduction="batchmean") * temperature**2


def _distance(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:  # noqa: ARG001
    """Return the squared error against the mean of the teachers' outputs; the temperature is not used."""
    return (student.float() - torch.stack([output.detach().float() for output in teachers]).mean(dim=0)).square().mean()


def _binary_divergence(student: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """Return T² · KL of each label's probability at temperature T, mean over labels and rows; teachers' are averaged."""
    mean = torch.stack([(logits.detach().float() / temperature).sigmoid() for logits in teachers]).mean(dim=0)
    cross = F.binary_cross_entropy_with_logits(student.float() / temperature, mean, reduction="none")
    entropy = -torch.xlogy(mean, mean) - torch.xlogy(1 - mean, 1 - mean)
    return (cross - entropy).mean() * temperature**2


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
            "classification", _cross_entropy, _correct, True, SCORE_NAMES["classification"], _cross_entropies, _divergence, False,
            _softmax, _likeliest,
        ),
        "regression": Task(
            "regression", _mean_squared_error, _squared_error, False, SCORE_NAMES["regression"], _squared_errors, _distance, True,
            Tensor.float, _first,
        ),
        "multilabel": Task(
            "multilabel", _mean_of(_label_losses), _label_f1, True, SCORE_NAMES["multilabel"], _label_losses, _binary_divergence,
            False, sigmoid, _likeliest,
        ),
        "ordinal": Task(
            "ordinal", _mean_of(_level_losses), _right_level, True, SCORE_NAMES["ordinal"], _level_losses, _binary_divergence,
            False, level_probabilities, predicted_level,
        ),
    },
)  # fmt: skip
TEACHERS: dict[str, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = {
    "last": lambda later: later[-1:],
    "later": lambda later: later,
    "next": lambda later: later[:1],
}
