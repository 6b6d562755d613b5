"""A network with exits: its forward pass, and which of its parts train. Knows no library and no training loop."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.backbone import Backbone, Hidden
from eectl.models.ensembles import Ensembles
from eectl.models.equilibrium import rescale
from eectl.models.heads import ExitHead, ExitOutput
from eectl.models.recompute import RecomputedBlocks
from eectl.recipe.choices import PLACEMENT_CHOICES, listed, number_in

Reads = tuple[Tensor, ...]
"""The tensors that the exits 1..K read of some rows, one each, [row, …]: see MultiExitModel.reads."""

PLACEMENTS_16 = {  # paper §4.6, for the 16 blocks of a ResNet-50; other depths take the same relative positions
    "dense-sparse": (1, 2, 3, 4, 5, 6, 7, 11),
    "sparse-dense": (1, 4, 8, 9, 10, 11, 12, 13, 14),
}


def blocks_of(placement: str, depth: int) -> tuple[int, ...]:
    """Return the blocks after which a placement puts exits, on a network of `depth` blocks.

    `every-N` is the blocks N, 2N, … before the last one; `dense-sparse` and `sparse-dense` are the paper's (§4.6), scaled to the
    depth. Raises EectlError for an unknown placement, or one that puts no exit on this network.
    """
    if placement in PLACEMENTS_16:
        scaled = (round(block * (depth - 1) / 15) for block in PLACEMENTS_16[placement])
        after = tuple(sorted({block for block in scaled if block < depth - 1}))
    elif (each := number_in(placement, "every-")) is not None:
        after = tuple(range(each, depth - 1, each))
    else:
        raise EectlError(f"unknown placement '{placement}'; known: {listed(PLACEMENT_CHOICES)}; write every-N as every-2")
    if not after:
        raise EectlError(f"placement {placement} puts no exit on a network of {depth} blocks; try every-1 or a list of blocks")
    return after


class MultiExitModel(nn.Module):
    """A backbone with exit heads after some of its blocks.

    Exits are numbered from 1: exits 1..K-1 are attached heads, exit K is the network's own head. They cut the backbone into K
    segments: segment k is what runs between exits k-1 and k. Segment 1 includes the stem, segment K the network's own head.

    Args:
        backbone: the network; it is not copied.
        exits: the heads of exits 1..K-1. Raises EectlError where they do not go together (see ExitHead.join).
        after: the block that each of them follows, in ascending order.
        combine: ensembles that replace attached exit k's logits by a combination of the logits of heads 1..k.
    """

    def __init__(
        self, backbone: Backbone, exits: Sequence[ExitHead] = (), *, after: Sequence[int] = (), combine: Ensembles | None = None
    ) -> None:
        super().__init__()
        assert len(exits) == len(after) and list(after) == sorted(set(after))
        self.backbone = backbone
        self.exits = nn.ModuleList(exits)
        self.after = tuple(after)
        self.combine = combine
        self._recomputed: RecomputedBlocks | None = None
        for number, head in enumerate(exits, 1):
            head.join(exits, number)

    @property
    def num_exits(self) -> int:
        """K: the number of attached heads, and one for the network's own."""
        return len(self.after) + 1

    @property
    def heads(self) -> tuple[ExitHead, ...]:
        """The heads of the attached exits 1..K-1."""
        return tuple(self.exits)  # type: ignore[arg-type]

    @property
    def auxiliary(self) -> str | None:
        """The auxiliary loss of its heads, an entry of losses.AUXILIARY; None where they have none."""
        return self.heads[0].auxiliary if self.heads else None

    @property
    def default_weights(self) -> str:
        """The weighting of the exits' losses that `loss_weights: auto` stands for with its heads."""
        return self.heads[0].default_weights if self.heads else "uniform"

    def advance(self, hidden: Hidden | Tensor, exit_number: int) -> Hidden:
        """Run the blocks of segment `exit_number` (1..K) on the hidden state before it; for segment 1, on the inputs."""
        first = 0 if exit_number == 1 else self.after[exit_number - 2] + 1
        last = self.backbone.depth - 1 if exit_number == self.num_exits else self.after[exit_number - 1]
        if isinstance(hidden, Tensor):
            hidden = self.backbone.stem(hidden)
        run = self._recomputed.block if self._recomputed and torch.is_grad_enabled() else self.backbone.block
        for index in range(first, last + 1):
            hidden = run(index, hidden)
        return hidden

    def leave(self, hidden: Hidden, exit_number: int, earlier: Sequence[ExitOutput | None] = ()) -> ExitOutput:
        """Return an exit's output, from the hidden state after its segment and the outputs of the exits before it."""
        return self.answer(self.read(hidden, exit_number), exit_number, earlier)

    def read(self, hidden: Hidden, exit_number: int) -> Tensor:
        """Return what an exit reads of the hidden state after its segment, [row, …]: see ExitHead.reads.

        The network's own head reads its own logits: it has no part that trains apart from segment K.
        """
        if exit_number == self.num_exits:
            return self.backbone.head(hidden)
        return self.heads[exit_number - 1].reads(self.backbone.feature(hidden))

    def answer(self, read: Tensor, exit_number: int, earlier: Sequence[ExitOutput | None] = ()) -> ExitOutput:
        """Return an exit's output, from what it `read` and the outputs of the exits before it; the last step of `leave`."""
        if exit_number == self.num_exits:
            return ExitOutput(read)
        output = self.heads[exit_number - 1].says(read, earlier)
        if self.combine is None:
            return output
        own = [each.state for each in (*earlier, output) if each is not None and each.state is not None]
        assert len(own) == exit_number
        return replace(output, logits=self.combine(own))

    def reads(self, inputs: Tensor) -> Reads:
        """Return what every exit reads of these inputs.

        `forward` takes it in place of the inputs and then runs no part of the backbone, which a frozen backbone saves.
        """
        hidden: Hidden | Tensor = inputs
        found = []
        for number in range(1, self.num_exits + 1):
            hidden = self.advance(hidden, number)
            found.append(self.read(hidden, number))
        return tuple(found)

    def forward(
        self, inputs: Tensor | Reads, exits: Collection[int] | None = None, *, equilibrium: bool = False
    ) -> list[ExitOutput | None]:
        """Return every exit's output, the network's own head last; logits are [row, class].

        It is a list and not a stacked tensor: a skipped exit's parameters then keep a gradient of None, and AdamW leaves them
        alone.

        Args:
            inputs: rows as `Backbone.stem` takes them, or what `reads` returned for some.
            exits: the numbers (from 1) of those that are wanted; default: all. The others are None in the list, and blocks past
                the last wanted one do not run.
            equilibrium: scale the gradients of the backward pass as `models.equilibrium` does; no value changes.
        """
        wanted = set(range(1, self.num_exits + 1)) if exits is None else set(exits)
        outputs: list[ExitOutput | None] = []
        numbers = range(1, max(wanted) + 1)
        if isinstance(inputs, tuple):
            for number, read in zip(numbers, inputs, strict=False):
                outputs.append(self.answer(read, number, outputs) if self._is_heard(number, wanted) else None)
            return outputs + [None] * (self.num_exits - len(outputs))
        hidden: Hidden | Tensor = inputs
        for number in numbers:
            hidden = self.advance(hidden, number)
            rest = sum(k >= number for k in wanted)
            if equilibrium and number in wanted:
                hidden = rescale(hidden, 1 / rest)
            outputs.append(self.leave(hidden, number, outputs) if self._is_heard(number, wanted) else None)
            if equilibrium and number in wanted and rest > 1:
                hidden = rescale(hidden, rest - 1)
        return outputs + [None] * (self.num_exits - len(outputs))

    def _is_heard(self, number: int, wanted: Collection[int]) -> bool:
        """Return whether an exit's output is wanted, or is read by a later exit that is wanted (a cascade)."""
        later = (k for k in wanted if number < k < self.num_exits)
        return number in wanted or any(self.heads[k - 1].uses_earlier for k in later)

    def checkpoint_activations(self, wanted: bool) -> None:
        """Turn activation checkpointing on or off: see `models.recompute`."""
        self._recomputed = RecomputedBlocks(self.backbone) if wanted else None

    def part(self, name: str) -> tuple[str, int]:
        """Return the part that a parameter, buffer or module belongs to: ("segment", 1..K), ("head", 1..K-1) or ("combine", 1).

        The last is that of all ensembles together.
        """
        owner, _, rest = name.partition(".")
        if owner == "exits":
            return "head", int(rest.split(".")[0]) + 1 if rest else 1
        if owner == "combine":
            return "combine", 1
        block = self.backbone.locate(rest.removeprefix("net.")) if rest else -1
        if block == self.backbone.depth:
            return "segment", self.num_exits
        return "segment", next((k for k, last in enumerate(self.after, 1) if block <= last), self.num_exits)

    def is_kept(self, name: str, freeze_until: int | None) -> bool:
        """Return whether a parameter, buffer or module is of the stem or of a block up to `freeze_until`; with None, none is."""
        owner, _, rest = name.partition(".")
        if freeze_until is None or owner != "backbone":
            return False
        return self.backbone.locate(rest.removeprefix("net.")) <= freeze_until

    def set_trainable(
        self, segments: Collection[int], heads: Collection[int], *, combine: bool = False, freeze_until: int | None = None
    ) -> None:
        """Let exactly these parts require gradients from now on, without the stem and the blocks up to `freeze_until` if given.

        All gradients are forgotten.
        """
        trains = {"segment": segments, "head": heads, "combine": {1} if combine else ()}
        for name, parameter in self.named_parameters():
            kind, number = self.part(name)
            parameter.requires_grad_(number in trains[kind] and not self.is_kept(name, freeze_until))
            parameter.grad = None

    def train_parts(
        self, segments: Collection[int], heads: Collection[int], *, combine: bool = False, freeze_until: int | None = None
    ) -> None:
        """Put these parts in train mode, without the stem and the blocks up to `freeze_until` if given, and all others in eval.

        So BatchNorm statistics of frozen parts do not move, and frozen dropout drops nothing.
        """
        trains = {"segment": segments, "head": heads, "combine": {1} if combine else ()}
        for name, module in self.named_modules():
            kind, number = self.part(name)
            module.training = bool(name) and number in trains[kind] and not self.is_kept(name, freeze_until)
