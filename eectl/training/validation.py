"""The losses and scores of every exit on the validation split, which decide on early stopping."""

import torch
from torch import Tensor

from eectl.core.distributed import World, total
from eectl.models.losses import exit_losses, exit_points
from eectl.training.feed import Feed
from eectl.training.phase import PhaseSettings, wide
from eectl.training.running import RunningNetwork


class Validator:
    """Evaluates a network on the validation split, as often as asked. Where the device records work, its passes are recorded."""

    def __init__(self, net: RunningNetwork, settings: PhaseSettings, world: World) -> None:
        self._net, self._settings, self._world, self._takes_reads = net, settings, world, False
        weights, kind = settings.validation_weights, wide(world.device)
        self._weights = None if weights is None else torch.tensor(weights, dtype=kind, device=world.device)
        self._sums = torch.zeros(2 if weights is None else 3, net.model.num_exits, dtype=kind, device=world.device)
        self._add = net.capture.function(self._pass)

    def __call__(self, feed: Feed) -> dict[str, list[float]]:
        """Return every exit's mean loss and score, in eval mode, over all processes.

        Returns:
            {"loss": [exit], "score": [exit]}; and "balanced", the mean of the classes' accuracies, where that is the metric.
        """
        settings = self._settings
        self._net.model.eval()
        self._sums.zero_()
        with torch.no_grad():
            for inputs, targets in feed.validation(batch_size=settings.eval_batch_size, world=self._world):
                inputs = self._net.filled(inputs, most_tokens=settings.most_tokens)
                self._takes_reads = isinstance(inputs, tuple)
                self._add(targets, *(inputs if isinstance(inputs, tuple) else (inputs,)))
        means = total(self._sums).cpu().double() / len(feed.data.validation)
        return dict(zip(("loss", "score", "balanced"), means.tolist(), strict=False))

    def _pass(self, targets: Tensor, *parts: Tensor) -> None:
        """Add a batch's losses and scores, summed over rows, to the sums."""
        with self._net.execution.autocast():
            outputs = self._net.model(tuple(parts) if self._takes_reads else parts[0])
        task, logits = self._settings.objective.task, [output.logits for output in outputs]
        losses = exit_losses(task, logits, targets, 0.0) * len(targets)
        sums = [losses, exit_points(task, logits, targets)]
        if self._weights is not None:
            sums.append(exit_points(task, logits, targets, self._weights[targets]))
        self._sums += torch.stack(sums)
