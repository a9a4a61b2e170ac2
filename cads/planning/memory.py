"""Peak memory in closed form: weights, gradients, optimizer state, and activations for the backward pass.

Activations are those of the longest examples. Fragmentation, temporary tensors of kernels, and data are not counted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.architectures import Architecture
from cads.accounting.costs import Workload
from cads.accounting.measured import PROBE_SIZE
from cads.accounting.transformer import Transformer, read_transformer, trainable_size
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.errors import ConfigError
from cads.training.learners import can_stack

OPTIMIZER_STATES = {"adamw": 2, "sgd": 1}
"""Numbers stored for each trainable parameter."""
KEPT_COPIES = 1.5
"""Copies of trained weights and optimizer state while they are kept and written: one, and half of one more."""
HALF, SINGLE = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(task: Workload, models: int = 1) -> Memory:
    """Training of `models` replicas of a task's model from common weights: batched if it is dense, else one by one.

    Trained one by one, all replicas have weights, and only one has gradients, optimizer state and activations. Batched
    replicas need the weights twice.
    """
    model, recipe = task.costs.model, task.recipe
    size = next(p.element_size() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = trainable_size(model) * size
    batched = models > 1 and recipe.replicas != "loop" and can_stack(model)
    concurrent = models if batched else 1
    micro_batch = -(-recipe.batch_size // recipe.accumulate)
    return Memory(
        weights=weights * models * (1 + batched),
        gradients=trained * concurrent,
        optimizer=trained * concurrent * OPTIMIZER_STATES[recipe.optimizer],
        activations=_activations(task, model) * micro_batch * concurrent,
    )


def kept_memory(task: Workload) -> float:
    """Bytes of a finished training that is kept and written: its weights and optimizer state, copied."""
    memory = training_memory(task)
    return KEPT_COPIES * (memory.gradients + memory.optimizer)


def forward_memory(task: Workload) -> Memory:
    """Weights and the activations of the longest example, as if all activations were stored."""
    model = task.costs.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory(weights=weights, activations=_activations(task, model))


def _activations(task: Workload, model: nn.Module) -> float:
    """Bytes that one example stores for the backward pass, if it is as long as the longest of the pool."""
    batch = largest(task.pool)
    half = task.recipe.precision != "no" or next(model.parameters()).element_size() == HALF
    n_bytes = HALF if half else SINGLE
    transformer = _transformer(model)
    if transformer is None:
        return _outputs(task, model, batch) * n_bytes
    # Where the loss is on answers alone, the head computes only their positions.
    length = batch.inputs["input_ids"].shape[-1]
    answers = batch.inputs.get("answers")
    architecture, layers = transformer.architecture, transformer.architecture.layers
    layer = layer_values(architecture, length, fused=transformer.fused)
    # Checkpointing stores the input of each layer, and all values of the one layer that is recomputed.
    values = layers * layer if transformer.checkpointing is None else layers * architecture.hidden * length + layer
    logits = (length if answers is None else answers.shape[-1]) * sum(x.n_out for x in architecture.head_linears)
    # The loss is computed in single precision: the logarithms of the probabilities, and their gradient.
    return values * n_bytes + logits * (n_bytes + 2 * SINGLE)


def largest(pool: Pool) -> Batch:
    """A batch of the example of a pool that has the most input values."""
    own = lengths(pool)
    if own is not None:
        return pool.batch(np.array([int(own.argmax())]))
    representatives, _ = pool.examples.shapes()
    batches = [pool.batch(np.array([position])) for position in representatives]
    return max(batches, key=lambda batch: sum(x.numel() for x in batch.inputs.values()))


def layer_values(architecture: Architecture, length: int, *, fused: bool = False) -> float:
    """Numbers that a layer stores for the backward pass of a sequence of T positions.

    `T (4h + 2Hd + 2 H_kv d + c I)`: the inputs of both norms and of the blocks after them (4h), the queries and the
    input of the output projection (2Hd), keys and values (2 H_kv d), and the c = 4 (gated) or 2 inner tensors of the
    MLP. `H T^2` probabilities come on top, unless the kernel recomputes them (`fused`). The formula holds within 15 %
    for Llama and Qwen. GPT-2 stores up to twice as much, because of dropout and of an activation in several steps.
    """
    a = architecture
    inner = (4 if a.gated else 2) * a.intermediate
    per_position = 4 * a.hidden + 2 * a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim + inner
    return length * per_position + (0 if fused else a.heads * length**2)


def _transformer(model: nn.Module) -> Transformer | None:
    """The architecture of a model; None if it is no known transformer."""
    try:
        return read_transformer(model)
    except ConfigError:
        return None


def _outputs(task: Workload, model: nn.Module, batch: Batch) -> float:
    """Numbers in the outputs of the innermost modules for one example."""
    probe = batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))
    try:
        # Meta tensors: shapes without data or memory.
        return _outputs_on(task, copy.deepcopy(model).to("meta"), probe.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        # A model that looks at values has none on the meta device.
        with torch.no_grad():
            return _outputs_on(task, copy.deepcopy(model), probe)


def _outputs_on(task: Workload, model: nn.Module, probe: Batch) -> float:
    total = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    for module in model.train().modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(add)
    task.losses(model, probe)
    return total / PROBE_SIZE
