"""Counts what code asks of a device: kernels, copies, reads that wait, shapes that depend on values. It times nothing.

The device may be the real one or `meta`, whose tensors have a shape and no values: then nothing is computed, any batch size takes
no time, and what lies on the host stays real beside it. An operation counts once, though a library may launch several kernels for
it, so the numbers are least ones.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Of operations whose result is no view by their schema these run nothing on the device: memory is taken, or given another name.
NO_KERNEL = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten._unsafe_view.default,
        aten.lift.default,
        aten.lift_fresh.default,
        aten.resize_.default,
        aten.set_.source_Tensor,
    }
)
KINDS = ("launches", "to_device", "to_host", "reads", "data_dependent_shapes", "host_operations")


class Tally(TorchDispatchMode):
    """Counts, by `part` and kind, what runs on a device under it; `part` is for the caller to set.

    `launches` are operations that compute or move something on the device; `to_device` and `to_host` are copies across,
    `reads` values that Python waits for, `data_dependent_shapes` results whose size the host must wait for; `host_operations`
    compute something that never touches the device. Each operation is of one kind. On `meta` a value that is read is 0 and a
    copy to the host is of zeros.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.part = ""
        self.counts: Counter[tuple[str, str, str]] = Counter()  # part, kind, operation
        self._device = device_type

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None):
        kwargs = kwargs or {}
        with self:  # in inference mode an operation that is made of others comes whole
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        answer = self._stand_in(func, args, kwargs)
        found = func(*args, **kwargs) if answer is None else answer
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        kind = kind_of(func, args, given, made, device_type=self._device)
        if kind is not None:
            backward = torch._C._current_graph_task_id() != -1
            self.counts["backward" if backward else self.part, kind, str(func)] += 1
        return found

    @property
    def is_meta(self) -> bool:
        """Whether nothing is computed."""
        return self._device == "meta"

    def add(self, kind: str, name: str) -> None:
        """Count one thing that no operation shows."""
        self.counts[self.part, kind, name] += 1

    def _stand_in(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operation that needs values gives on a device that has none; None where it needs none."""
        if self._device != "meta" or not args or not isinstance(args[0], Tensor):
            return None
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return None

    def table(self, parts: Iterable[str], *, per: int = 1) -> dict[str, dict[str, float]]:
        """What was counted, by part and kind, divided by `per`."""
        counts = {part: dict.fromkeys(KINDS, 0.0) for part in parts}
        for (part, kind, _), count in self.counts.items():
            if part in counts:
                counts[part][kind] += count / per
        return counts

    def operations(self) -> Iterator[tuple[str, str, str, int]]:
        """Part, kind, operation and how often, the most frequent first."""
        for key, count in self.counts.most_common():
            yield *key, count


@contextmanager
def as_on_a_gpu(device: torch.device) -> Iterator[None]:
    """Let `meta` do what it cannot: autocast, which is left out, and attention in one operation. Other devices stay as they are.

    The attention takes no mask: where it is given one, `meta` takes it apart as it always does.
    """
    if device.type != "meta":
        yield
        return
    real_autocast, real_attention = torch.autocast, functional.scaled_dot_product_attention

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == "meta" else real_autocast(device_type, *args, **kwargs)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        if attn_mask is not None or not query.is_meta or more.get("enable_gqa"):
            return real_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        scale = more.get("scale")
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]

    with patch("torch.autocast", autocast), patch("torch.nn.functional.scaled_dot_product_attention", attention):
        yield


def kind_of(
    func: OpOverload, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor], *, device_type: str
) -> str | None:
    """What an operation with these tensors is to the device, one of KINDS; None where it does nothing there."""
    does_nothing = func in NO_KERNEL or _is_view(func)
    if all(tensor.device.type != device_type for tensor in (*given, *made)):
        return None if does_nothing or not made else "host_operations"
    if _shape_depends(func, args):
        return "data_dependent_shapes"
    if not made:  # a number or a truth value came of it, or a size that the host has anyway
        return "reads" if torch.Tag.data_dependent_output in func.tags else ("launches" if func._schema.is_mutable else None)
    if func is aten.copy_.default or func is aten._to_copy.default:
        source, target = given[-1].device.type, made[0].device.type
        if source != target:
            return "to_device" if target == device_type else "to_host"
    return None if does_nothing else "launches"


def _shape_depends(func: OpOverload, args: Sequence[Any]) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is aten.index.Tensor:  # of masks alone, not of row numbers
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True


def _is_view(func: OpOverload) -> bool:
    """Whether all results share an argument's memory and nothing is written to it, but for its shape."""
    if torch.Tag.inplace_view in func.tags:
        return True
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)
