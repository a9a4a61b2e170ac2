"""Attention over few positions as plain matrix products, for gradients on a CPU.

Torch's kernels do not store the attention weights, which pays off for many positions. For sentences the weights are
small: forward and backward over 7 x 9 heads of 132 positions take 7.1 ms here in float32, and 9.6 ms with torch's
kernel. A CPU with AMX is fast at matrix products in bfloat16: 5.3 ms here, and 37 ms with torch's kernel (torch 2.14,
two cores).
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
"""Number of positions below which `attend` is used, in bfloat16 and in float32. In bfloat16 it is faster beyond too (19
ms against 31 at 512), but the stored weights grow with the square. In float32 it is level with torch at 192 and slower
at 380 (45 ms against 33)."""
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class ShortAttention(Replaced):
    """In the block, `scaled_dot_product_attention` is `attend` if that is faster, and torch's own otherwise.

    Args:
        dtype: type of the products. Inputs of a type other than this and float32 are left to torch.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(functional.scaled_dot_product_attention)
        self._dtype = dtype

    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `baselines.kernels.override.Replaced`."""
        arguments = {"dropout_p": 0.0, **dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        limit = SHORT if self._dtype == torch.bfloat16 else SHORT_EXACT
        if not torch.is_grad_enabled() or not _is_short(arguments, limit):
            return None
        if arguments["query"].dtype not in (torch.float32, self._dtype):
            return None
        del arguments["dropout_p"]
        return attend(**arguments, dtype=self._dtype)


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
        attn_mask: boolean, or added to the scores; broadcast to (..., H, L, S).
        is_causal: position i attends to the first i + 1. scale: factor of the scores; None for 1 / sqrt(D).
        enable_gqa: a head of key and value serves several heads of query.
        dtype: type of the products.

    Returns:
        (..., H, L, D), of type `dtype`.
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = _additive_mask(attn_mask, dtype)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        attended: Tensor = _Attention.apply(query, key, value, attn_mask, scale)
    return attended


class _Attention(torch.autograd.Function):
    """softmax(scale * query key^T + mask) value; the attention weights are stored for the backward pass."""

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
        grad_weights = gradient @ value.transpose(-1, -2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_value = weights.transpose(-1, -2) @ gradient
        return (grad_scores @ key).mul_(ctx.scale), grad_scores.transpose(-1, -2) @ query, grad_value, None, None


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to the scores. It has no minus infinity, since every position of a padded row may be masked."""
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def _is_short(arguments: Mapping[str, Any], limit: int) -> bool:
    query: Tensor = arguments["query"]
    mask = arguments.get("attn_mask")
    return (
        query.device.type == "cpu"
        and max(query.shape[-2], arguments["key"].shape[-2]) < limit
        and not arguments["dropout_p"]
        and not (mask is not None and mask.requires_grad)
    )
