"""Attention over few positions as plain products of matrices, where gradients are taken on a CPU.

The kernels of torch that keep no table of weights pay where there are many positions. For sentences the table is small:
forward and backward over 7 x 9 heads of 132 positions take 7.1 ms in float32, torch's kernel 9.6. Products of matrices
in bfloat16 are what a CPU with AMX is fast at: 5.3 ms, and torch's kernel 37 (torch 2.14, two cores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from baselines.kernels.override import Replaced

SHORT, SHORT_EXACT = 384, 192
"""Positions below which the table of weights is kept, in bfloat16 and in float32. In bfloat16 it is faster beyond too
(19 ms for 31 at 512), but the table grows with the square; in float32 it is level at 192, slower at 380 (45 for 33)."""
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class ShortAttention(Replaced):
    """In the block, `scaled_dot_product_attention` is `attend` where that is faster, and torch's own elsewhere.

    Args:
        dtype: of the products. Inputs of another type than this and float32 are left to torch.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(functional.scaled_dot_product_attention)
        self._dtype = dtype

    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `baselines.kernels.override.Replaced`."""
        given = {"dropout_p": 0.0, **dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        limit = SHORT if self._dtype == torch.bfloat16 else SHORT_EXACT
        if not torch.is_grad_enabled() or not _is_short(given, limit):
            return None
        if given["query"].dtype not in (torch.float32, self._dtype):
            return None
        del given["dropout_p"]
        return attend(**given, dtype=self._dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout.

    Args:
        query: (..., H, L, D). key, value: (..., H or fewer, S, D).
        attn_mask: of booleans, or to be added; broadcast to (..., H, L, S).
        is_causal: position i sees the first i + 1. scale: of the products; None for 1 / sqrt(D).
        enable_gqa: a head of key and value serves several of query.
        dtype: of the products.

    Returns:
        (..., H, L, D), of this type.
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = _added(attn_mask, dtype)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        attended: Tensor = _Attention.apply(query, key, value, attn_mask, scale)
    return attended


class _Attention(torch.autograd.Function):
    """softmax(scale * query key^T + mask) value, with the table kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        query = query * scale
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            scores += mask
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return weights @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, weights = ctx.saved_tensors
        of_weights = gradient @ value.transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_value = weights.transpose(-1, -2) @ gradient
        return (of_scores @ key).mul_(ctx.scale), of_scores.transpose(-1, -2) @ query, of_value, None, None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores. Never minus infinity: a row of padding may see nothing at all."""
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def _is_short(given: Mapping[str, Any], limit: int) -> bool:
    query: Tensor = given["query"]
    mask = given.get("attn_mask")
    return (
        query.device.type == "cpu"
        and max(query.shape[-2], given["key"].shape[-2]) < limit
        and not given["dropout_p"]
        and not (mask is not None and mask.requires_grad)
    )
