"""The numbers that a network computes in: which precision a device can do, the autocast of it, and torch's settings for a run.

`float32` means 32 bits in every product. `tf32` keeps float32 tensors and lets a GPU multiply them in TF32 (8 bits of exponent
and 10 of mantissa); a device without it computes in float32, and so that is what it is called there. `bf16` is autocast to
bfloat16, and TF32 for what stays float32. `deterministic` asks for the same bits from the same seed. Nothing here knows what is
computed.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from eectl.core.errors import EectlError, lookup

FLOAT32, TF32, BF16 = "float32", "tf32", "bf16"
PRECISIONS = "auto", FLOAT32, TF32, BF16
_PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HOPPER = (9, 0)  # the compute capability from which cuDNN's attention is the fastest
_CUBLAS, _WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_NO_FORM = " does not have a deterministic implementation"


def resolve_precision(wish: str, device: torch.device) -> str:
    """Return the precision in which `device` computes where `wish`, one of PRECISIONS, is asked for: float32, tf32 or bf16.

    `auto` is bf16 on a GPU that has it, else float32. `tf32` is float32 where the device has no TF32.

    Raises:
        EectlError: an unknown name, or bf16 on a device that does not have it.
    """
    lookup(dict.fromkeys(PRECISIONS), wish, what="precision")
    if wish == "auto":
        wish = BF16 if device.type == "cuda" and _has_bf16(device) else FLOAT32
    if wish == BF16 and not _has_bf16(device):
        allowed = "float32, tf32" if device.type == "cuda" else FLOAT32
        raise EectlError(f"precision bf16: {device} does not have it, only {allowed}; try --precision float32")
    return FLOAT32 if wish == TF32 and not _has_tf32(device) else wish


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with warnings.catch_warnings():  # where a type is not there autocast warns, and stays off
        warnings.simplefilter("ignore")
        with torch.autocast(device.type, torch.bfloat16):
            return bool(torch.is_autocast_enabled(device.type))


def _has_tf32(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_tf32_supported()


def autocast(precision: str, device: torch.device, *, keeps_casts: bool = False) -> AbstractContextManager[Any]:
    """Return the context that forward passes at a resolved precision run in.

    Each weight is cast once in the block, on a GPU only with `keeps_casts`, else in every pass: a captured graph would go on
    reading the casts of the block that it was captured in.
    """
    if precision != BF16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=keeps_casts or device.type != "cuda")


def note_on_precision(what: str, made: str, used: str) -> list[str]:
    """Return a note where `what`, such as `policy.json was made`, at another precision than the one in use; else none."""
    if made == used:
        return []
    same = f"--precision {made}{' on a GPU' if made == TF32 else ''}"
    return [f"{what} in {made}, and this computes in {used}: scores move a little; for the same ones {same}"]


@contextmanager
def settings(precision: str, device: torch.device, *, deterministic: bool = False, training: bool = False) -> Iterator[None]:
    """Set torch up, in this whole process, for a run at a resolved precision; when the block ends all is as it was.

    Args:
        precision: What `resolve_precision` returned.
        device: Where the run computes.
        deterministic: Only algorithms that give the same bits each time. The first block with it must come before the process
            multiplies anything on a GPU, since cuBLAS reads its variable only once.
        training: Take the time to find the fastest algorithms, which pays where shapes repeat for a whole run.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tf32(precision != FLOAT32))
            stack.enter_context(_cudnn(deterministic=deterministic, benchmark=training and not deterministic))
            if deterministic:
                stack.enter_context(_without_cudnn_attention())
            elif training and torch.cuda.get_device_capability(device) >= _HOPPER:
                stack.enter_context(sdpa_kernel(_PREFERRED, set_priority=True))
        if deterministic:
            stack.enter_context(_deterministic(device))
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in matrix products and convolutions, or forbid it.

    torch has two sets of names for this, and raises where one is read after the other has set something. The older ones set both,
    so they can be used under every torch from 2.11 on, whichever of the two its compiler reads.
    """
    cudnn: Any = torch.backends.cudnn
    parts: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, cast(Any, torch.backends.mkldnn).matmul]
    before = [part.fp32_precision for part in parts]
    with _no_warnings():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        with _no_warnings():
            torch.set_float32_matmul_precision("high" if before[0] == TF32 else "highest")
            cudnn.allow_tf32 = before[1] == TF32
            for part, value in zip(parts, before, strict=True):
                part.fp32_precision = value


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Swallow the warnings that the older names will go one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _cudnn(*, deterministic: bool, benchmark: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Forbid cuDNN's attention, whose backward pass is not the same each time."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    os.environ.setdefault(_CUBLAS, _WORKSPACE)  # it stays: cuBLAS reads it once
    known = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_compiler_without_measuring())
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing is read before it is written
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(known[0], warn_only=known[1])
            memory.fill_uninitialized_memory = fills


def _compiler_without_measuring() -> AbstractContextManager[Any]:
    """Keep the compiler from choosing kernels by their time, which differs from run to run, as then do the sums they make."""
    import torch._inductor.config as compiler

    return compiler.patch(deterministic=True)  # type: ignore[no-any-return]


def not_deterministic(error: RuntimeError) -> EectlError | None:
    """Return what the user can mend where torch raised `error` for an operation without a deterministic form, else None."""
    operation, found, _ = str(error).partition(_NO_FORM)
    if found:
        return EectlError(
            f"deterministic: {operation.split()[-1]} has no deterministic form here; --set deterministic=false, or take another "
            "head or backbone"
        )
    if _CUBLAS in str(error):
        return EectlError(f"deterministic: {_CUBLAS} is {os.environ.get(_CUBLAS)}; unset it, or set it to {_WORKSPACE}")
    return None
