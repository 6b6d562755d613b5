"""A network as it runs in training: its device, memory layout and precision, and whether its steps are compiled and recorded.

All of it is resolved before the first phase; nothing here knows what is trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from eectl.core.capture import Capture, Recorder, recorder_for
from eectl.core.console import silent
from eectl.core.distributed import share_parameters
from eectl.core.precision import autocast, resolve_precision
from eectl.exits.stages import in_bucket
from eectl.models.backbone import Backbone
from eectl.models.multi_exit import MultiExitModel, Reads
from eectl.recipe.recipe import Recipe
from eectl.recipe.regimes import Phase

R = TypeVar("R")

WORTH_STEPS = 1000  # of a phase on a GPU: at 20 ms each, as small kernels take, they make up for 20 s of compiling
MOST_VERSIONS = 256  # of a compiled step, one for each set of exits and each shape


@dataclass(frozen=True)
class Execution:
    """The device, precision and memory layout in which a network computes.

    `precision` is float32, tf32 or bf16; with `deterministic` only algorithms run that give the same bits each time. `compile` is
    the recipe's wish, and `compiler` the backend of torch.compile. `recomputes` says that blocks run again in the backward pass,
    which takes less memory and more time; `make_recorder` gives what records steps on the device, or None where nothing can.
    """

    device: torch.device
    channels_last: bool
    precision: str
    deterministic: bool = False
    compile: bool | Literal["auto"] = False
    recomputes: bool = False
    make_recorder: Callable[[torch.device], Recorder | None] = recorder_for
    compiler: str = "inductor"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that a forward pass runs in."""
        return autocast(self.precision, self.device)

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Return a batch of inputs in the memory layout that the network has."""
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs

    def accelerated(self, num_steps: int) -> tuple[bool, bool]:
        """Return whether the steps of a phase of so many are compiled, and whether they are recorded.

        On a GPU they are both, where the recipe says so or, by `auto`, the phase is long enough to make up for it. What decides
        is the number of steps and no clock, so that a run and its repetition compute the same.
        """
        records = self.make_recorder(self.device) is not None
        wanted = records and num_steps >= WORTH_STEPS if self.compile == "auto" else self.compile
        return wanted and not self.recomputes, wanted and records


@dataclass(frozen=True)
class RunningNetwork:
    """A network that is ready to train. `capture` keeps what is recorded of its work, `compiles` says how that is compiled."""

    model: MultiExitModel
    execution: Execution
    capture: Capture
    compiles: bool = False

    say: Callable[[str], None] = silent

    def filled(self, inputs: Tensor | Reads, *, most_tokens: int | None) -> Tensor | Reads:
        """Return texts [row, 3, token] padded to one of few lengths where work is recorded for each; all else as it is.

        Args:
            inputs: rows, or what exits read of them.
            most_tokens: what a text may have at most; None: these are no texts.
        """
        if most_tokens is None or isinstance(inputs, tuple) or self.capture.recorder is None:
            return inputs
        return in_bucket(inputs, longest=most_tokens)

    def compiled(self, function: Callable[..., R]) -> Callable[..., R]:
        """Return a function of tensors compiled as a whole, where that is wanted, else as it is.

        Dropout draws what it would draw without. Where compiling fails the function is called as it is, and that is said.
        """
        return _Compiled(function, self.execution.compiler, self.say) if self.compiles else function


class _Compiled:
    """A compiled function, and the function itself from when it cannot be compiled."""

    def __init__(self, function: Callable[..., Any], compiler: str, say: Callable[[str], None]) -> None:
        more: dict[str, Any] = {"options": {"fallback_random": True}} if compiler == "inductor" else {}
        self._function, self._say = function, say
        self._run: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=compiler, **more)

    def __call__(self, *args: Any) -> Any:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        try:
            with config.patch(recompile_limit=MOST_VERSIONS):  # its count is over all phases and all shapes of a process
                return self._run(*args)
        except TorchDynamoException as error:
            self._run = self._function
            reason = " ".join(str(error).split("\n\n")[0].split())
            self._say(f"the step could not be compiled, so it runs as it is, which is slower: {reason}")
            return self._function(*args)


def make_execution(recipe: Recipe, backbone: Backbone, device: torch.device) -> Execution:
    """Resolve a recipe's `precision` and `channels_last` for a network and a device."""
    return Execution(
        device,
        backbone.lies_channels_last(recipe.channels_last),
        resolve_precision(recipe.precision, device),
        deterministic=recipe.deterministic,
        compile=recipe.compile,
        recomputes=recipe.checkpoint_activations,
    )


def start_network(
    model: MultiExitModel,
    phase: Phase,
    execution: Execution,
    *,
    num_steps: int,
    freeze_until: int | None = None,
    plain_because: str | None = None,
    say: Callable[[str], None] = silent,
) -> RunningNetwork:
    """Move the network to its device, in the weights of process 0, and freeze what the phase does not train.

    Args:
        model: the network.
        phase: what trains.
        execution: how it computes.
        num_steps: at most so many steps are made.
        freeze_until: the last of the blocks that no phase trains; None: there are none.
        plain_because: what keeps the steps from being compiled and recorded; it is said where they would be.
        say: is called with what the user should know.
    """
    model.to(execution.device)
    if execution.channels_last:
        model.to(memory_format=torch.channels_last)
    share_parameters(model)
    model.set_trainable(phase.segments, phase.heads, combine=phase.combine, freeze_until=freeze_until)
    model.checkpoint_activations(execution.recomputes)
    compiles, records = execution.accelerated(num_steps)
    if plain_because is not None and (compiles or records):
        say(f"phase {phase.number}: steps are not compiled, since {plain_because}")
        compiles = records = False
    recorder = execution.make_recorder(execution.device) if records else None
    return RunningNetwork(model, execution, Capture(recorder, say=say), compiles, say)
