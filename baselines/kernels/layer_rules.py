"""Per-example gradients of one layer's parameters, from its inputs and the gradient of its outputs, in batches.

For a linear layer `y_t = W a_t + b` the gradients of example i are `sum_t g_t a_t^T` and `sum_t g_t`, over the
positions t of that example (Goodfellow 2015, arXiv 1510.01799). The rules of other layers are analogous.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ParameterGradients = dict[str, Tensor]
"""The gradients of b examples, by the parameter's name within its layer, each of shape (b, *shape)."""
Rule = Callable[[Any, Tensor, Tensor], ParameterGradients]
"""(layer, inputs (b, ...), gradient of the outputs (b, ...)) -> gradients of its parameters."""


def linear(layer: nn.Linear, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, ..., n_in), outputs (b, ..., n_out)."""
    a, g = _sequences(a), _sequences(g)
    return _with_bias(layer, {"weight": torch.bmm(g.mT, a)}, g)


def transposed_linear(layer: nn.Module, a: Tensor, g: Tensor) -> ParameterGradients:
    """The linear layer of GPT-2, whose weight has shape (n_in, n_out)."""
    a, g = _sequences(a), _sequences(g)
    return _with_bias(layer, {"weight": torch.bmm(a.mT, g)}, g)


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, C_in, *size), outputs (b, C_out, *size)."""

    def one_example(a: Tensor, g: Tensor) -> Tensor:
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
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
        return gradients[1]

    weight = torch.func.vmap(one_example)(a, g)
    return _with_bias(layer, {"weight": weight}, g.flatten(2).mT)


def embedding(layer: nn.Embedding, a: Tensor, g: Tensor) -> ParameterGradients:
    """Inputs (b, ...) are indices, outputs (b, ..., width)."""
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
    """The rule that computes the gradients of `layer`, or None if there is none.

    A subclass of a type in `RULES` has the rule of that type if it does not override `forward`.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return convolution if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else None
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return batch_norm if layer.track_running_stats else None
    for layer_type, rule in RULES.items():
        if isinstance(layer, layer_type) and type(layer).forward is layer_type.forward:
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
    """Reshape (b, ..., n) to (b, T, n), T >= 1."""
    return x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1])


def _with_bias(layer: nn.Module, gradients: ParameterGradients, g: Tensor) -> ParameterGradients:
    """Add the gradient of the bias, for outputs as sequences (b, T, n_out)."""
    if getattr(layer, "bias", None) is not None:
        gradients["bias"] = g.sum(dim=1)
    return gradients


def _scale(layer: nn.Module, normal: Tensor, g: Tensor, shape: tuple[int, ...] | torch.Size) -> ParameterGradients:
    """`y = weight * normal + bias` with parameters of `shape`, the last dimensions.

    Autograd still needs `g` for earlier layers, and receivers may change gradients in place: the bias gets a copy.
    """
    inner_dims = range(1, g.dim() - len(shape))
    gradients = {"weight": (g * normal).sum(dim=tuple(inner_dims)) if inner_dims else g * normal}
    if getattr(layer, "bias", None) is not None:
        gradients["bias"] = g.sum(dim=tuple(inner_dims)) if inner_dims else g.clone()
    return gradients


def _channels(layer: nn.Module, normal: Tensor, g: Tensor) -> ParameterGradients:
    """`y = weight * normal + bias` with one weight and bias per channel, the second dimension."""
    gradients = {"weight": (g * normal).flatten(2).sum(dim=2) if g.dim() > 2 else g * normal}
    if getattr(layer, "bias", None) is not None:
        gradients["bias"] = g.flatten(2).sum(dim=2) if g.dim() > 2 else g.clone()
    return gradients
