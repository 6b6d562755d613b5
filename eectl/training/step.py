"""One training step: the plain one, which a GPU records and replays, and that of learned weighting. Nothing waits for the device.

Which batches come and what happens between steps is `loop`'s. The mean losses of the exits that took part go into the epoch's
sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eectl.core.distributed import World, total
from eectl.core.distributed import average as average_over_processes
from eectl.core.seeds import derive_seed
from eectl.models.losses import distil, exit_losses, total_weight, weighted_exit_losses, with_auxiliary
from eectl.models.multi_exit import Reads
from eectl.training.averaging import WeightAverage
from eectl.training.gradient_dominance import Tracker
from eectl.training.l2w import LearnedWeights
from eectl.training.objective import LossSet
from eectl.training.optim import set_rate
from eectl.training.phase import EpochSums, PhaseProgress, PhaseSettings
from eectl.training.running import RunningNetwork

Gradients = Sequence[tuple[nn.Parameter, Tensor]]


class Stepper:
    """Takes the steps of a phase: plain ones, or those of learned weighting where the phase has it."""

    def __init__(
        self, net: RunningNetwork, settings: PhaseSettings, progress: PhaseProgress, sums: EpochSums, world: World
    ) -> None:
        self._net, self._settings, self._progress, self._sums, self._world = net, settings, progress, sums, world
        self._plain: dict[tuple[int, ...], PlainStep] = {}

    def __call__(self, wanted: LossSet, inputs: Tensor | Reads, targets: Tensor) -> None:
        """Seed the step that is next, set its learning rate, and take it.

        Args:
            wanted: the exits that take part, and their weights.
            inputs: images [row, channel, height, width], texts [row, 3, token], or what exits 1..K read of the rows.
            targets: [row], or [row, class] of mixed images.
        """
        settings, progress, sums = self._settings, self._progress, self._sums
        number = progress.step
        torch.manual_seed(derive_seed(settings.seed, "network", settings.phase.number, number, self._world.rank))
        rate = settings.learning_rate(number)
        set_rate(progress.optimizer, rate)
        sums.begin_step(number)
        if progress.average is not None:
            progress.average.begin_step(number)
        if progress.learned is None:
            tracker = sums.tracker if sums.tracker and sums.tracker.due(number, wanted.exits) else None
            self._plain_step(wanted)(wanted, inputs, targets, tracker=tracker)
            return
        assert isinstance(inputs, Tensor)  # no features are kept under learned weighting
        learned = progress.learned
        set_rate(learned.optimizer, learned.settings.lr * rate / settings.optimizer.lr)  # follows the schedule, as in the source
        learns = number % learned.settings.interval == 0
        learned_step(self._net, settings, progress.optimizer, sums, wanted, inputs, targets, learned=learned, learns=learns)
        if progress.average is not None:
            progress.average.update()

    def _plain_step(self, wanted: LossSet) -> "PlainStep":
        key = tuple(wanted.exits)
        if key not in self._plain:
            self._plain[key] = PlainStep(
                self._net,
                self._settings,
                self._progress.optimizer,
                self._sums,
                wanted,
                average=self._progress.average,
                num_processes=self._world.size,
            )
        return self._plain[key]


class PlainStep:
    """A step down the gradient of one set of exits' weighted loss, and of what else the objective has.

    It is a function of tensors: inputs, targets, and what stays in its place (parameters and their average, weights, the learning
    rate, the step's number, the sums), so that a device can record it. With several processes forward and backward pass are
    recorded; then the gradients are averaged in one message, and the fused optimizer is called as it is.
    """

    def __init__(
        self,
        net: RunningNetwork,
        settings: PhaseSettings,
        optimizer: torch.optim.Optimizer,
        sums: EpochSums,
        wanted: LossSet,
        *,
        average: WeightAverage | None,
        num_processes: int,
    ) -> None:
        self._net, self._settings, self._optimizer, self._sums, self._average = net, settings, optimizer, sums, average
        self._exits, self._index, self._weights = wanted.exits, wanted.index, wanted.weights.clone()
        self._taken, self._num_processes, self._takes_reads = wanted, num_processes, False
        by_class, device = settings.objective.class_weights, self._weights.device
        self._class_weights = None if by_class is None else torch.tensor(by_class, dtype=torch.float32, device=device)
        self._total = torch.ones((), device=device)  # what the weighted losses of this process's rows are divided by
        self._compiled = net.compiled(self._losses)
        self._whole = net.capture.function(self._descend_whole, undo=optimizer.zero_grad)
        self._gradients_alone = net.capture.function(self._gradients, undo=optimizer.zero_grad)

    def __call__(self, wanted: LossSet, inputs: Tensor | Reads, targets: Tensor, *, tracker: Tracker | None = None) -> None:
        """Make one step; a `tracker` measures the exits' gradients on the way, and changes no weight."""
        if wanted is not self._taken:  # an epoch's weights
            self._weights.copy_(wanted.weights)
            self._taken = wanted
        if self._class_weights is not None:
            self._total.copy_(self._divisor(targets, self._class_weights))
        inputs = self._net.filled(inputs, most_tokens=self._settings.most_tokens)
        self._takes_reads = isinstance(inputs, tuple)  # so it is in all steps of a phase
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        if tracker is not None:
            self._descend(self._gradients(targets, *parts, tracker=tracker))
        elif self._num_processes == 1:
            self._whole(targets, *parts)
        else:
            self._descend(self._gradients_alone(targets, *parts))

    def _divisor(self, targets: Tensor, class_weights: Tensor) -> Tensor:
        """Return what makes weighted losses a mean over all processes' rows once `_gradients` has scaled them by the rows here.

        It takes a message of its own, since each process must know what the rows of all count.
        """
        here = total_weight(targets, class_weights)
        return here if self._num_processes == 1 else total(here) * (len(targets) / self._settings.rows_per_step)

    def _descend_whole(self, targets: Tensor, *parts: Tensor) -> None:
        self._descend(self._gradients(targets, *parts))

    def _gradients(self, targets: Tensor, *parts: Tensor, tracker: Tracker | None = None) -> Gradients:
        """Return this process's gradients of a batch, of the parameters that have one, and add the losses to the sums.

        The loss is the mean over the rows of all processes, whose shares may differ by one, as may those of the pieces in which
        the rows here pass.
        """
        pieces = zip(*(torch.tensor_split(each, self._num_pieces(targets)) for each in (targets, *parts)), strict=True)
        for piece_targets, *piece in pieces:
            rows, here = len(piece_targets), self._total
            if self._class_weights is not None and rows < len(targets):
                here = here * (rows / len(targets))  # what all rows count, on this piece's part
            value, losses = (
                self._compiled(piece_targets, piece, here)
                if tracker is None
                else self._losses(piece_targets, piece, here, tracker)
            )
            scale = rows * self._num_processes / self._settings.rows_per_step
            (value if scale == 1 else value * scale).backward()  # type: ignore[no-untyped-call]
            self._sums.add(self._index, losses, rows)
        parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def _num_pieces(self, targets: Tensor) -> int:
        return min(self._settings.accumulate, len(targets))

    def _losses(
        self, targets: Tensor, parts: Sequence[Tensor], divisor: Tensor, tracker: Tracker | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the value to descend and the exits' losses [exit], which have no gradient; weighted ones are over `divisor`."""
        net, objective, exits = self._net, self._settings.objective, self._exits
        inputs = tuple(parts) if self._takes_reads else parts[0]
        with net.execution.autocast():
            outputs = net.model(inputs, exits, equilibrium=objective.equilibrium)
        logits = [outputs[k - 1].logits for k in exits]
        if tracker is None:
            losses = self._exit_losses(logits, targets, divisor)
        else:  # each with a graph of its own, for a backward pass of its own
            apart = [self._exit_losses([each], targets, divisor)[0] for each in logits]
            tracker.measure(apart, self._weights, exits, self._index)
            losses = torch.stack(apart)
        value = with_auxiliary(net.model.auxiliary, (losses * self._weights).sum(), outputs)
        lesson = objective.lesson
        if lesson is not None:
            distance = distil(logits, teacher=lesson.teacher, temperature=lesson.temperature, task=objective.task)
            value = value + lesson.weight * distance
        return value, losses.detach()

    def _exit_losses(self, logits: Sequence[Tensor], targets: Tensor, divisor: Tensor) -> Tensor:
        """Return the mean loss of each exit [exit], in which rows count alike or by their class."""
        objective = self._settings.objective
        if self._class_weights is None:
            return exit_losses(objective.task, logits, targets, objective.label_smoothing)
        return weighted_exit_losses(logits, targets, objective.label_smoothing, class_weights=self._class_weights, total=divisor)

    def _descend(self, gradients: Gradients) -> None:
        """Make one step of the optimizer down these gradients, averaged over all processes."""
        average_over_processes([gradient for _, gradient in gradients])
        for parameter, gradient in gradients:
            parameter.grad = gradient  # a replay writes to it, and the parameter has forgotten it
        _step_down(self._optimizer, self._settings.optimizer.clip_norm)
        if self._average is not None:
            self._average.update()


def learned_step(
    net: RunningNetwork,
    settings: PhaseSettings,
    optimizer: torch.optim.Optimizer,
    sums: EpochSums,
    wanted: LossSet,
    inputs: Tensor,
    targets: Tensor,
    *,
    learned: LearnedWeights,
    learns: bool,
) -> None:
    """Make two steps, each on one half of the batch with weights learned on the other, as in L2W's source.

    The loss is the mean over rows and exits of weight · loss (the source's is K times that: the sum over exits).

    Args:
        learns: whether the weights learn in this step, for both halves; else they are used as they are.
    """
    objective, exits = settings.objective, wanted.exits
    first, second = zip(inputs.chunk(2), targets.chunk(2), strict=True)
    for own, other in ((first, second), (second, first)):
        if learns:
            learned.learn(
                net.model,
                optimizer,
                exits,
                train=own,
                meta=other,
                task=objective.task,
                label_smoothing=objective.label_smoothing,
                autocast=net.execution.autocast,
            )
        with net.execution.autocast():
            outputs = net.model(own[0], exits)
        each = [objective.task.losses(outputs[k - 1].logits, own[1], objective.label_smoothing) for k in exits]
        losses = torch.stack(each, dim=1)
        with torch.no_grad():
            weights = learned.weights(losses)
        with_auxiliary(net.model.auxiliary, (weights * losses).mean(), outputs).backward()  # type: ignore[no-untyped-call]
        sums.add(wanted.index, losses.detach().mean(dim=0), len(own[0]))
        _step_down(optimizer, settings.optimizer.clip_norm)


def _step_down(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
    """Make one step of the optimizer down the gradients that the parameters have, and forget these."""
    if clip_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_([parameter for parameter in parameters if parameter.grad is not None], clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
