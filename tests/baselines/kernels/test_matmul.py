"""Products with frozen weights by oneDNN, against torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from baselines.kernels.matmul import ENOUGH, FROZEN_LINEAR, FrozenProducts

K, N = 96, 1024
assert K * N >= ENOUGH
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).requires_grad_(False)


def is_ours(x):
    return x.grad_fn is not None and x.grad_fn.name() == FROZEN_LINEAR


@pytest.mark.parametrize("shape", [(1, K), (5, K), (2, 3, K), (2, 1, 3, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_torch(shape, bias):
    frozen = layer(bias)
    x = torch.randn(shape, requires_grad=True)
    expected = frozen(x)
    upstream = torch.randn(expected.shape)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    with FrozenProducts():
        actual = frozen(x)
    (ours,) = torch.autograd.grad(actual, x, upstream)
    assert is_ours(actual)
    assert not is_ours(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_inputs_and_gradients_that_are_not_contiguous():
    frozen = layer()
    x = torch.randn(K, 7, requires_grad=True)
    upstream = torch.randn(N, 7).t()
    (wanted,) = torch.autograd.grad(frozen(x.t()), x, upstream)
    with FrozenProducts():
        actual = frozen(x.t())
    (ours,) = torch.autograd.grad(actual, x, upstream)
    assert is_ours(actual)
    torch.testing.assert_close(actual, frozen(x.t()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_what_else_linear_can_do_is_left_to_torch():
    x = torch.randn(5, K, requires_grad=True)
    trained, half = layer().requires_grad_(), layer().bfloat16()
    biased = layer()
    biased.bias.requires_grad_()
    with FrozenProducts():
        assert not is_ours(trained(x))
        assert not is_ours(biased(x))
        assert not is_ours(half(x.bfloat16()))
        assert not is_ours(layer()(x.detach()))
        assert not is_ours(layer()(x[:0]))
        assert not is_ours(functional.linear(x, torch.randn(3, K)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer()(x).dtype == torch.bfloat16
        with torch.no_grad():
            layer()(x)
    trained(x).sum().backward()
    assert trained.weight.grad is not None


def test_they_are_counted():
    x = torch.randn(2, 3, K, requires_grad=True)
    counted = []
    for context in (torch.enable_grad(), FrozenProducts()):
        with FlopCounterMode(display=False) as counter, context:
            layer()(x).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted == [2 * 2 * 6 * K * N] * 2
