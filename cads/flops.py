"""What one usage costs: FLOPs of forward and of forward+backward, counted once per shape and cached."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cads.errors import DataError

if TYPE_CHECKING:
    from cads.task import Batch, Pool, Shape, Task

PROBE_SIZE = 2
"""Examples in the batch that is counted: batch normalisation refuses to train on one."""

ADAMW_FLOPS = 15
"""Per parameter: decay 2, first moment 3, second moment 4, bias corrections 2, root, epsilon, division, update."""
SGD_FLOPS = 6
"""Per parameter: decay 2, momentum 2, update 2."""
CLIP_FLOPS = 3
"""Per parameter: square, sum, scale."""


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scaled dot-product attention on the CPU: both matrix products, full square (shapes B, H, T, D)."""
    b, h, t, d = q
    return int(2 * b * h * t * k[-2] * (d + v[-1]))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Its backward: recomputed scores and four products, as PyTorch counts flash attention elsewhere."""
    b, h, t, d = q
    return int(2 * b * h * t * k[-2] * (3 * d + 2 * v[-1]))


def cpu_attention_mapping() -> dict[Any, Callable[..., int]]:
    """Formulas for the CPU attention kernels, for which PyTorch's counter (2.13, 2.14) has none and says 0."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs (multiplications and additions of matrix products and convolutions) executed by `function`."""
    with FlopCounterMode(display=False, custom_mapping=cpu_attention_mapping()) as counter:
        function()
    return int(counter.get_total_flops())


class Costs:
    """What the examples of a task cost on its model, in FLOPs, with `FlopCounterMode` once per shape.

    Args:
        task: whose model and losses are counted.
    """

    accounting = "measured"

    def __init__(self, task: Task) -> None:
        self._task = task
        self._cache: dict[Shape, tuple[float, float]] = {}
        self._pools: WeakKeyDictionary[Pool, tuple[float, float]] = WeakKeyDictionary()

    def forward(self, batch: Batch) -> float:
        """One forward pass of all of `batch`."""
        return self._example(batch)[0] * len(batch)

    def usage(self, batch: Batch) -> float:
        """One forward and backward pass of all of `batch`."""
        return self._example(batch)[1] * len(batch)

    @cached_property
    def optimizer_step(self) -> float:
        """One update of the trainable parameters, with clipping if the recipe asks for it."""
        recipe = self._task.recipe
        trainable = sum(prod(p.shape) for p in self._model.parameters() if p.requires_grad)
        per_parameter = ADAMW_FLOPS if recipe.optimizer == "adamw" else SGD_FLOPS
        return float(trainable * (per_parameter + (CLIP_FLOPS if recipe.clip_norm else 0)))

    def per_usage(self, pool: Pool, batch_size: int) -> float:
        """Mean cost of using one example of `pool` in training, with its share of the optimizer step."""
        return self._pool_mean(pool)[1] + self.optimizer_step / batch_size

    def forward_pool(self, pool: Pool) -> float:
        """One forward pass over all of `pool`, without padding."""
        return self._pool_mean(pool)[0] * len(pool)

    def tokens_per_example(self, pool: Pool) -> float:
        """Mean number of tokens that the model computes on, without padding."""
        representatives, codes = pool.examples.shapes()
        tokens = np.array([pool.batch([r]).tokens for r in representatives])
        return float(tokens @ np.bincount(codes, minlength=len(tokens)) / len(pool))

    @cached_property
    def _model(self) -> torch.nn.Module:
        return self._task.model(0)

    def _pool_mean(self, pool: Pool) -> tuple[float, float]:
        if pool not in self._pools:
            representatives, codes = pool.examples.shapes()
            costs = np.array([self._example(pool.batch([r])) for r in representatives])
            mean = np.bincount(codes, minlength=len(costs)) @ costs / len(pool)
            self._pools[pool] = (float(mean[0]), float(mean[1]))
        return self._pools[pool]

    def _example(self, batch: Batch) -> tuple[float, float]:
        """FLOPs of (forward, forward+backward) of one example of the batch's shape."""
        if batch.shape not in self._cache:
            self._cache[batch.shape] = self._measure(batch)
        return self._cache[batch.shape]

    def _measure(self, batch: Batch) -> tuple[float, float]:
        probe = batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))
        model = self._model.train()

        def forward() -> torch.Tensor:
            return self._task.losses(model, probe).mean()

        with torch.random.fork_rng():
            try:
                usage = count_flops(lambda: forward().backward())
                with torch.no_grad():
                    once = count_flops(forward)
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(f"an example of shape {batch.shape} cannot run through the model: {error}") from error
        model.zero_grad(set_to_none=True)
        return once / PROBE_SIZE, usage / PROBE_SIZE
