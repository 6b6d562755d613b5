"""The cost of each exit in multiply-adds (MACs) of one row, counted with fvcore on the pieces that really run.

Counted: convolutions, linear layers, matrix products and attention. Element-wise operations, norms and pooling are listed as not
counted; any operation on neither list is an error, so that no cost is lost in silence. The time of a run is not measured here.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import ceil, log2, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from eectl.core.errors import EectlError
from eectl.models.backbone import Hidden, in_eval_mode
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore compiles a loss with torch.jit when it is imported
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_jit, einsum_flop_jit, get_shape, linear_flop_jit


@dataclass(frozen=True)
class Costs:
    """MACs of one row, and numbers of parameters.

    `exits[k-1]` is the cost of leaving at exit k (1..K): the blocks up to it and **all** heads passed on the way, its own
    included; the last is the whole backbone and all heads. `heads[k-1]` is attached head k alone (k < K). `plain` is the
    backbone with its own head and no exits: budgets are shares of it (paper, methods §5). `blocks[i]` is the stem and the blocks
    up to block i, no head among them.
    """

    exits: tuple[int, ...]
    heads: tuple[int, ...]
    plain: int
    parameters: int
    head_parameters: tuple[int, ...]
    blocks: tuple[int, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """`exits` as shares of `plain`; the last is above 1 by the attached heads."""
        return tuple(cost / self.plain for cost in self.exits)

    @property
    def backbone_shares(self) -> tuple[float, ...]:
        """The backbone's blocks up to each attached exit, heads left out, as shares of `plain`."""
        passed = accumulate(self.heads)
        return tuple((cost - heads) / self.plain for cost, heads in zip(self.exits[:-1], passed, strict=True))


def measure_costs(model: MultiExitModel, input_shape: Sequence[int]) -> Costs:
    """Count the costs of `model` for one input of `input_shape`, texts at their full length, piece by piece in eval mode.

    The model's parameters, buffers and training flags stay as they are, and PyTorch's fused attention comes back on after.
    Raises EectlError for an operation that is neither counted nor known to be negligible.
    """
    backbone = model.backbone
    with _counting(model):
        inputs = backbone.example(input_shape)
        spent, hidden = _count_hidden("the stem", backbone, lambda h: backbone.stem(_tensor(h)), Hidden(inputs))
        exits: list[int] = []
        heads: list[int] = []
        blocks: list[int] = []
        outputs: list[ExitOutput | None] = []
        for index in range(backbone.depth):
            cost, hidden = _count_hidden(f"block {index}", backbone, partial(backbone.block, index), hidden)
            spent += cost
            blocks.append(spent)
            if index in model.after:
                number = model.after.index(index) + 1
                heads.append(_count_output(f"exit {number}", model, number, hidden, outputs))
                exits.append(spent + sum(heads))
                outputs.append(model.leave(hidden, number, outputs))
        plain = spent + _count_output("the head", model, model.num_exits, hidden, outputs)
    return Costs(
        exits=(*exits, plain + sum(heads)),
        heads=tuple(heads),
        plain=plain,
        parameters=sum(p.numel() for p in backbone.parameters()),
        head_parameters=tuple(sum(p.numel() for p in head.parameters()) for head in model.exits),
        blocks=tuple(blocks),
    )


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Go to eval mode without a graph and without fused attention, which the counter cannot see; all is restored after."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_eval_mode(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _tensor(hidden: Hidden) -> Tensor:
    assert isinstance(hidden.x, Tensor)
    return hidden.x


def _flat(hidden: Hidden) -> tuple[Tensor, ...]:
    scales = (hidden.x,) if isinstance(hidden.x, Tensor) else hidden.x
    return scales if hidden.mask is None else (*scales, hidden.mask)


def _like(hidden: Hidden, flat: Sequence[Tensor]) -> Hidden:
    """Return `flat` in the form of `hidden`; the inverse of _flat."""
    scales, mask = (flat, None) if hidden.mask is None else (flat[:-1], flat[-1])
    return replace(hidden, x=scales[0] if isinstance(hidden.x, Tensor) else tuple(scales), mask=mask)


def _count_hidden(place: str, owner: nn.Module, run: Callable[[Hidden], Hidden], hidden: Hidden) -> tuple[int, Hidden]:
    """Return the MACs of a piece from Hidden to Hidden, and what it gives."""
    cost = _count(place, owner, lambda *flat: _flat(run(_like(hidden, flat))), _flat(hidden))
    return cost, run(hidden)


def _count_output(place: str, model: MultiExitModel, number: int, hidden: Hidden, earlier: Sequence[ExitOutput | None]) -> int:
    """Return the MACs of exit `number`'s head alone, with the outputs of the exits before it."""

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        output = model.leave(_like(hidden, flat), number, earlier)
        return (output.logits,) if output.state is None else (output.logits, output.state)

    return _count(place, model, run, _flat(hidden))


class _Piece(nn.Module):
    """A function of tensors as a module, which is what fvcore traces; it holds `owner`, whose parameters the function uses."""

    def __init__(self, owner: nn.Module, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.owner = owner
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _Kept() as kept:
            return (*self.run(*tensors), *kept.tensors)


class _Kept(TorchFunctionMode):
    """Keeps what each operation gives: a trace leaves out what nothing reads, as a pooler's output, though it is computed.

    Views are kept, as the trace takes a tensor that a function of the network's own returns for that function's alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.tensors += [each.detach() for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]
        return output


def _count(place: str, owner: nn.Module, run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> int:
    analysis = FlopCountAnalysis(_Piece(owner, run), tensors)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.clear_op_handles().set_op_handle(**COUNTED)
    total = int(analysis.total())
    unknown = sorted(set(analysis.unsupported_ops()) - UNCOUNTED)
    if unknown:
        raise EectlError(
            f"the cost of {', '.join(unknown)} in {place} is not known; "
            "add each to COUNTED or UNCOUNTED in eectl/exits/costs.py, or write the network without them"
        )
    return total


def _product(inner: int) -> Callable[[list[Any], list[Any]], int]:
    """Return a counter of matrix products: output elements × the last dimension of argument `inner`, whatever the batch shape."""

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(_shape(outputs[0])) * _shape(inputs[inner])[-1]

    return count


def _shape(value: Any) -> list[int]:
    """Return the shape of a traced tensor."""
    return [int(size) for size in get_shape(value)]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001
    """Return the MACs of softmax(q kᵀ) v without the softmax; q is [row, head, query, width], k and v [row, head, key, width]."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _fourier(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the MACs of fast Fourier transforms: n log₂ n butterflies of 4 for each two numbers, along each dimension."""
    shape, dims = _shape(outputs[0]), inputs[2].toIValue()
    return sum(ceil(2 * prod(shape) * log2(shape[dim])) for dim in (range(len(shape)) if dims is None else dims))


def _triangular(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the MACs of solving triangular systems [equation, unknown]: each is half a product with a square matrix."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1] // 2


def _convolution_by_name(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the MACs of a convolution whose padding has a name ("same")."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _lstm(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001
    """Return the MACs of an LSTM: at each step of each row it multiplies by all its matrices."""
    weights = [shape for shape in map(_shape, inputs[2].node().inputs()) if len(shape) == 2]
    return prod(_shape(inputs[0])[:-1]) * sum(map(prod, weights))


COUNTED: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "aten::_convolution": conv_flop_jit,
    "aten::_convolution_mode": _convolution_by_name,
    "aten::lstm": _lstm,
    "aten::linear": linear_flop_jit,
    "aten::einsum": einsum_flop_jit,
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::mv": _product(0),
    "aten::dot": _product(0),
    "aten::_grouped_mm": _product(0),
    "aten::linalg_solve_triangular": _triangular,
    "aten::fft_fftn": _fourier,
    "aten::addmm": _product(1),
    "aten::baddbmm": _product(1),
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
}

_ELEMENTWISE = """abs acos sign square addcmul add add_ sub sub_ rsub mul mul_ div div_ pow sqrt sqrt_ rsqrt exp log log2 neg
    reciprocal sin cos atan2 erf outer lerp clamp clamp_ clamp_min clamp_min_ clamp_max maximum minimum where ge gt le lt eq
    ne isinf isnan logical_and logical_or logical_not bitwise_not bitwise_and __and__ __or__ masked_fill masked_fill_ relu
    relu_ relu6 relu6_ leaky_relu leaky_relu_ prelu celu selu elu elu_ gelu gelu_ glu silu silu_ mish mish_ sigmoid sigmoid_
    tanh tanh_ hardtanh hardtanh_ hardsigmoid hardsigmoid_ hardswish hardswish_ softplus softmax log_softmax dropout
    dropout_ feature_dropout floor_divide remainder floor ceil real"""
_REDUCE = """sum mean max min amax amin any all argmax var std var_mean std_mean cumsum norm linalg_vector_norm logsumexp
    topk prod sort histc scatter_reduce index_add"""
_NORM_POOL = """batch_norm layer_norm group_norm instance_norm rms_norm max_pool1d avg_pool1d adaptive_avg_pool1d max_pool2d
    avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa"""
_MOVE = """Int IntImplicit ScalarImplicit Bool size numel arange linspace meshgrid cat concat stack chunk split
    split_with_sizes unbind tensor_split narrow select slice index index_select index_put_ gather scatter embedding expand
    expand_as repeat repeat_interleave tile one_hot broadcast_to reshape reshape_as view view_as flatten unflatten permute
    transpose transpose_ swapaxes t mT movedim roll flip rot90 pad constant_pad_nd squeeze unsqueeze unsqueeze_ contiguous clone
    copy_ detach to type_as alias im2col col2im unfold pixel_shuffle pixel_unshuffle channel_shuffle empty empty_like full
    full_like fill_ new_empty new_full new_zeros new_ones eye ones ones_like zeros zeros_like scalar_tensor lift_fresh tril triu
    as_strided nonzero nonzero_numpy scatter_ numpy_T view_as_complex view_as_real"""
_OWN = frozenset(f"prim::PythonOp.{name}" for name in ("GeLUFunction", "YosoCumulation"))
"""Functions that networks write themselves, of operations that are counted one by one."""
UNCOUNTED = _OWN | {f"aten::{name}" for name in " ".join((_ELEMENTWISE, _REDUCE, _NORM_POOL, _MOVE)).split()}
