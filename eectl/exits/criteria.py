"""When an exit is ready: the criteria, each a rule that turns logits into a score, higher = readier.

A score at an exit uses what is known there and at the exits before it, never a later one. Thresholds are not chosen here
(see sweep, per_exit), and no network is run (see router).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.models.losses import TASKS, Task, level_probabilities, predicted_level, sigmoid
from eectl.recipe.choices import CRITERION_CHOICES, CRITERION_FAMILIES, DEFAULT_CRITERION, in_order, number_in


@dataclass(frozen=True)
class Criterion:
    """A measure of how ready an exit is, row by row, and what a reader of its thresholds should see.

    `name` is what the user calls it. `reads` is all that it takes from an exit's logits [row, class]: one number per row [row],
    or of several targets [row, target].
    `rule(own, earlier)` makes the score [row] in float32 of this exit's numbers and those of all exits before it, first exit
    first. `task` is the task that it is made for; `compares` says that it needs `earlier`. It takes at least `attached` attached
    exits: with fewer, no row could leave at one, or all would at the first. `paper_grid(num_exits)` gives the thresholds of the
    paper's protocol, None where the paper has none. `symbol` heads a column of thresholds, which are shown times `sign`.
    """

    name: str
    reads: Callable[[Tensor], Tensor]
    rule: Callable[[Tensor, Sequence[Tensor]], Tensor]
    task: Task
    compares: bool
    about: str
    attached: int = 1
    paper_grid: Callable[[int], Tensor] | None = None
    symbol: str = "threshold"
    sign: int = 1

    def score(self, logits: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """Return the scores [row] of an exit's logits [row, class], given those of all exits before it."""
        return self.rule(self.reads(logits), [self.reads(each) for each in earlier])

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores [exit, row] of logits [exit, row, class], on their device."""
        numbers = self.reads(logits.flatten(0, 1))
        numbers = numbers.reshape(*logits.shape[:2], *numbers.shape[1:])
        return torch.stack([self.rule(own, list(numbers[:index])) for index, own in enumerate(numbers)])


def _max_softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1).amax(dim=1)


def _entropy(logits: Tensor) -> Tensor:
    log_probability = logits.float().log_softmax(dim=1)
    entropy = -log_probability.exp().mul_(log_probability).nan_to_num_(nan=0.0).sum(dim=1)  # 0 · −inf is 0 here
    entropy = torch.where(logits.amax(dim=1).isnan(), torch.nan, entropy)
    return 1 - entropy / math.log(logits.shape[1])


def _margin(logits: Tensor) -> Tensor:
    best = logits.float().softmax(dim=1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _prediction(logits: Tensor) -> Tensor:
    return logits.max(dim=1).indices  # the argmax, up to four times as fast on CPUs


def _mean_confidence(logits: Tensor) -> Tensor:
    return sigmoid(logits.abs()).mean(dim=1)  # the larger of p and 1 − p


def _level_confidence(logits: Tensor) -> Tensor:
    return level_probabilities(logits).gather(1, predicted_level(logits)[:, None])[:, 0]


def _value(outputs: Tensor) -> Tensor:
    return outputs.float()[:, 0] if outputs.shape[1] == 1 else outputs.float()


def _alone(own: Tensor, earlier: Sequence[Tensor]) -> Tensor:  # noqa: ARG001
    return own


def _patience(own: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    agrees = torch.ones_like(own, dtype=torch.bool)
    run = torch.ones(len(own), dtype=torch.float32, device=own.device)
    for past in reversed(earlier):
        agrees = agrees & (past == own)
        run = run + agrees
    return run


def _difference(num_changes: int, own: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Return minus the largest of the last `num_changes` changes, −inf before there are so many.

    A score over −δ means that so many exits in a row changed the value by less than δ: PABEE's counter (Zhou et al., 2020, §3.3).
    Of several targets [row, target] none may change by more.
    """
    if len(earlier) < num_changes:
        return own.new_full(own.shape[:1], -torch.inf)
    largest = torch.stack([*earlier[len(earlier) - num_changes :], own]).diff(dim=0).abs().amax(dim=0)
    return -(largest if largest.dim() == 1 else largest.amax(dim=1))


def _hundredths(num_exits: int) -> Tensor:  # noqa: ARG001
    return torch.linspace(0, 1, 100)


def _exits_in_a_row(num_exits: int) -> Tensor:
    return torch.arange(float(num_exits))


@cache
def criterion_named(name: str) -> Criterion:
    """Return the criterion called `name`: an entry of CRITERIA, or `difference-N` for any N. One name is always one object.

    Raises:
        EectlError: there is no such criterion.
    """
    count = number_in(name, "difference-")
    if count is not None:
        about = CRITERION_FAMILIES["difference-N"].replace(" N ", f" {count} ")
        return _of_changes(name, count, about)
    return lookup(CRITERIA, name, what="criterion")


def find_criterion(name: str | None, *, task: Task, num_exits: int) -> Criterion:
    """Return the criterion called `name`, checked against the network it is for.

    Args:
        name: What the user wrote; default: the task's.
        task: What the network does.
        num_exits: How many exits it has, its own head included.

    Raises:
        EectlError: the name is unknown, the criterion is for another task, or it compares more exits than are attached.
    """
    fitting = {known: each for known, each in CRITERIA.items() if each.task is task}
    name = name or DEFAULT_CRITERION[task.name]
    if name.partition("-")[0] != "difference":
        lookup(CRITERIA if name in CRITERIA else fitting, name, what="criterion")
    criterion = criterion_named(name)
    if criterion.task is not task:
        raise EectlError(
            f"criterion {name} is for {criterion.task.name}, this network does {task.name}; for that there is: "
            f"{', '.join(fitting)}"
        )
    if 1 < num_exits <= criterion.attached:
        needed, there = ("one" if n == 1 else "two" if n == 2 else str(n) for n in (criterion.attached, num_exits - 1))
        default = DEFAULT_CRITERION[task.name]
        instead = f", or use {default}" * (CRITERIA[default].attached < num_exits)
        raise EectlError(
            f"criterion {name} compares exits and needs {needed} attached ones, this network has {there}; "
            f"attach more with eectl attach-heads{instead}"
        )
    return criterion


def _of_probabilities(name: str, reads: Callable[[Tensor], Tensor]) -> Criterion:
    """Return a criterion of an exit's own probabilities, from 0 to 1."""
    about = CRITERION_CHOICES[name]
    return Criterion(name, reads, _alone, TASKS["classification"], False, about, paper_grid=_hundredths)


def _of_changes(name: str, num_changes: int, about: str) -> Criterion:
    """Return the criterion that the last `num_changes` changes are below δ: the score is minus a change, the threshold −δ."""
    rule = partial(_difference, num_changes)
    return Criterion(name, _value, rule, TASKS["regression"], True, about, attached=num_changes + 1, symbol="δ", sign=-1)


def _of_labels(name: str, reads: Callable[[Tensor], Tensor], task: str) -> Criterion:
    """Return a criterion of an exit's own outputs for a task that the paper does not have."""
    return Criterion(name, reads, _alone, TASKS[task], False, CRITERION_CHOICES[name])


CRITERIA: dict[str, Criterion] = in_order(
    CRITERION_CHOICES,
    {
        "max-softmax": _of_probabilities("max-softmax", _max_softmax),
        "entropy": _of_probabilities("entropy", _entropy),
        "margin": _of_probabilities("margin", _margin),
        "patience": Criterion(
            "patience", _prediction, _patience, TASKS["classification"], True, CRITERION_CHOICES["patience"], attached=2,
            paper_grid=_exits_in_a_row,
        ),
        "difference": _of_changes("difference", 1, CRITERION_CHOICES["difference"]),
        "mean-confidence": _of_labels("mean-confidence", _mean_confidence, "multilabel"),
        "level-confidence": _of_labels("level-confidence", _level_confidence, "ordinal"),
    },
)  # fmt: skip
