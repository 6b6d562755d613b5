"""Activation checkpointing: blocks keep no more than their inputs and run again in the backward pass. No value changes.

What a block changes as it runs, it changes once: BatchNorms have copies of their statistics to move when it runs again.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from eectl.models.backbone import Backbone, Hidden


class Recomputed:
    """A backbone's blocks, run so. Where nothing in a block or before it trains, nothing is kept and it does not run again."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._norms: list[list[nn.Module]] = [[] for _ in range(backbone.depth + 2)]  # the head's and, last, the stem's
        for name, module in backbone.net.named_modules():
            if isinstance(module, _BatchNorm):
                self._norms[backbone.locate(name)].append(module)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Block `index` alone. Each time it draws the same numbers for dropout, and is under the same autocast."""

        def run(x: Tensor | tuple[Tensor, ...], mask: Tensor | None) -> Hidden:
            return self._backbone.block(index, Hidden(x, mask))

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _CopiedStatistics(self._norms[index])

        # tensors, and not a Hidden: by them it finds the devices whose generators it has to set back
        result: Hidden = checkpoint(run, hidden.x, hidden.mask, use_reentrant=False, context_fn=contexts)
        return result


class _CopiedStatistics(AbstractContextManager[None]):
    """In it norms move copies of their statistics. It is entered in every backward pass through the block."""

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        self._own = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]

    def __enter__(self) -> None:
        for norm, buffers in self._own:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for norm, buffers in self._own:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
