"""When a row leaves: criteria, thresholds, the offline choice and the same choice exit by exit. The only home of "when".

A criterion turns an exit's logits into a score, higher = readier, from what is known at that exit and not later. Knows no
budget and reads no file: which thresholds to use is the sweep's business, and running a network that stops is the router's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.recipe.choices import CRITERION_CHOICES, CRITERION_FAMILIES, DEFAULT_CRITERION, in_order


@dataclass(frozen=True)
class Criterion:
    """How ready an exit is, row by row.

    `reads` is all that it takes from an exit's logits [row, class]: one number per row [row]. `rule(own, earlier)` makes the
    score [row] in float32 of this exit's numbers and those of all exits before it, first exit first. `task` is the task it is
    made for; `compares` says that it needs `earlier`; with fewer attached exits than `attached` no row could leave at one, or
    all would at the first.
    """

    reads: Callable[[Tensor], Tensor]
    rule: Callable[[Tensor, Sequence[Tensor]], Tensor]
    task: str
    compares: bool
    about: str
    attached: int = 1

    def score(self, logits: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """The scores [row] of an exit's logits [row, class], given those of all exits before it."""
        return self.rule(self.reads(logits), [self.reads(each) for each in earlier])

    def scores(self, logits: Tensor) -> Tensor:
        """The scores [exit, row] of logits [exit, row, class], on their device."""
        numbers = self.reads(logits.flatten(0, 1)).reshape(logits.shape[:2])
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


def _value(outputs: Tensor) -> Tensor:
    return outputs.float()[:, 0]


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
    """Minus the largest of the last `num_changes` changes, −inf before there are so many: over −δ means that so many exits in
    a row changed the value by less than δ, which is PABEE's counter (Zhou et al., 2020, §3.3)."""
    if len(earlier) < num_changes:
        return torch.full_like(own, -torch.inf)
    return -torch.stack([*earlier[len(earlier) - num_changes :], own]).diff(dim=0).abs().amax(dim=0)


def criterion_named(name: str) -> Criterion:
    """The criterion called `name`: an entry of CRITERIA, or `difference-N` for any N; raises EectlError for another name."""
    family, _, count = name.partition("-")
    if family == "difference" and count.isascii() and count.isdecimal() and int(count) > 0:
        about = CRITERION_FAMILIES["difference-N"].replace(" N ", f" {count} ")
        return Criterion(_value, partial(_difference, int(count)), "regression", True, about, attached=int(count) + 1)
    return lookup(CRITERIA, name, what="criterion")


def find_criterion(name: str | None, *, task: str, num_exits: int) -> Criterion:
    """The criterion called `name`, fit for `task` and for a network of `num_exits` exits, its own head included.

    Raises EectlError for an unknown name, another task's criterion, or one that compares exits where one is attached.
    """
    fitting = {known: each for known, each in CRITERIA.items() if each.task == task}
    name = name or DEFAULT_CRITERION[task]
    if name.partition("-")[0] != "difference":
        lookup(CRITERIA if name in CRITERIA else fitting, name, what="criterion")
    criterion = criterion_named(name)
    if criterion.task != task:
        raise EectlError(
            f"criterion {name} is for {criterion.task}, this network does {task}; for that there is: {', '.join(fitting)}"
        )
    if 1 < num_exits <= criterion.attached:
        needed, there = ("one" if n == 1 else "two" if n == 2 else str(n) for n in (criterion.attached, num_exits - 1))
        instead = ", or use max-softmax" if task == "classification" else ", or use difference" * (num_exits > 2)
        raise EectlError(
            f"criterion {name} compares exits and needs {needed} attached ones, this network has {there}; "
            f"attach more with eectl attach-heads{instead}"
        )
    return criterion


CRITERIA: dict[str, Criterion] = in_order(
    CRITERION_CHOICES,
    {
        "max-softmax": Criterion(_max_softmax, _alone, "classification", False, CRITERION_CHOICES["max-softmax"]),
        "entropy": Criterion(_entropy, _alone, "classification", False, CRITERION_CHOICES["entropy"]),
        "margin": Criterion(_margin, _alone, "classification", False, CRITERION_CHOICES["margin"]),
        "patience": Criterion(_prediction, _patience, "classification", True, CRITERION_CHOICES["patience"], 2),
        "difference": Criterion(_value, partial(_difference, 1), "regression", True, CRITERION_CHOICES["difference"], 2),
    },
)
