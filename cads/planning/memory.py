"""Peak memory in closed form: weights, gradients, optimizer state, and what is kept for the backward pass.

Nothing is added for fragmentation, the temporary tensors of a kernel, or data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from cads.accounting.architectures import Architecture
from cads.accounting.costs import Workload
from cads.accounting.measured import PROBE_SIZE
from cads.accounting.transformer import Transformer, read_transformer, trainable_size
from cads.data.batch import Batch
from cads.errors import ConfigError
from cads.training.learners import can_stack

OPTIMIZER_STATES = {"adamw": 2, "sgd": 1}
"""Numbers kept for each trainable parameter."""
HALF, SINGLE = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(task: Workload, models: int = 1) -> Memory:
    """Training `models` of a task from common weights: batched where they are dense, else one by one.

    One by one all of them are kept, and only one has gradients, optimizer state and activations; batched, the
    weights stand twice.
    """
    model, recipe = task.costs.model, task.recipe
    size = next(p.element_size() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = trainable_size(model) * size
    batched = models > 1 and recipe.replicas != "loop" and can_stack(model)
    at_once = models if batched else 1
    piece = -(-recipe.batch_size // recipe.accumulate)
    return Memory(
        weights=weights * models * (1 + batched),
        gradients=trained * at_once,
        optimizer=trained * at_once * OPTIMIZER_STATES[recipe.optimizer],
        activations=_activations(task, model) * piece * at_once,
    )


def forward_memory(task: Workload) -> Memory:
    """Weights, and the activations of one example, as if all were kept."""
    model = task.costs.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory(weights=weights, activations=_activations(task, model))


def _activations(task: Workload, model: nn.Module) -> float:
    """Bytes that one example leaves for the backward pass."""
    batch = task.pool.batch(np.zeros(1, dtype=np.int64))
    half = task.recipe.precision != "no" or next(model.parameters()).element_size() == HALF
    number = HALF if half else SINGLE
    transformer = _transformer(model)
    if transformer is None:
        return _outputs(task, model, batch) * number
    length = batch.inputs["input_ids"].shape[-1]
    architecture, layers = transformer.architecture, transformer.architecture.layers
    layer = layer_values(architecture, length, fused=transformer.fused)
    # Checkpointing keeps the input of each layer, and one layer at a time while it is recomputed.
    kept = layers * layer if transformer.checkpointing is None else layers * architecture.hidden * length + layer
    logits = length * sum(x.n_out for x in architecture.head_linears)
    # The loss is taken in single precision, and keeps the logarithms of the probabilities.
    return kept * number + logits * (number + SINGLE)


def layer_values(architecture: Architecture, length: int, *, fused: bool = False) -> float:
    """Numbers that a layer keeps of a sequence of T positions.

    `T (4h + 2Hd + 2 H_kv d + c I)`: the inputs of both norms and of what follows them, queries and the input of
    the output projection, keys and values, and the MLP's c = 4 (gated) or 2 inner tensors; and `H T^2`
    probabilities, unless the kernel recomputes them. It holds within 15 % for Llama and Qwen; GPT-2 keeps up to
    twice as much, for dropout and for its activation, which it computes step by step.
    """
    a = architecture
    inner = (4 if a.gated else 2) * a.intermediate
    position = 4 * a.hidden + 2 * a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim + inner
    return length * position + (0 if fused else a.heads * length**2)


def _transformer(model: nn.Module) -> Transformer | None:
    try:
        return read_transformer(model)
    except ConfigError:
        return None


def _outputs(task: Workload, model: nn.Module, batch: Batch) -> float:
    """Numbers that the innermost modules put out for one example."""
    skeleton = copy.deepcopy(model).to("meta").train()
    total = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    for module in skeleton.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(add)
    task.losses(skeleton, batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0)).to("meta"))
    return total / PROBE_SIZE
