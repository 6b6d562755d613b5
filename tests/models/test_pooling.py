"""SDN's pooling against a loop over windows and the library's own gradient, in every layout it may meet."""

import pytest
import torch
from torch.nn import functional

from eectl.models import pooling
from eectl.models.pooling import mix_pools, pool_grid

SIZES = [(28, 28), (14, 14), (7, 7), (4, 4), (3, 2), (1, 1), (5, 9)]


def leaf(*shape, channels_last=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


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


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_the_librarys(size):
    x, weights = leaf(3, 5, *size), torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    ours = pooling._means(x)
    assert "_Means" in type(ours.grad_fn).__name__
    assert torch.equal(ours, functional.adaptive_avg_pool2d(x, 4))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
    plain = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad((functional.adaptive_avg_pool2d(plain, 4) * weights).sum(), plain)
    torch.testing.assert_close(gradient, expected)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_it_can_be_differentiated_again():
    x = leaf(2, 3, 7, 6).double().requires_grad_()
    assert torch.autograd.gradgradcheck(pooling._Means.apply, (x,))


def test_other_layouts_and_passes_without_a_graph_are_the_librarys():
    for x in (leaf(2, 3, 8, 8, channels_last=False), leaf(2, 3, 8, 8).double(), leaf(2, 3, 8, 8).bfloat16()):
        assert "_Means" not in type(pooling._means(x).grad_fn).__name__
    with torch.no_grad():
        assert pooling._means(leaf(2, 3, 8, 8)).grad_fn is None


def test_the_mix_is_of_maxima_and_means():
    pooled = torch.cat([torch.full((1, 2, 4, 4), 3.0), torch.full((1, 2, 4, 4), 1.0)], dim=1)
    assert torch.equal(mix_pools(pooled, torch.tensor(0.25)), torch.full((1, 32), 1.5))
