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
        self._sums = torch.zeros(2, net.model.num_exits, dtype=wide(world.device), device=world.device)
        self._add = net.capture.function(self._pass)

    def __call__(self, feed: Feed) -> dict[str, list[float]]:
        """Return every exit's mean loss and score, in eval mode, over all processes.

        Returns:
            {"loss": [exit], "score": [exit]}.
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
        return {"loss": means[0].tolist(), "score": means[1].tolist()}

    def _pass(self, targets: Tensor, *parts: Tensor) -> None:
        """Add a batch's losses and scores, summed over rows, to the sums."""
        with self._net.execution.autocast():
            outputs = self._net.model(tuple(parts) if self._takes_reads else parts[0])
        task, logits = self._settings.objective.task, [output.logits for output in outputs]
        losses = exit_losses(task, logits, targets, 0.0) * len(targets)
        self._sums += torch.stack([losses, exit_points(task, logits, targets)])
