"""A backbone with exits, its one forward pass, and which of its parts train. Knows no library and no loop."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.backbone import Backbone, Hidden
from eectl.models.ensembles import Ensembles
from eectl.models.equilibrium import rescale
from eectl.models.heads import ExitHead, ExitOutput
from eectl.models.recompute import Recomputed
from eectl.recipe.choices import PLACEMENT_CHOICES, listed

Reads = tuple[Tensor, ...]
"""What exits 1..K read of some rows, [row, …] each: see MultiExitModel.read."""

PLACEMENTS_16 = {  # paper §4.6, for the 16 blocks of a ResNet-50; other depths take the same relative positions
    "dense-sparse": (1, 2, 3, 4, 5, 6, 7, 11),
    "sparse-dense": (1, 4, 8, 9, 10, 11, 12, 13, 14),
}


def place(scheme: str, depth: int) -> tuple[int, ...]:
    """The blocks after which a placement scheme puts exits: `every-N`, `dense-sparse` or `sparse-dense` (paper §4.6).

    `every-N` is {N, 2N, …} below the last block. Raises EectlError for an unknown scheme or one that places no exit.
    """
    if scheme in PLACEMENTS_16:
        scaled = (round(block * (depth - 1) / 15) for block in PLACEMENTS_16[scheme])
        after = tuple(sorted({block for block in scaled if block < depth - 1}))
    elif scheme.startswith("every-") and scheme[6:].isdecimal() and int(scheme[6:]) > 0:
        after = tuple(range(int(scheme[6:]), depth - 1, int(scheme[6:])))
    else:
        raise EectlError(f"unknown placement '{scheme}'; known: {listed(PLACEMENT_CHOICES)}; write every-N as every-2")
    if not after:
        raise EectlError(f"placement {scheme} puts no exit on a network of {depth} blocks; try every-1 or a list of blocks")
    return after


class MultiExitModel(nn.Module):
    """A backbone and exit heads after some of its blocks.

    `after[k-1]` is the block that exit k follows, for the attached exits k = 1..K-1; exit K is the network's own head.
    `combine`, where there is one, turns the own logits (`state`) of heads 1..k into what attached exit k says.
    Raises EectlError for heads that do not go together.
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
        self._recomputed: Recomputed | None = None
        for number, head in enumerate(exits, 1):
            head.join(exits, number)

    @property
    def num_exits(self) -> int:
        """K: the attached exits and the network's own head."""
        return len(self.after) + 1

    @property
    def heads(self) -> tuple[ExitHead, ...]:
        """The attached exits' heads, 1..K-1."""
        return tuple(self.exits)  # type: ignore[arg-type]

    @property
    def auxiliary(self) -> str | None:
        """The auxiliary loss that the attached heads bring, if any."""
        return self.heads[0].auxiliary if self.heads else None

    @property
    def default_weights(self) -> str:
        """What `loss_weights: auto` means for its heads."""
        return self.heads[0].default_weights if self.heads else "uniform"

    def advance(self, hidden: Hidden | Tensor, exit_number: int) -> Hidden:
        """Run segment `exit_number` (1..K) from what the segment before it gave; segment 1 takes the inputs."""
        first = 0 if exit_number == 1 else self.after[exit_number - 2] + 1
        last = self.backbone.depth - 1 if exit_number == self.num_exits else self.after[exit_number - 1]
        if isinstance(hidden, Tensor):
            hidden = self.backbone.stem(hidden)
        run = self._recomputed.block if self._recomputed and torch.is_grad_enabled() else self.backbone.block
        for index in range(first, last + 1):
            hidden = run(index, hidden)
        return hidden

    def leave(self, hidden: Hidden, exit_number: int, earlier: Sequence[ExitOutput | None] = ()) -> ExitOutput:
        """Exit `exit_number`'s output from what its segment gave and the outputs of the exits before it."""
        return self.answer(self.read(hidden, exit_number), exit_number, earlier)

    def read(self, hidden: Hidden, exit_number: int) -> Tensor:
        """What exit `exit_number` takes from its segment, [row, …]: see ExitHead.reads. The network's own head: its logits."""
        if exit_number == self.num_exits:
            return self.backbone.head(hidden)
        return self.heads[exit_number - 1].reads(self.backbone.feature(hidden))

    def answer(self, read: Tensor, exit_number: int, earlier: Sequence[ExitOutput | None] = ()) -> ExitOutput:
        """Exit `exit_number`'s output from what it has `read` and the outputs of the exits before it."""
        if exit_number == self.num_exits:
            return ExitOutput(read)
        output = self.heads[exit_number - 1].says(read, earlier)
        if self.combine is None:
            return output
        own = [each.state for each in (*earlier, output) if each is not None and each.state is not None]
        assert len(own) == exit_number
        return replace(output, logits=self.combine(own))

    def reads(self, inputs: Tensor) -> Reads:
        """What all exits read of these inputs: `forward` takes it in their place, and then no part of the backbone runs."""
        hidden: Hidden | Tensor = inputs
        found = []
        for number in range(1, self.num_exits + 1):
            hidden = self.advance(hidden, number)
            found.append(self.read(hidden, number))
        return tuple(found)

    def forward(
        self, inputs: Tensor | Reads, exits: Collection[int] | None = None, *, equilibrium: bool = False
    ) -> list[ExitOutput | None]:
        """Every exit's output, the network's own head last; logits are [row, class].

        With `exits` (numbers from 1) the others are None, neither they nor blocks past the last of them run. A list and not
        a stacked tensor: a skipped exit's parameters then keep a gradient of None, and AdamW leaves them alone.
        `equilibrium` changes no value, only what a later backward pass gives: see `models.equilibrium`.
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
        """Whether an exit's output is wanted, or read by a wanted later exit (a cascade)."""
        later = (k for k in wanted if number < k < self.num_exits)
        return number in wanted or any(self.heads[k - 1].uses_earlier for k in later)

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether blocks keep their inputs alone and run again in the backward pass: see `models.recompute`."""
        self._recomputed = Recomputed(self.backbone) if wanted else None

    def part(self, name: str) -> tuple[str, int]:
        """Who owns a parameter, buffer or module: ("segment", 1..K), ("head", 1..K-1) or, of all ensembles, ("combine", 1)."""
        owner, _, rest = name.partition(".")
        if owner == "exits":
            return "head", int(rest.split(".")[0]) + 1 if rest else 1
        if owner == "combine":
            return "combine", 1
        block = self.backbone.locate(rest.removeprefix("net.")) if rest else -1
        if block == self.backbone.depth:
            return "segment", self.num_exits
        return "segment", next((k for k, last in enumerate(self.after, 1) if block <= last), self.num_exits)

    def set_trainable(self, segments: Collection[int], heads: Collection[int], *, combine: bool = False) -> None:
        """Exactly these parts require gradients from now on."""
        trains = {"segment": segments, "head": heads, "combine": {1} if combine else ()}
        for name, parameter in self.named_parameters():
            kind, number = self.part(name)
            parameter.requires_grad_(number in trains[kind])
            parameter.grad = None

    def train_parts(self, segments: Collection[int], heads: Collection[int], *, combine: bool = False) -> None:
        """These parts go to train mode, all others to eval mode, so frozen BatchNorm statistics and dropout stay still."""
        trains = {"segment": segments, "head": heads, "combine": {1} if combine else ()}
        for name, module in self.named_modules():
            kind, number = self.part(name)
            module.training = bool(name) and number in trains[kind]
