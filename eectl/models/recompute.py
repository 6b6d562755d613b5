"""Activation checkpointing: blocks keep only their inputs for the backward pass, and run again there. It saves memory.

No value changes. BatchNorm's statistics move when a block runs first; when it runs again, copies of them move and are dropped.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from eectl.models.backbone import Backbone, Hidden


class RecomputedBlocks:
    """Runs a backbone's blocks with activation checkpointing.

    Where neither a block nor anything before it trains, nothing is kept and the block does not run again. What a block draws is
    found when it runs first: the generators of one that draws nothing are left alone from then on, as they must be in a CUDA
    graph.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._draws = [True] * backbone.depth
        self._unseen = set(range(backbone.depth))
        self._norms: list[list[nn.Module]] = [[] for _ in range(backbone.depth + 2)]  # the head's and, last, the stem's
        for name, module in backbone.net.named_modules():
            if isinstance(module, _BatchNorm):
                self._norms[backbone.locate(name)].append(module)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Run block `index`. When it runs again, dropout draws the same numbers and autocast is as it was."""

        def run(x: Tensor | tuple[Tensor, ...], mask: Tensor | None) -> Hidden:
            return self._backbone.block(index, replace(hidden, x=x, mask=mask))

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _CopiedStatistics(self._norms[index])

        device = (hidden.x if isinstance(hidden.x, Tensor) else hidden.x[0]).device
        before = _generators(device) if index in self._unseen else None
        # tensors, and not a Hidden: by them it finds the devices whose generators it has to set back
        result: Hidden = checkpoint(
            run,
            hidden.x,
            hidden.mask,
            use_reentrant=False,
            context_fn=contexts,
            preserve_rng_state=self._draws[index],
        )
        if before is not None:
            self._unseen.remove(index)
            self._draws[index] = before != _generators(device)
        return result


def _generators(device: torch.device) -> tuple[bytes, int]:
    """Return where the generators of the CPU and of `device` stand."""
    offset = torch.cuda.default_generators[device.index or 0].get_offset() if device.type == "cuda" else 0
    return bytes(torch.get_rng_state().tolist()), offset


class _CopiedStatistics(AbstractContextManager[None]):
    """A context in which norms move copies of their statistics; it is entered when a block runs again."""

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
