"""What one layer's parameters owe to each example: from its inputs and the gradient of its output, in batches.

For a linear layer `y_t = W a_t + b` the gradient of example i is `sum_t g_t a_t^T` and `sum_t g_t`, over its own
positions t (Goodfellow 2015, arXiv 1510.01799); the other layers are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ParameterGradients = dict[str, Tensor]
"""The gradients of b examples by the name of the parameter within its layer, each of shape (b, *shape)."""
Rule = Callable[[Any, Tensor, Tensor], ParameterGradients]
"""(layer, inputs (b, ...), gradient of the outputs (b, ...)) -> gradients of its parameters."""


def linear(layer: nn.Linear, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, ..., n_in), outputs (b, ..., n_out)."""
    a, g = _sequences(a), _sequences(g)
    return _with_bias(layer, {"weight": torch.bmm(g.mT, a)}, g)


def transposed_linear(layer: nn.Module, a: Tensor, g: Tensor) -> ParameterGradients:
    """The linear of GPT-2, whose weight has shape (n_in, n_out)."""
    a, g = _sequences(a), _sequences(g)
    return _with_bias(layer, {"weight": torch.bmm(a.mT, g)}, g)


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, C_in, *size), outputs (b, C_out, *size)."""

    def one(a: Tensor, g: Tensor) -> Tensor:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g[None],
            a[None],
            layer.weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            [False, True, False],
        )
        return found[1]

    weight = torch.func.vmap(one)(a, g)
    return _with_bias(layer, {"weight": weight}, g.flatten(2).mT)


def embedding(layer: nn.Embedding, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, ...), indices; outputs (b, ..., width)."""
    b, width = len(a), layer.embedding_dim
    index, g = a.reshape(b, -1), g.reshape(b, -1, width)
    if layer.padding_idx is not None:
        g = g * (index != layer.padding_idx).unsqueeze(-1)
    weight = g.new_zeros(b * layer.num_embeddings, width)
    rows = index + torch.arange(b, device=index.device)[:, None] * layer.num_embeddings
    weight.index_add_(0, rows.flatten(), g.flatten(0, 1))
    return {"weight": weight.view(b, layer.num_embeddings, width)}


def layer_norm(layer: nn.LayerNorm, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs and outputs (b, ..., *normalized_shape)."""
    return _scale(layer, functional.layer_norm(a, layer.normalized_shape, eps=layer.eps), g, layer.normalized_shape)


def rms_norm(layer: nn.RMSNorm, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs and outputs (b, ..., *normalized_shape)."""
    return _scale(layer, functional.rms_norm(a, layer.normalized_shape, eps=layer.eps), g, layer.normalized_shape)


def transformers_rms_norm(layer: nn.Module, a: Tensor, g: Tensor) -> ParameterGradients:
    """The RMSNorm of Llama and its relatives: inputs and outputs (b, ..., width)."""
    eps: Any = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None)
    return _scale(layer, functional.rms_norm(a, (a.shape[-1],), eps=eps), g, a.shape[-1:])


def group_norm(layer: nn.GroupNorm, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs and outputs (b, C, ...)."""
    return _channels(layer, functional.group_norm(a, layer.num_groups, eps=layer.eps), g)


def batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, a: Tensor, g: Tensor) -> ParameterGradients:
    """In evaluation mode: inputs and outputs (b, C, ...)."""
    return _channels(
        layer, functional.batch_norm(a, layer.running_mean, layer.running_var, training=False, eps=layer.eps), g
    )


def rule_of(layer: nn.Module) -> Rule | None:
    """How to compute the gradients of `layer`, or None if that is not known.

    A subclass counts where it computes what its parent does.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return convolution if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else None
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return batch_norm if layer.track_running_stats else None
    for kind, rule in RULES.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return rule
    name = type(layer).__name__
    if type(layer).__module__.startswith("transformers.") and hasattr(layer, "weight"):
        if name == "Conv1D":
            return transposed_linear
        if name.endswith("RMSNorm"):
            return transformers_rms_norm
    return None


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
}


def _sequences(x: Tensor) -> Tensor:
    """(b, ..., n) as (b, T, n), T >= 1."""
    return x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1])


def _with_bias(layer: nn.Module, found: ParameterGradients, g: Tensor) -> ParameterGradients:
    """Add the bias's, for outputs as sequences (b, T, n_out)."""
    if getattr(layer, "bias", None) is not None:
        found["bias"] = g.sum(dim=1)
    return found


def _scale(layer: nn.Module, normal: Tensor, g: Tensor, shape: tuple[int, ...] | torch.Size) -> ParameterGradients:
    """`y = weight * normal + bias` with parameters of `shape`, the last dimensions.

    Autograd still needs `g` for earlier layers: what is handed out to be changed is a copy of it.
    """
    inner = range(1, g.dim() - len(shape))
    found = {"weight": (g * normal).sum(dim=tuple(inner)) if inner else g * normal}
    if getattr(layer, "bias", None) is not None:
        found["bias"] = g.sum(dim=tuple(inner)) if inner else g.clone()
    return found


def _channels(layer: nn.Module, normal: Tensor, g: Tensor) -> ParameterGradients:
    """`y = weight * normal + bias` with one weight and bias a channel, the second dimension."""
    found = {"weight": (g * normal).flatten(2).sum(dim=2) if g.dim() > 2 else g * normal}
    if getattr(layer, "bias", None) is not None:
        found["bias"] = g.flatten(2).sum(dim=2) if g.dim() > 2 else g.clone()
    return found
