"""SDN's pooling against a loop over windows and the library's own gradient, in every layout it may meet."""

from itertools import product

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from eectl.models import pooling
from eectl.models.pooling import mix_pools, pool_grid

SIZES = [(28, 28), (14, 14), (7, 7), (4, 4), (3, 2), (1, 1), (5, 9)]
ADDS_UP = ("scatter", "index_add", "index_put", "put_", "pool2d_backward", "pool2d_with_indices_backward")


def leaf(*shape, channels_last=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


def library(x):
    """The two pools as torch has them."""
    return torch.cat([functional.adaptive_max_pool2d(x, 4), functional.adaptive_avg_pool2d(x, 4)], dim=1)


def gradients(x):
    """A random gradient of the pools, the places of the maxima, and the map's gradient by torch's own backward pass."""
    pooled = library(x)
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    _, places = functional.adaptive_max_pool2d(x, 4, return_indices=True)
    return grad, places, torch.autograd.grad(pooled, x, grad)[0]


@pytest.mark.parametrize("size", SIZES)
def test_maxima_and_means_of_windows(size):
    x = leaf(2, 3, *size)
    expected = torch.empty(2, 6, 4, 4)
    for i in range(4):
        for j in range(4):
            rows, columns = (slice(n * s // 4, -(-(n + 1) * s // 4)) for n, s in zip((i, j), size, strict=True))
            window = x.detach()[:, :, rows, columns]
            expected[:, :3, i, j], expected[:, 3:, i, j] = window.amax((2, 3)), window.mean((2, 3))
    torch.testing.assert_close(pool_grid(x).detach(), expected)
    torch.testing.assert_close(pool_grid(x.detach()), expected)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("height", [*range(1, 10), 12, 33])
def test_values_and_gradient_are_the_librarys_at_every_size(height, channels_last):
    for width in (*range(1, 10), 12, 33):
        x = leaf(2, 3, height, width, channels_last=channels_last)
        grad, _, expected = gradients(x)
        pooled = pool_grid(x)
        assert torch.equal(pooled[:, :3], library(x)[:, :3]) and torch.equal(pooled, pool_grid(x.detach()))
        torch.testing.assert_close(pooled, library(x))
        (found,) = torch.autograd.grad(pooled, x, grad)
        torch.testing.assert_close(found, expected)
        if (height, width) != (4, 4):  # which are added up as they come
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", product((1, 2, 3, 5, 6, 7, 8, 14, 16), repeat=2))
def test_what_runs_off_the_cpu_gives_the_same_gradient(size):
    for channels_last in (True, False):
        x = leaf(2, 3, *size, channels_last=channels_last)
        grad, places, expected = gradients(x)
        found = [pooling._spread_shared(*grad.chunk(2, dim=1), places, size)]
        if size[0] % 4 == size[1] % 4 == 0:
            found.append(pooling._spread_even(*grad.chunk(2, dim=1), places, size, channels_last))
        for each in found:
            torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("size", [(8, 8), (14, 7), (2, 2)])
def test_nothing_is_added_up_in_chance_order_off_the_cpu(size):
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = leaf(2, 3, *size).detach().to("meta").requires_grad_()
    with Names():
        pool_grid(x).sum().backward()
    assert x.grad.shape == x.shape and "aten.where.self" in names
    assert not [name for name in names if any(word in name for word in ADDS_UP) or "_local_scalar_dense" in name]


@pytest.mark.parametrize("size", [(8, 8), (6, 5), (2, 1)])
def test_of_equal_maxima_the_first_gets_the_gradient(size):
    x = torch.zeros(1, 1, *size, requires_grad=True)
    grad = torch.zeros(1, 2, 4, 4)
    grad[:, :1] = 1.0
    (found,) = torch.autograd.grad(pool_grid(x), x, grad)
    expected = torch.zeros(size)
    for i in range(4):
        for j in range(4):
            expected[i * size[0] // 4, j * size[1] // 4] += 1
    assert torch.equal(found[0, 0], expected)
    _, places = functional.adaptive_max_pool2d(x, 4, return_indices=True)
    assert torch.equal(pooling._spread_shared(*grad.chunk(2, dim=1), places, size)[0, 0], expected)


@pytest.mark.parametrize("size", [(7, 6), (8, 8), (2, 3), (1, 1), (4, 4)])
def test_it_can_be_differentiated_again(size):
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)  # not rectified: a step must change no maximum
    assert torch.autograd.gradcheck(pool_grid, (x,))
    assert torch.autograd.gradgradcheck(pool_grid, (x,))


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (3, 3)])
def test_bf16_rounds_once(size):
    x = leaf(2, 3, *size).detach().bfloat16().requires_grad_()
    grad, places, _ = gradients(x)
    precise = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(library(precise), precise, grad.double())
    (found,) = torch.autograd.grad(pool_grid(x), x, grad)
    off_cpu = pooling._spread_shared(*grad.chunk(2, dim=1), places, size)
    assert found.dtype == off_cpu.dtype == torch.bfloat16
    for each in (found, off_cpu):
        torch.testing.assert_close(each.double(), expected, rtol=2**-8, atol=1e-6)


def test_compiled_it_gives_the_same():
    torch._dynamo.reset()
    x = leaf(2, 3, 7, 8)
    grad, _, expected = gradients(x)
    for function in (pool_grid, lambda x: pooling._Pool.apply(x)):  # the second is what is compiled off the CPU
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x, grad)[0], expected)


def test_the_mix_is_of_maxima_and_means():
    pooled = torch.cat([torch.full((1, 2, 4, 4), 3.0), torch.full((1, 2, 4, 4), 1.0)], dim=1)
    assert torch.equal(mix_pools(pooled, torch.tensor(0.25)), torch.full((1, 32), 1.5))
