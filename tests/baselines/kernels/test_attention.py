"""Attention over few positions, against torch's own in float64."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from baselines.kernels.attention import SHORT, ShortAttention, attend

SEEN = torch.ones(7, 7, dtype=torch.bool).tril()
HALF = torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)


def inputs(heads=4, length=7, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (2, 4, length, 16), (2, heads, length, 16), (2, heads, length, 16)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (4, {}),
        (4, {"is_causal": True}),
        (4, {"attn_mask": SEEN, "scale": 0.5}),
        (4, {"attn_mask": HALF}),
        (2, {"attn_mask": SEEN.expand(2, 1, 7, 7), "enable_gqa": True}),
    ],
)
@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_it_is_torchs_attention(heads, options, dtype, off):
    exact = {n: x.double() if n == "attn_mask" and x.dtype != torch.bool else x for n, x in options.items()}
    expected = scaled_dot_product_attention(*(given := inputs(heads)), **exact)
    actual = attend(*(halved := inputs(heads)), **options, dtype=dtype)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, upstream)
    ours = torch.autograd.grad(actual, halved, upstream.to(dtype))
    assert actual.dtype == dtype
    for a, b in zip([expected, *wanted], [actual, *ours], strict=True):
        assert a.shape == b.shape
        assert float(cosine_similarity(a.detach().flatten(), b.detach().double().flatten(), dim=0)) > 0.9998
        torch.testing.assert_close(b.double(), a, rtol=off, atol=off * float(a.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_sees_nothing_is_finite(dtype):
    mask = SEEN.clone()
    mask[0] = False
    given = inputs()
    result = attend(*given, attn_mask=mask if dtype == torch.bool else torch.where(mask, 0.0, -torch.inf))
    gradients = torch.autograd.grad(result.float().square().sum(), given)
    assert all(x.isfinite().all() for x in (result, *gradients))


@pytest.mark.parametrize(
    ("length", "options"), [(SHORT, {}), (7, {"dropout_p": 0.5}), (7, {"attn_mask": HALF.clone().requires_grad_()})]
)
def test_what_it_does_not_do_is_left_to_torch(length, options):
    given = inputs(length=length, dtype=torch.float32)
    torch.manual_seed(1)
    expected = scaled_dot_product_attention(*given, **options)
    torch.manual_seed(1)
    with ShortAttention(torch.bfloat16):
        assert torch.equal(scaled_dot_product_attention(*given, **options), expected)


def test_without_gradients_torchs_own_is_used():
    given = inputs(dtype=torch.float32)
    with ShortAttention(torch.bfloat16), torch.no_grad():
        assert scaled_dot_product_attention(*given).dtype == torch.float32
    with ShortAttention(torch.bfloat16):
        assert scaled_dot_product_attention(*given).dtype == torch.bfloat16
    given = inputs(dtype=torch.float64)
    with ShortAttention(torch.float32):
        assert scaled_dot_product_attention(*given).dtype == torch.float64


def test_a_second_derivative_is_refused():
    given = inputs()
    first = torch.autograd.grad(attend(*given).float().square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()
