"""Kernels that do products inside and that PyTorch does not count: formulas for some, and the names of the others."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Formula = Callable[..., int]

PRODUCTS = (
    *("rnn", "lstm", "gru", "attention", "transformer_encoder", "mm", "matmul", "linear", "conv", "trilinear"),
    *("cdist", "pdist", "fft", "solve", "cholesky", "svd", "qr", "eig", "eigh", "inverse", "inv", "lu", "lstsq"),
    *("det", "slogdet", "pinv", "matrix_exp", "householder_product", "dot", "vdot", "mv", "addmv", "addr", "ger"),
)
"""Words in the names of operations that do products."""
ELEMENTWISE = ("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
"""Names that begin so have such a word, and do none: the products of a cell are counted by themselves."""
OWN_NAMESPACES = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "inductor", "torchvision")
"""Of operations whose names say what they do; all others are somebody's own kernels."""


def kernel_mapping() -> dict[Any, Formula]:
    """Formulas for kernels of the CPU that PyTorch (2.14) counts as 0."""
    aten = torch.ops.aten
    return {
        aten.mkldnn_rnn_layer: _recurrent_flops,
        aten.mkldnn_rnn_layer_backward: _recurrent_backward_flops,
        aten._trilinear: _trilinear_flops,
        aten.mv: _matrix_vector_flops,
        aten.addmv: _added_matrix_vector_flops,
        aten.dot: _dot_flops,
        aten.vdot: _dot_flops,
        aten._cdist_forward: _distance_flops,
        aten._cdist_backward: _distance_backward_flops,
        aten._euclidean_dist: _euclidean_flops,
    }


def _recurrent_flops(x: Any, w_input: Any, w_hidden: Any, *args: Any, **kwargs: Any) -> int:
    """One layer of an LSTM, in one direction: both matrix products at each of the T steps (x: T, B, D)."""
    return int(2 * prod(x[:-1]) * (prod(w_input) + prod(w_hidden)))


def _recurrent_backward_flops(x: Any, w_input: Any, w_hidden: Any, *args: Any, **kwargs: Any) -> int:
    """The kernel computes the gradients of inputs and of weights, each at the cost of the forward pass."""
    return 2 * _recurrent_flops(x, w_input, w_hidden)


def _trilinear_flops(a: Any, b: Any, c: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`sum_ij x_i W_kij y_j` and its gradients: two products in turn, of which the larger one decides.

    The tensor that holds most numbers is multiplied once for each example: B K I J with a factor of 2.
    """
    examples = max(a[0] if len(a) == 2 else 1, c[0] if len(c) == 2 else 1)
    weight = max((a, b, c, out_shape or ()), key=prod)
    return int(2 * examples * prod(weight))


def _matrix_vector_flops(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * prod(matrix))


def _added_matrix_vector_flops(added: Any, matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * prod(matrix))


def _dot_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * prod(a))


def _distance_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Differences, powers and their sums of all pairs: 3 for each coordinate (a: ..., P, D; b: ..., R, D)."""
    return int(3 * prod(a) * b[-2])


def _distance_backward_flops(grad: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return _distance_flops(a, b)


def _euclidean_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Distances of many points, by one matrix product."""
    return int(2 * prod(a) * b[-2])


class UncountedOperations(TorchDispatchMode):
    """Notices the operations that run while it is active, and do products that no formula counts.

    Args:
        counted: the operations that have a formula.
    """

    def __init__(self, counted: set[Any]) -> None:
        super().__init__()
        self._counted = counted
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in self._counted and _does_products(str(packet)):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def _does_products(name: str) -> bool:
    """Whether an operation, such as `aten.linalg_solve`, is one whose products matter, by its name."""
    namespace, _, operation = name.partition(".")
    if namespace not in OWN_NAMESPACES:
        return True
    if operation.startswith(ELEMENTWISE):
        return False
    words = operation.split("_")
    return any(word in words or f"_{word}_" in f"_{operation}_" for word in PRODUCTS)
