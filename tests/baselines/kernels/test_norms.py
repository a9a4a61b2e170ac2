"""The norm of Llama in few passes, against autograd through transformers' own."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from baselines.kernels.layer_rules import rule_of, transformers_rms_norm
from baselines.kernels.norms import frozen_norms, normalized, short_norms

PLAIN = LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm


def frozen(kind, width=12, eps=1e-3):
    torch.manual_seed(0)
    norm = kind(width, eps=eps)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("kind", PLAIN)
def test_it_is_the_norm_and_its_gradient(kind):
    norm = frozen(kind)
    x = torch.randn(3, 5, 12).requires_grad_()
    upstream = torch.randn(3, 5, 12)
    expected = norm(x)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    with short_norms(frozen_norms(nn.ModuleList([norm])), torch.float32):
        actual = norm(x)
        assert "_RmsNorm" in type(actual.grad_fn).__name__
    (ours,) = torch.autograd.grad(actual, x, upstream)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_its_gradient_is_that_of_differences():
    weight = torch.rand(4, dtype=torch.float32) + 0.5
    x = torch.tensor([[0.3, -1.2, 2.0, 0.1]], requires_grad=True)
    for i in range(4):
        (gradient,) = torch.autograd.grad(normalized(x, weight, 1e-5)[0, i], x)
        for j in range(4):
            step = torch.zeros(1, 4).index_fill_(1, torch.tensor([j]), 1e-2)
            with torch.no_grad():
                slope = (normalized(x + step, weight, 1e-5) - normalized(x - step, weight, 1e-5))[0, i] / 2e-2
            assert float(gradient[0, j]) == pytest.approx(float(slope), abs=1e-3)


def test_in_bfloat16_it_is_rounded_once():
    norm = frozen(LlamaRMSNorm)
    x = torch.randn(3, 5, 12).requires_grad_()
    with short_norms([norm], torch.bfloat16):
        actual = norm(x)
    assert torch.equal(actual, norm(x).to(torch.bfloat16))
    (gradient,) = torch.autograd.grad(actual.float().square().sum(), x)
    (wanted,) = torch.autograd.grad(norm(x).square().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=0.01 * float(wanted.abs().max()))


def trained():
    return frozen(LlamaRMSNorm).requires_grad_()


def halved():
    return frozen(LlamaRMSNorm).to(torch.bfloat16)


def wrapped():
    norm = frozen(LlamaRMSNorm)
    norm.forward = norm.forward
    return norm


class OtherRMSNorm(LlamaRMSNorm):
    """Its eps has a name of its own."""

    __module__ = "transformers.models.other"

    def __init__(self, width, eps):
        super().__init__(width, eps)
        del self.variance_epsilon
        self.epsilon = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


class TwiceRMSNorm(OtherRMSNorm):
    """It has the usual name for what is not its eps."""

    __module__ = OtherRMSNorm.__module__

    def __init__(self, width, eps):
        super().__init__(width, 2 * eps)
        self.variance_epsilon = eps


@pytest.mark.parametrize(
    ("kind", "eps", "known"),
    [(kind, eps, True) for kind in PLAIN for eps in (1e-12, 1e-6)]
    + [(OtherRMSNorm, 1e-12, False), (OtherRMSNorm, 1e-6, False), (TwiceRMSNorm, 1e-6, False)],
)
def test_a_norm_is_known_by_its_eps(kind, eps, known):
    assert rule_of(norm := frozen(kind, eps=eps)) is transformers_rms_norm
    assert frozen_norms(norm) == [norm] * known


@pytest.mark.parametrize("make", [lambda: frozen(GemmaRMSNorm), trained, halved, wrapped, lambda: nn.RMSNorm(12)])
def test_what_computes_something_else_is_left_alone(make):
    assert frozen_norms(make()) == []


def test_norms_are_as_they_were_when_a_pass_fails():
    norm = frozen(LlamaRMSNorm)
    with pytest.raises(RuntimeError, match="failed"), short_norms([norm], torch.float32):
        raise RuntimeError("the pass failed")
    assert "forward" not in vars(norm)


def test_blocks_within_blocks_leave_what_was_there():
    norm, x = frozen(LlamaRMSNorm), torch.randn(3, 12)
    with short_norms([norm], torch.bfloat16):
        for fails in (False, True):
            try:
                with short_norms([norm, norm], torch.float32):
                    assert norm(x).dtype == torch.float32
                    if fails:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert fails
            assert norm(x).dtype == torch.bfloat16
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_another_type_are_left_to_the_norm(dtype):
    norm, x = frozen(LlamaRMSNorm), torch.randn(3, 12, dtype=dtype)
    expected = norm(x)
    with short_norms([norm], torch.float32):
        actual = norm(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 12, requires_grad=True)
    (first,) = torch.autograd.grad(normalized(x, torch.ones(12), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
