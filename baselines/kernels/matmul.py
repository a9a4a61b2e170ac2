"""Products with frozen weights by oneDNN, where gradients are taken on a CPU in float32.

torch hands products of float32 to MKL. oneDNN computes them from the same memory a tenth faster, those of small layers
a fifth: 966 x 576 by 576 x 1,536 at 194 GFLOP/s for 170, by 576 x 192 at 185 for 154, and so it is on the way back, but
for a head of 49,152 words (159 for 182; torch 2.14, two cores of an AMD EPYC). They are two thirds and more of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from baselines.kernels.override import Replaced

ENOUGH = 2**16
"""Entries of a weight below which nothing is gained."""
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What `torch.compile` uses for frozen weights: (x, weight, bias, what follows, its scalars, its algorithm). It has no
gradient of its own."""

if _linear is not None:

    @register_flop_formula(_linear)
    def _linear_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
        """Of (..., K) by the transpose of (N, K)."""
        return 2 * prod(x) * weight[0]


class FrozenProducts(Replaced):
    """In the block, `linear` with a frozen weight is `frozen_linear`, where gradients go back to its input."""

    def __init__(self) -> None:
        super().__init__(functional.linear)

    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `baselines.kernels.override.Replaced`."""
        x, weight, bias = (*args, None, None)[:3]
        if kwargs or _linear is None or not torch.is_grad_enabled() or not _is_frozen(x, weight, bias):
            return None
        return None if torch.is_autocast_enabled(x.device.type) else frozen_linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; no gradient of weight and bias is computed.

    Args:
        x: (..., K), float32. weight: (N, K). bias: (N,).

    Returns:
        (..., N).
    """
    written: Tensor = _Linear.apply(x, weight, bias)
    return written


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # A view: oneDNN reads the weight either way.
        return _product(gradient, weight.t(), None), None, None


FROZEN_LINEAR = f"{_Linear.__name__}Backward"
"""What autograd calls it."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    written: Tensor = _linear(x, weight, bias, "none", [], "")
    return written


def _is_frozen(x: Any, weight: Any, bias: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.requires_grad
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() >= 2
        and x.numel() > 0
        and weight.numel() >= ENOUGH
    )
