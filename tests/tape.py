"""A stand-in for CUDA graphs on a CPU: what a function dispatches is recorded, and replayed in the same memory.

It has what makes CUDA graphs hard: recording does no work, Python does not run again at a replay, every number that was read
from Python is baked in, every tensor keeps its address, and a value that the host reads back is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class Tape:
    """Records as `core.capture.Recorder` asks; `replays` counts the replays, `num_operations` what each recording holds."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.rehearsals = self.replays = 0
        self.num_operations: list[int] = []

    def rehearse(self, function: Callable[[], Any]) -> Any:
        self.rehearsals += 1
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        recording, drawn = _Recording(), torch.get_rng_state()
        try:
            with recording, mock.patch("torch.get_rng_state", _refuse):
                result = function()
        finally:
            recording.undo()
            torch.set_rng_state(drawn)
        self.num_operations.append(len(recording.operations))

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, result


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []
        self._own: set[int] = set()  # storages that were made on the way
        self._before: dict[int, tuple[Any, Tensor]] = {}  # those from outside that were written to, as they were
        self._keep: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for written in _written(func, args, kwargs):
            storage = written.untyped_storage()
            if storage.data_ptr() not in self._own and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, _bytes(storage).clone()
        result = func(*args, **kwargs)
        known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        fresh = [each for each in _tensors(result) if each.untyped_storage().data_ptr() not in known]
        self._own.update(each.untyped_storage().data_ptr() for each in fresh)
        if fresh or any(True for _ in _written(func, args, kwargs)):
            self.operations.append((func, args, kwargs, result))
        self._keep.append((args, kwargs, result))  # so that no address is used twice
        return result

    def undo(self) -> None:
        for storage, before in self._before.values():
            _bytes(storage).copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            for mine, new in zip(_tensors(result), _tensors(again), strict=True):
                if mine.untyped_storage().data_ptr() not in known:
                    mine.copy_(new)


def _refuse() -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing: a generator's state")


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(result: Any) -> list[Tensor]:
    return [each for each in tree_leaves(result) if isinstance(each, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    found = _tensors(args[3:5]) if func._schema.name == "aten::native_batch_norm" else []  # its schema does not say so
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += _tensors(value)
    return found
