"""How a loaded network answers batches: as it is at first, and in the fastest way for their size once that is worth finding out.

All ways give the same answers, up to rounding. Inputs are prepared and answers are put into words elsewhere.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from eectl.core.capture import Capture, recorder_for
from eectl.core.console import silent
from eectl.exits.fastest import choose_layout, choose_mode, is_static, lay_inputs, lay_weights
from eectl.exits.full_pass import FullPass, PlainPass
from eectl.exits.policy import Policy
from eectl.exits.router import Answerer, Router
from eectl.exits.times import FULL
from eectl.models.multi_exit import MultiExitModel

WARM_UP = 0.3  # seconds that batches of a size take before their fastest way is looked for, and about each look at least
FEW_ROWS = 16  # that the ways are tried on, in batches of the size
TRIES = 16  # about how often: as many rows are answered first, so that looking never takes longer than what was done

Routed = tuple[Tensor, Tensor | None]
"""Each row's logits [row, class] and the exit [row] at which it left, from 0; None: the plain network answered all."""


@dataclass(frozen=True)
class _Way:
    run: Callable[[Tensor], Routed]
    is_full: bool
    channels_last: bool


class Routes:
    """A network with its policy, or without one; it must be in eval mode and stay there. Call it under torch.inference_mode().

    Attributes:
        full_sizes: the batch sizes at which all exits run and one is chosen, as that is faster than early exit.

    Args:
        channels_last: whether the network and its inputs lie so.
        say: is called with the line that says that a GPU could not record.
    """

    def __init__(
        self,
        network: MultiExitModel,
        policy: Policy | None,
        *,
        channels_last: bool,
        say: Callable[[str], None] = silent,
    ) -> None:
        self.full_sizes: tuple[int, ...] = ()
        self._network, self._policy = network, policy
        self._can_lie, self._lies = channels_last, channels_last
        self._spent: dict[int, float] = defaultdict(float)
        self._answered: dict[int, int] = defaultdict(int)  # batches
        self._seen: dict[int, list[Tensor]] = defaultdict(list)
        self._ways: dict[int, _Way] = {}
        device = next(network.parameters()).device
        self._capture = Capture(recorder_for(device), plain_calls=1, say=say)
        plain = PlainPass(network.backbone, capture=self._capture)
        self._plain: Callable[[Tensor], Routed] = lambda batch: (plain(batch), None)
        self._first = self._plain if policy is None else self._before_learning(policy)

    def _before_learning(self, policy: Policy) -> Answerer:
        """Return what sets up nothing: on a GPU, where early exit means to record programs, the full pass."""
        if is_static(self._network):
            return FullPass(self._network, policy, capture=Capture(None))
        return Router(self._network, policy)

    def __call__(self, batch: Tensor) -> Routed:
        """Answer a batch of inputs as the network takes them."""
        size = len(batch)
        if size not in self._ways:
            if self._spent[size] < WARM_UP or self._answered[size] < TRIES * len(self._seen[size]):
                return self._run_first(batch)
            self._ways[size] = self._learn(size, self._seen.pop(size))
        way = self._ways[size]
        if way.channels_last != self._lies:
            lay_weights(self._network, channels_last=way.channels_last)
            self._lies = way.channels_last
        return way.run(self._laid(batch))

    def _run_first(self, batch: Tensor) -> Routed:
        size = len(batch)
        seen = self._seen[size]
        seen.append(batch)
        if len(seen) > max(FEW_ROWS // size, 1):
            seen.pop(0)
        started = time.perf_counter()
        found = self._first(self._laid(batch))
        self._spent[size] += time.perf_counter() - started
        self._answered[size] += 1
        return found

    def _learn(self, size: int, batches: list[Tensor]) -> _Way:
        if self._can_lie:
            self._lies = choose_layout(self._network, batches, seconds=WARM_UP)
        if self._policy is None:
            return _Way(self._plain, False, self._lies)
        laid = [self._laid(batch) for batch in batches]
        mode, answerer = choose_mode(self._network, self._policy, laid, seconds=WARM_UP, capture=self._capture)
        if mode == FULL:
            self.full_sizes = tuple(sorted({*self.full_sizes, size}))
        return _Way(answerer, mode == FULL, self._lies)

    def _laid(self, batch: Tensor) -> Tensor:
        return lay_inputs(batch, channels_last=self._lies) if self._can_lie else batch
