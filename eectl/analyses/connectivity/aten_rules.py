"""The rules of ATen operations: how each labels the axes of its outputs, and the table of them for `tracing`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eectl.analyses.connectivity.axis_labels import Label, fixed
from eectl.analyses.connectivity.tracing import AxisLabels, Call, Rule, Tracer, tensors_in


def _axis(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def _dims(dims: Any, ndim: int) -> list[int]:
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(ndim))
    return [_axis(dim, ndim) for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def _elementwise(tracer: Tracer, call: Call) -> list[AxisLabels]:
    return _spread(tracer, call.tensors(), call.outputs)


def _spread(tracer: Tracer, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[AxisLabels]:
    """Broadcast the operands to one shape and permute them alike."""
    shape = max((tuple(tensor.shape) for tensor in outputs), key=len)
    result: list[Label | None] = [None] * len(shape)
    for tensor in operands:
        offset = len(shape) - tensor.dim()
        for axis, label in enumerate(tracer.get(tensor)):
            if tensor.shape[axis] == 1 and shape[axis + offset] != 1:
                continue
            known = result[axis + offset]
            if known is None:
                result[axis + offset] = label
            else:
                tracer.labels.unify(known, label)
    labels = [fixed(size) if label is None else label for label, size in zip(result, shape, strict=True)]
    return [list(labels) for _ in outputs]


def _constant(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Leave every axis free: a tensor of one value throughout looks the same however it is permuted."""
    return [tracer.fresh(tensor) for tensor in call.outputs]


def _stays(_: Tracer, call: Call) -> list[AxisLabels]:
    """Keep the axes of what is made from sizes alone."""
    return [[fixed(size) for size in tensor.shape] for tensor in call.outputs]


def _along(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Pass all axes, for softmax and its like, which treat all positions of an axis the same."""
    return _spread(tracer, call.args[:1], call.outputs)


def _ordered(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Keep the axes that cumulative sums and flips run along; pass the others."""
    return _pass_but(tracer, call, call.argument(1, "dim"))


def _roll(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Keep the axes that are rolled; pass the others."""
    return _pass_but(tracer, call, call.argument(2, "dims"))


def _pass_but(tracer: Tracer, call: Call, dims: Any) -> list[AxisLabels]:
    labels = list(tracer.get(call.args[0]))
    tracer.pin([labels[axis] for axis in _dims(dims, len(labels))])
    return [list(labels) for _ in call.outputs]


def _norm(tracer: Tracer, call: Call) -> list[AxisLabels] | None:
    """Reduce over the axes of a norm, whose first argument after the tensor is its order."""
    return _reduce(tracer, Call([call.args[0], *call.args[2:]], call.kwargs, call.outputs))


def _reduce(tracer: Tracer, call: Call) -> list[AxisLabels] | None:
    """Drop the axes of sums, means and extremes, which do not depend on the order of what they run over."""
    tensor = call.args[0]
    dims = _dims(call.argument(1, "dim"), tensor.dim())
    labels = tracer.get(tensor)
    kept = [label for axis, label in enumerate(labels) if axis not in dims]
    spread = [fixed(1) if axis in dims else label for axis, label in enumerate(labels)]
    if len(call.outputs) > 1 and not call.outputs[-1].is_floating_point():  # positions of extremes do depend on it
        tracer.pin([labels[axis] for axis in dims])
    if all(output.dim() == len(kept) for output in call.outputs):
        return [list(kept) for _ in call.outputs]
    return [list(spread) for _ in call.outputs] if all(output.dim() == len(spread) for output in call.outputs) else None


def _pool(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Keep height and width in pooling and resizing; pass channels."""
    labels = tracer.get(call.args[0])
    tracer.pin(labels[-2:])
    return [[*labels[:-2], *(fixed(size) for size in output.shape[-2:])] for output in call.outputs]


def _reorder(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels = tracer.get(call.args[0])
    if len(call.args) == 1:
        order = list(reversed(range(len(labels))))
    elif isinstance(call.args[1], list | tuple):
        order = [_axis(dim, len(labels)) for dim in call.args[1]]
    else:
        order = list(range(len(labels)))
        first, second = (_axis(dim, len(labels)) for dim in call.args[1:3])
        order[first], order[second] = second, first
    return [[labels[axis] for axis in order]]


def _reshape(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Merge groups of axes whose sizes have one product, and split them anew; axes of size 1 come and go."""
    tensor, shape = call.args[0], call.outputs[0].shape
    if tensor.numel() == 0:
        return [[fixed(size) for size in shape]]
    old = [(size, label) for size, label in zip(tensor.shape, tracer.get(tensor), strict=True) if size != 1]
    new = [size for size in shape if size != 1]
    made: list[Label] = []
    while old:
        size, label = old.pop(0)
        merged, sizes = [label], [new.pop(0)]
        product = sizes[0]
        while size != product:
            if size < product:
                more, label = old.pop(0)
                size, merged = size * more, [*merged, label]
            else:
                sizes.append(new.pop(0))
                product *= sizes[-1]
        whole = merged[0] if len(merged) == 1 else tracer.labels.merge(merged)
        made += tracer.labels.split(whole, sizes)
    return [[made.pop(0) if size != 1 else fixed(1) for size in shape]]


def _expand(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Leave an expanded axis free: its positions are copies of one value."""
    tensor, output = call.args[0], call.outputs[0]
    offset = output.dim() - tensor.dim()
    labels = tracer.get(tensor)
    return [[
        labels[axis - offset] if axis >= offset and tensor.shape[axis - offset] == size else tracer.labels.new(size)
        for axis, size in enumerate(output.shape)
    ]]  # fmt: skip


def _select(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels = list(tracer.get(call.args[0]))
    axis = _axis(call.argument(1, "dim", 0), len(labels))
    tracer.labels.pin(labels.pop(axis))
    return [list(labels) for _ in call.outputs]


def _slice(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels, tensor = list(tracer.get(call.args[0])), call.args[0]
    axis = _axis(call.argument(1, "dim", 0), len(labels))
    bounds = (call.argument(2, "start"), call.argument(3, "end"), call.argument(4, "step", 1))
    start, stop, step = slice(*bounds).indices(tensor.shape[axis])
    if step != 1:
        tracer.labels.pin(labels[axis])
        labels[axis] = fixed(call.outputs[0].shape[axis])
    elif (start, stop) != (0, tensor.shape[axis]):
        labels[axis] = tracer.labels.cut(labels[axis], start, max(start, stop))
    return [labels]


def _split(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels = tracer.get(call.args[0])
    axis, start, given = _axis(call.argument(2, "dim", 0), len(labels)), 0, []
    for output in call.outputs:
        stop = start + output.shape[axis]
        given.append([*labels[:axis], tracer.labels.cut(labels[axis], start, stop), *labels[axis + 1 :]])
        start = stop
    return given


def _cat(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Put the parts' labels of the joined axis one after the other; permute the other axes alike."""
    parts = [tracer.get(tensor) for tensor in call.args[0] if tensor.numel()]
    axis = _axis(call.argument(1, "dim", 0), call.outputs[0].dim())
    for part in parts[1:]:
        for place, (label, other) in enumerate(zip(parts[0], part, strict=True)):
            if place != axis:
                tracer.labels.unify(label, other)
    joined = tuple(segment for part in parts for segment in part[axis])
    return [[joined if place == axis else label for place, label in enumerate(parts[0])]]


def _stack(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels = _spread(tracer, call.args[0], [call.args[0][0]])[0]
    axis = _axis(call.argument(1, "dim", 0), call.outputs[0].dim())
    return [[*labels[:axis], fixed(len(call.args[0])), *labels[axis:]]]


def _pad(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Put a free part on each side: padding is one value throughout."""
    labels, widths = list(tracer.get(call.args[0])), list(call.args[1])
    for place in range(len(widths) // 2):
        low, high = widths[2 * place : 2 * place + 2]
        axis = len(labels) - 1 - place
        size = call.args[0].shape[axis]
        kept = tracer.labels.cut(labels[axis], max(-low, 0), size - max(-high, 0)) if min(low, high) < 0 else labels[axis]
        ends = [tracer.labels.new(width) if width > 0 else () for width in (low, high)]
        labels[axis] = (*ends[0], *kept, *ends[1])
    return [labels]


def _index(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Keep the indexed axis of `weight[ids]`; pass the others where the ids are numbers of rows."""
    if isinstance(call.args[1], list | tuple):  # aten.index: one tensor or None per axis
        used = [(axis, index) for axis, index in enumerate(call.args[1]) if index is not None]
        if len(used) != 1 or used[0][1].dtype == torch.bool:
            return _pinned(tracer, call)
        source, (axis, ids) = call.args[0], used[0]
    elif isinstance(call.args[1], Tensor):  # aten.embedding
        source, axis, ids = call.args[0], 0, call.args[1]
    else:  # aten.index_select
        source, axis, ids = call.args[0], _axis(call.args[1], call.args[0].dim()), call.args[2]
    labels = tracer.get(source)
    tracer.labels.pin(labels[axis])
    tracer.pin(tracer.get(ids))
    return [[*labels[:axis], *(fixed(size) for size in ids.shape), *labels[axis + 1 :]]]


def _pinned(tracer: Tracer, call: Call) -> list[AxisLabels]:
    for tensor in call.tensors():
        tracer.pin(tracer.get(tensor))
    return [[fixed(size) for size in output.shape] for output in call.outputs]


def _product(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Multiply […, i, k] by [k, j] or […, k, j], plus a first tensor where there are three: both k are permuted alike."""
    one, other = call.args[-2], call.args[-1]
    left, right = list(tracer.get(one)), list(tracer.get(other))
    inner = right[-2] if len(right) > 1 else right[0]
    tracer.labels.unify(left[-1], inner)
    for first, second in zip(left[:-2], right[:-2], strict=True) if len(right) > 2 else ():
        tracer.labels.unify(first, second)
    labels = [*left[:-1], *(right[-1:] if len(right) > 1 else [])]
    return [labels] if len(call.args) == 2 else _sum_into(tracer, call.args[0], labels, call.outputs[0])


def _sum_into(tracer: Tracer, addend: Tensor, labels: AxisLabels, output: Tensor) -> list[AxisLabels]:
    offset = output.dim() - addend.dim()
    for axis, label in enumerate(tracer.get(addend)):
        if addend.shape[axis] == output.shape[axis + offset]:
            tracer.labels.unify(label, labels[axis + offset])
    return [labels]


def _linear(tracer: Tracer, call: Call) -> list[AxisLabels]:
    left, weight, bias = tracer.get(call.args[0]), tracer.get(call.args[1]), call.argument(2, "bias")
    tracer.labels.unify(left[-1], weight[1])
    labels = [*left[:-1], weight[0]]
    return [labels] if bias is None else _sum_into(tracer, bias, labels, call.outputs[0])


def _convolve(tracer: Tracer, call: Call) -> list[AxisLabels] | None:
    """Permute input channels as the weight's axis 1 and output channels as its axis 0; in groups both are groups of channels."""
    x, kernel, bias, groups = call.args[0], call.args[1], call.args[2], call.args[8]
    if call.args[6]:  # transposed
        return None
    inputs, weight, output = tracer.get(x), list(tracer.get(kernel)), call.outputs[0]
    tracer.pin(inputs[2:])
    tracer.pin(weight[2:])
    channels = inputs[1]
    if groups > 1:
        rows = _two_digits(tracer, channels, groups, x.shape[1] // groups)
        columns = _two_digits(tracer, weight[0], groups, output.shape[1] // groups)
        tracer.labels.unify(rows[0], columns[0])
        channels = rows[1]
    tracer.labels.unify(channels, weight[1])
    if bias is not None:
        tracer.labels.unify(tracer.get(bias)[0], weight[0])
    return [[inputs[0], weight[0], *(fixed(size) for size in output.shape[2:])]]


def _two_digits(tracer: Tracer, label: Label, outer: int, inner: int) -> list[Label]:
    """Split an axis into `outer` groups of `inner`, either of which may be 1."""
    sizes = [size for size in (outer, inner) if size != 1]
    labels = tracer.labels.split(label, sizes) if sizes else []
    return [labels.pop(0) if size != 1 else fixed(1) for size in (outer, inner)]


def _batch_norm(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels = tracer.get(call.args[0])
    for tensor in call.tensors(1):
        tracer.labels.unify(labels[1], tracer.get(tensor)[0])
    size = call.args[0].shape[1]
    return [
        list(labels) if k == 0 else [labels[1] if each == size else fixed(each) for each in output.shape]
        for k, output in enumerate(call.outputs)
    ]


def _layer_norm(tracer: Tracer, call: Call) -> list[AxisLabels]:
    labels, sizes = tracer.get(call.args[0]), call.args[1]
    for tensor in call.tensors(2):
        for mine, theirs in zip(labels[len(labels) - len(sizes) :], tracer.get(tensor), strict=True):
            tracer.labels.unify(mine, theirs)
    rest = [*labels[: len(labels) - len(sizes)], *(fixed(1) for _ in sizes)]
    return [list(labels) if k == 0 else list(rest) for k in range(len(call.outputs))]


def _group_norm(tracer: Tracer, call: Call) -> list[AxisLabels]:
    """Let channels move within their group, and whole groups among each other."""
    labels, groups = tracer.get(call.args[0]), call.args[6]
    _two_digits(tracer, labels[1], groups, call.args[0].shape[1] // groups)
    for tensor in tensors_in(call.args[1:3]):
        tracer.labels.unify(labels[1], tracer.get(tensor)[0])
    return [list(labels) if k == 0 else [fixed(size) for size in output.shape] for k, output in enumerate(call.outputs)]


_ELEMENTWISE = """relu gelu silu hardswish hardsigmoid hardtanh sigmoid tanh exp expm1 log log1p neg abs sqrt rsqrt square pow
    reciprocal clamp clamp_min clamp_max clone _to_copy detach alias lift_fresh lift_fresh_copy contiguous add sub mul div rsub
    maximum minimum where masked_fill eq ne lt gt le ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    bitwise_xor erf leaky_relu elu celu selu softplus mish copy copy_ isnan isinf lerp addcmul addcdiv nan_to_num cos sin sign
    floor ceil round relu6 log_sigmoid_forward _conj logit floor_divide remainder fmod
    _prelu_kernel"""
_CONSTANTS = "full zeros ones zeros_like ones_like full_like new_zeros new_ones new_full"
_FROM_SIZES = "arange empty empty_like new_empty empty_strided scalar_tensor linspace"
_REDUCTIONS = "sum mean amax amin max min var std prod any all logsumexp var_mean"
_POOLS = """avg_pool2d max_pool2d_with_indices max_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"""
_BATCH_NORMS = "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm"

RULES: dict[str, Rule] = {
    **{f"{name}{end}": _elementwise for name in _ELEMENTWISE.split() for end in ("", "_")},
    **dict.fromkeys(_CONSTANTS.split(), _constant),
    **dict.fromkeys(_FROM_SIZES.split(), _stays),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(_BATCH_NORMS.split(), _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _along),
    **dict.fromkeys(("cumsum", "flip"), _ordered),
    "roll": _roll,
    "linalg_vector_norm": _norm,
    **dict.fromkeys(("t", "transpose", "permute"), _reorder),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("select", "unbind"), _select),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("index", "embedding", "index_select"), _index),
    **dict.fromkeys(("mm", "bmm", "mv", "addmm", "baddbmm"), _product),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "convolution": _convolve,
    "linear": _linear,
    "expand": _expand,
    "slice": _slice,
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad,
}
