"""Record what a function launches on a GPU, once, and replay it from then on: one launch by the host instead of hundreds.

On a CPU nothing is recorded and functions are just called, so whatever is built on this runs and is tested there. What may be
recorded: work on tensors whose shapes the host knows and whose values it does not read. Python runs when a function is recorded
and not when it is replayed; what changes from call to call must lie in tensors.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from eectl.core.console import silent

T = TypeVar("T")


class Recorder(Protocol):
    """Records functions on a device. `num_bytes` is the memory that its recordings keep."""

    num_bytes: int

    def rehearse(self, function: Callable[[], T]) -> T:
        """Call a function where it will be recorded, so that all that is set up only once is set up."""

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Return what replays the work of a function, which is not done yet, and the function's result.

        Tensors in the result get their values from each replay, in the same memory.
        """


class CudaGraphs:
    """Records CUDA graphs, which share one pool of memory: they must be replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, function: Callable[[], T]) -> T:
        """Call a function on the stream of the recordings."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Return what replays a function's graph, and the function's result."""
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(self._device)
        # thread_local: threads that read images ahead may allocate meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        self.num_bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return graph.replay, result


class Capture:
    """The recordings of one piece of work, such as a training phase.

    Without a recorder every function is just called. A recording that fails is said once, and from then on the functions that
    are not recorded yet are called as well: slower, with the same results.

    Args:
        recorder: the device's, or None: nothing is recorded.
        plain_calls: how often each function really runs before it is recorded, so that optimizers have their state and libraries
            have chosen their kernels.
        say: is called with the line that says that recording failed.
    """

    def __init__(self, recorder: Recorder | None, *, plain_calls: int = 3, say: Callable[[str], None] = silent) -> None:
        self.recorder = recorder
        self.plain_calls = plain_calls
        self.say = say
        self._programs: list[Program[Any]] = []

    def program(self, function: Callable[[], T], *, undo: Callable[[], None] | None = None) -> "Program[T]":
        """Return a function without arguments, which works on tensors that stay where they are, as a program.

        `undo` is called where recording failed midway: it sets right what Python has done by then. No tensor has changed.
        """
        program = Program(function, self, undo)
        self._programs.append(program)
        return program

    def function(
        self, function: Callable[..., T], *, most: int = 16, undo: Callable[[], None] | None = None
    ) -> "CapturedFunction[T]":
        """Return a function of tensors that is recorded once for each set of their shapes; the last `most` are kept.

        `undo` as for `program`.
        """
        return CapturedFunction(function, self, most=most, undo=undo)

    def forget(self, program: "Program[Any]") -> None:
        """Drop a program's recording and its memory."""
        program.drop()
        self._programs.remove(program)

    def close(self) -> None:
        """Drop all recordings: they must not outlive the process group, nor what they work on."""
        for program in self._programs:
            program.drop()
        self._programs.clear()

    def fail(self, error: Exception) -> None:
        """Record nothing any more, and say why."""
        self.recorder = None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self.say(f"no CUDA graph could be recorded, so every operation is launched on its own, which is slower: {reason}")


class Program(Generic[T]):
    """A function without arguments that is called plainly at first, then recorded, and replayed from then on.

    Its result is valid until the next call.
    """

    def __init__(self, function: Callable[[], T], capture: Capture, undo: Callable[[], None] | None) -> None:
        self._function = function
        self._capture = capture
        self._undo = undo
        self._calls = 0
        self._recorded: tuple[Callable[[], object], T] | None = None

    def __call__(self) -> T:
        if self._recorded is None:
            recorder = self._capture.recorder
            if recorder is None:
                return self._function()
            self._calls += 1
            if self._calls <= self._capture.plain_calls:
                return recorder.rehearse(self._function)
            try:
                self._recorded = recorder.record(self._function)
            except torch.OutOfMemoryError as error:
                error.add_note(f"CUDA graphs hold {recorder.num_bytes / 1e9:.2f} GB")
                raise
            except RuntimeError as error:
                self._capture.fail(error)
                if self._undo is not None:
                    self._undo()
                return self._function()
        replay, result = self._recorded
        replay()
        return result

    def drop(self) -> None:
        """Forget the recording."""
        self._recorded = None


class CapturedFunction(Generic[T]):
    """A function of tensors whose work is recorded for each set of their shapes, layouts and types.

    Inputs are copied to memory that stays; the function must not keep them. A result is valid until the next call.
    """

    def __init__(
        self, function: Callable[..., T], capture: Capture, *, most: int, undo: Callable[[], None] | None = None
    ) -> None:
        self._function = function
        self._capture = capture
        self._undo = undo
        self._most = most
        self._kept: OrderedDict[object, tuple[tuple[Tensor, ...], Program[T]]] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> T:
        if self._capture.recorder is None and not self._kept:
            return self._function(*inputs)
        key = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
        if key not in self._kept:
            own = tuple(torch.empty_like(each) for each in inputs)
            self._kept[key] = own, self._capture.program(lambda: self._function(*own), undo=self._undo)
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._capture.forget(oldest)
        own, program = self._kept[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        return program()


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records on this device; None where nothing can."""
    return CudaGraphs(device) if device.type == "cuda" else None
