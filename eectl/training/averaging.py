"""The moving average of a network's weights over the steps of a phase. Which weights are evaluated when is the loop's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eectl.recipe.optimizer_section import EmaSection


class WeightAverage:
    """The average of the parameters that train and of BatchNorm's statistics; other buffers, such as counts, have none.

    It starts from the weights that the network has, and is a function of tensors that stay in their place, so that a device can
    record its update. Make it once the phase's parameters are set to train, and on the network's device.

    Attributes:
        tensors: the averages by the names that the network has for them. While `in_place`, the network's own weights.
    """

    def __init__(self, model: nn.Module, settings: EmaSection) -> None:
        own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                buffers = module.named_buffers(name, recurse=False)
                own |= {key: buffer for key, buffer in buffers if buffer.is_floating_point()}
        self.tensors = {name: tensor.clone() for name, tensor in own.items()}
        self._settings, self._own, self._averages = settings, list(own.values()), list(self.tensors.values())
        self._share = torch.ones((), device=self._own[0].device)  # of the new weights in the average

    def begin_step(self, number: int) -> None:
        """Set how much the weights after step `number` of the phase, from 0, count."""
        self._share.fill_(1 - decay_at(number, self._settings))

    def update(self) -> None:
        """Move the average towards the weights."""
        moves = torch._foreach_sub(self._own, self._averages)
        torch._foreach_mul_(moves, self._share)
        torch._foreach_add_(self._averages, moves)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network have the averages, in the memory of its weights, which it has again afterwards to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, average in zip(self._own, self._averages, strict=True):  # one after the other, to hold no third copy
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up averages of these names, shapes and types."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])


def decay_at(number: int, settings: EmaSection) -> float:
    """Return how much of the average stays at step `number`, from 0, as `ModelEmaV3.get_decay` of timm has it."""
    return min(settings.decay, 1 - (1 + number) ** (-2 / 3)) if settings.warmup else settings.decay
