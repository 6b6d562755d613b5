"""Learning to Weight Samples (Han et al., 2022): a small network weighs every row's loss at every exit.

It learns from what a step with its weights would do to other rows, each judged at the exit that it would leave at. Here are the
network, its learning and what it can serve; the step that uses it is `step.learned_step`.
Source: LeapLabTHU/L2W-DEN, tools/main_imagenet_DDP.py and main_cifar_DDP.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from eectl.core.errors import EectlError
from eectl.models.losses import Task
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import L2wSection
from eectl.recipe.regimes import Phase

Half = tuple[Tensor, Tensor]  # inputs and targets


class WeightNetwork(nn.Module):
    """A network from losses [row, exit] to numbers in (-1, 1), [row, exit]: one hidden layer, ReLU, tanh."""

    def __init__(self, num_exits: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_exits, hidden)
        self.last = nn.Linear(hidden, num_exits)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the raw weights of these losses."""
        raw: Tensor = self.last(self.first(losses).relu()).tanh()
        return raw


class LearnedWeights:
    """The weight-prediction network, its optimizer, and the weights it gives."""

    def __init__(self, num_exits: int, settings: L2wSection, *, device: torch.device) -> None:
        self.settings = settings
        self.network = WeightNetwork(num_exits, settings.hidden).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)

    def weights(self, losses: Tensor) -> Tensor:
        """Return 1 + ε (w̃ - mean w̃) for losses [row, exit], which get no gradient; the mean is over all of w̃ or each row."""
        raw = self.network(losses.detach())
        mean = raw.mean() if self.settings.centre == "matrix" else raw.mean(dim=1, keepdim=True)
        weights: Tensor = 1 + self.settings.epsilon * (raw - mean)
        return weights

    def learn(
        self,
        model: MultiExitModel,
        optimizer: torch.optim.Optimizer,
        exits: Sequence[int],
        *,
        train: Half,
        meta: Half,
        task: Task,
        label_smoothing: float = 0.0,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Make a meta step: down the gradient of the loss on `meta` after a pseudo-step on `train`, through that step.

        Neither the model nor its optimizer changes, BatchNorm statistics included.
        """
        loss = self.meta_loss(
            model, optimizer, exits, train=train, meta=meta, task=task, label_smoothing=label_smoothing, autocast=autocast
        )
        parameters = list(self.network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def meta_loss(
        self,
        model: MultiExitModel,
        optimizer: torch.optim.Optimizer,
        exits: Sequence[int],
        *,
        train: Half,
        meta: Half,
        task: Task,
        label_smoothing: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Return the sum over exits of the mean loss of the `meta` rows allotted to each, after a pseudo-step on `train`."""
        parameters = dict(model.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # what moves are the copies

        def outputs(moved: Mapping[str, Tensor], inputs: Tensor) -> list[Tensor]:
            with autocast():
                given = functional_call(model, {**parameters, **buffers, **moved}, (inputs, exits))
            return [given[k - 1].logits for k in exits]

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            logits = outputs({}, train[0])
            losses = torch.stack([task.losses(each, train[1], label_smoothing) for each in logits], dim=1)
            trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
            objective = (self.weights(losses) * losses).mean()
            gradients = torch.autograd.grad(objective, list(trained.values()), create_graph=True, allow_unused=True)
            logits = outputs(pseudo_step(optimizer, zip(trained.items(), gradients, strict=True)), meta[0])
        rows = allot(torch.stack([confidence(each) for each in logits]), self.settings.p)
        chosen = [task.loss(each[own], meta[1][own], 0.0) for each, own in zip(logits, rows, strict=True) if len(own)]
        return torch.stack(chosen).sum()


def confidence(logits: Tensor) -> Tensor:
    """Return the largest probability of each row, without a gradient."""
    return F.softmax(logits.detach().float(), dim=1).amax(dim=1)


def exit_quotas(num_exits: int, p: int) -> list[float]:
    """Return the share of the rows that each exit answers for: proportional to (p/20)^k, summing to 1 (MSDNet's budgets)."""
    powers = [(p / 20) ** k for k in range(1, num_exits + 1)]
    return [power / sum(powers) for power in powers]


def allot(confidences: Tensor, p: int) -> list[Tensor]:
    """Return each exit's rows: the most confident of those that no earlier exit took, up to its quota; the last takes the rest.

    `confidences` is [exit, row]. The numbers of rows follow from the shape alone, so no device is waited for.
    """
    num_exits, num_rows = confidences.shape
    counts = [int(num_rows * quota) for quota in exit_quotas(num_exits, p)[:-1]]
    taken = torch.zeros(num_rows, dtype=torch.bool, device=confidences.device)
    rows = []
    for scores, count in zip(confidences, [*counts, num_rows - sum(counts)], strict=True):
        own = scores.masked_fill(taken, -1.0).argsort(descending=True, stable=True)[:count]
        taken = taken.index_fill(0, own, True)
        rows.append(own)
    return rows


def pseudo_step(optimizer: torch.optim.Optimizer, named: Iterable[tuple[tuple[str, Tensor], Tensor | None]]) -> dict[str, Tensor]:
    """Return the parameters by name as `optimizer`'s next step would leave them, differentiable in the gradients.

    SGD's as in the source; AdamW's from the moments it has (as in the paper's authors' code, but on copies of them). Gradient
    clipping is left out, as in the source. A parameter without a gradient stays as it is.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    rule = _adamw if isinstance(optimizer, torch.optim.AdamW) else _sgd
    return {
        name: rule(parameter.detach(), gradient, groups[parameter], optimizer.state.get(parameter, {}))
        for (name, parameter), gradient in named
        if gradient is not None
    }


def _sgd(parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    gradient = gradient + group["weight_decay"] * parameter
    velocity = state.get("momentum_buffer")
    moved: Tensor = parameter - group["lr"] * (gradient if velocity is None else group["momentum"] * velocity + gradient)
    return moved


def _adamw(parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    step = state["step"].to(gradient.dtype) + 1 if state else 1
    first = (1 - beta1) * gradient + (beta1 * state["exp_avg"] if state else 0)
    second = (1 - beta2) * gradient.square() + (beta2 * state["exp_avg_sq"] if state else 0)
    seen = second > 0  # the root has no derivative at 0, where the gradient always was 0
    root = torch.where(seen, torch.where(seen, second, 1.0).sqrt(), 0.0)
    change = first / (1 - beta1**step) / (root / (1 - beta2**step) ** 0.5 + group["eps"])
    moved: Tensor = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change
    return moved


def check_phases(phases: Iterable[Phase], num_exits: int) -> None:
    """Raise EectlError unless each phase trains on the last exit alone, which needs no weights, or on all exits at every step.

    The network's own head may be missing: it is where only attached heads train.
    """
    for phase in phases:
        sets = [exits for exits in phase.losses if exits != {num_exits}]
        if sets and (len(phase.losses) > 1 or not sets[0] >= set(range(1, num_exits))):
            raise EectlError(
                f"loss_weights: l2w weighs all exits at every step, which phase {phase.number} ({phase.title}) does not train; "
                "use regime joint, mixed or disjoint"
            )


def check_run(task: str, *, processes: int, batch_sizes: Iterable[int]) -> None:
    """Raise EectlError for what learned weighting cannot do: regression, several processes, batches without two halves."""
    if task != "classification":
        raise EectlError(f"loss_weights: l2w ranks rows by the confidence of a classifier, and this is {task}; use uniform")
    if processes > 1:
        raise EectlError(f"loss_weights: l2w runs in one process, and there are {processes}; start one, or use uniform")
    if min(batch_sizes) < 2:
        raise EectlError("batch_size: l2w learns on each half of a batch from the other; give at least 2")
