"""Precision and determinism: what each device resolves a wish to, and what torch is set to inside a block and after it.

A GPU is a stand-in here: its settings are flags of torch that are there on every machine.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch

from eectl.core import precision
from eectl.core.errors import EectlError
from eectl.core.precision import autocast, not_deterministic, note_on_precision, resolve_precision, settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def gpu(monkeypatch):
    """Make torch believe in a GPU of a compute capability."""

    def there(*capability):
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or new)
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: new)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

        new = capability >= (8, 0)
        return GPU

    return there


def test_what_a_wish_is_on_a_cpu():
    found = [resolve_precision(wish, CPU) for wish in precision.PRECISIONS]
    assert found == ["float32", "float32", "float32", "bf16"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), ["bf16", "float32", "tf32", "bf16"]), ((8, 0), ["bf16", "float32", "tf32", "bf16"]), ((7, 5), ["float32"] * 3)],
)
def test_what_a_wish_is_on_a_gpu(gpu, capability, expected):
    device = gpu(*capability)
    assert [resolve_precision(wish, device) for wish in precision.PRECISIONS[: len(expected)]] == expected


def test_bf16_where_it_is_not(gpu, monkeypatch):
    with pytest.raises(EectlError, match=r"bf16: cuda:0 does not have it, only float32, tf32; try --precision float32"):
        resolve_precision("bf16", gpu(7, 0))

    class Refusing(nullcontext):
        """Autocast of a device that lacks the type: it warns and stays off."""

        def __init__(self, kind, _):
            super().__init__()
            warnings.warn(f"In {kind} autocast, but the target dtype is not supported. Disabling autocast.", stacklevel=2)

    monkeypatch.setattr(torch, "autocast", Refusing)
    with warnings.catch_warnings(), pytest.raises(EectlError, match="bf16: mps does not have it, only float32; try"):
        warnings.simplefilter("error")
        resolve_precision("bf16", torch.device("mps"))


def test_a_precision_that_is_none():
    with pytest.raises(EectlError, match=r"unknown precision 'fp16' \(did you mean 'bf16'\?\); known: auto, float32, tf32, bf16"):
        resolve_precision("fp16", CPU)


def test_autocast_casts_products_and_nothing_else():
    x, w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.randn(5, 2)
    with autocast("bf16", CPU):
        assert torch.equal(x @ w, x.bfloat16() @ w.bfloat16()) and (x + 1).dtype == torch.float32
    for name in ("float32", "tf32"):
        with autocast(name, CPU):
            assert torch.equal(x @ w, torch.matmul(x, w)) and (x @ w).dtype == torch.float32


def test_casts_of_weights_are_kept_on_a_gpu_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, cache_enabled: (kind, dtype, cache_enabled))
    found = [autocast("bf16", device, keeps_casts=keeps)[2] for device in (CPU, GPU) for keeps in (False, True)]
    assert found == [True, True, False, True]


def state():
    """All that `settings` may change: TF32 by both sets of names, cuDNN, attention, deterministic algorithms."""
    back, fills = torch.backends, torch.utils.deterministic
    newer = [each.fp32_precision for each in (back.cuda.matmul, back.cudnn.conv, back.cudnn.rnn, back.mkldnn.matmul)]
    return {
        "newer": newer,
        "product": torch.get_float32_matmul_precision(),
        "convolution": back.cudnn.allow_tf32,
        "cudnn": (back.cudnn.deterministic, back.cudnn.benchmark),
        "attention": (back.cuda.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "fills": fills.fill_uninitialized_memory,
    }


CUDNN_FIRST = int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("capability", [(8, 6), (9, 0), (10, 0)])
def test_a_gpu_is_set_up_and_left_as_it_was(gpu, monkeypatch, capability, name, deterministic, training):
    monkeypatch.setenv(CUBLAS, "")  # so that it is taken away afterwards
    monkeypatch.delenv(CUBLAS)
    before, device = state(), gpu(*capability)
    with pytest.raises(KeyError), settings(name, device, deterministic=deterministic, training=training):
        inside = state()
        assert (inside["product"], inside["convolution"]) == (("highest", False) if name == "float32" else ("high", True))
        assert inside["newer"][0] == ("ieee" if name == "float32" else "tf32")
        assert ("tf32" in inside["newer"][1:3]) == (name != "float32")
        assert inside["cudnn"] == (deterministic, training and not deterministic)
        assert inside["deterministic"] == (deterministic, False) and inside["fills"] == (not deterministic)
        enabled, order = inside["attention"]
        assert enabled == (not deterministic)
        assert (order[0] == CUDNN_FIRST) == (capability >= (9, 0) and training and not deterministic)
        import torch._inductor.config as compiler

        assert compiler.deterministic == deterministic
        raise KeyError
    assert state() == before and not compiler.deterministic


def test_a_cpu_is_left_alone():
    before = state()
    for name in ("float32", "bf16"):
        with settings(name, CPU, training=True):
            assert state() == before


def test_tf32_that_somebody_set_by_the_newer_names_is_back_afterwards(gpu):
    matmul, before = torch.backends.cuda.matmul, state()
    matmul.fp32_precision = "tf32"
    try:
        with settings("float32", gpu(9, 0)):
            assert state()["product"] == "highest" and matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"
    assert state()["newer"][0] == before["newer"][0]


def test_deterministic_on_a_cpu(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = state()
        with settings("float32", CPU, deterministic=True):
            assert state()["deterministic"] == (True, False)
            with pytest.raises(RuntimeError) as caught:
                torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert precision.os.environ[CUBLAS] == ":16:8"  # the user's own
    message = str(not_deterministic(caught.value))
    assert (
        message.startswith("deterministic: put_ has no deterministic form here; --set deterministic=false")
        and "\n" not in message
    )


def test_the_variable_of_cublas(monkeypatch):
    monkeypatch.setenv(CUBLAS, "")  # so that it is taken away afterwards
    monkeypatch.delenv(CUBLAS)
    with settings("float32", CPU, deterministic=True):
        pass
    assert precision.os.environ[CUBLAS] == ":4096:8"
    monkeypatch.setenv(CUBLAS, ":0:0")
    said = RuntimeError("Deterministic behavior was enabled … set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    assert "CUBLAS_WORKSPACE_CONFIG is :0:0; unset it, or set it to :4096:8" in str(not_deterministic(said))


def test_other_errors_are_not_about_determinism():
    assert not_deterministic(RuntimeError("shapes do not fit")) is None


def test_the_note_on_another_precision():
    assert note_on_precision("p.json was made", "bf16", "bf16") == []
    (note,) = note_on_precision("p.json was made", "bf16", "float32")
    assert note.startswith("p.json was made in bf16, and this computes in float32") and note.endswith("--precision bf16")
    assert note_on_precision("p.json was made", "tf32", "float32")[0].endswith("--precision tf32 on a GPU")
