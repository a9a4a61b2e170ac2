"""The loss of every pool example under a model, in one forward pass, and the order in which losses rank examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from torch import Tensor, nn

from baselines.kernels.autocast import Passes
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.scoring.pool_scores import planned_flops, score_pool
from cads.scoring.reference_models import device_of
from cads.task import Task

Order = Literal["low", "mid", "high"]
"""Which losses come first: the lowest, those closest to the median, or the highest."""


def check_order(order: str) -> None:
    """Refuse an unknown order.

    Raises:
        ConfigError: naming the choices.
    """
    if order not in get_args(Order):
        raise ConfigError(f"order = {order!r}: choose from {list(get_args(Order))}")


def in_order(values: np.ndarray, order: Order) -> np.ndarray:
    """Scores, the higher the better, that rank `values` (shape (N,)) in `order`."""
    if order == "mid":
        return -np.abs(values - np.median(values))
    return values if order == "high" else -values


def pool_losses(
    task: Task,
    model: nn.Module,
    *,
    ledger: Ledger,
    stage: str,
    tokens: int,
    pool: Pool | None = None,
    autocast: bool = False,
) -> np.ndarray:
    """The loss of each example of the task's pool (or of `pool`), nats, float64, shape (N,).

    Puts `model` in evaluation mode.

    Args:
        tokens: padded tokens of a batch.
        autocast: compute in bfloat16: faster on hardware that supports it, and off by about 1 % (`Passes`).
    """
    model.eval()
    device = device_of(model)
    passes = Passes(model, "bf16" if autocast else "no")

    def score(batch: Batch) -> Tensor:
        with passes():
            return task.losses(model, batch).float()

    pool, price = pool or task.pool, task.costs.forward
    return score_pool(pool, score, price, ledger=ledger, stage=stage, device=device, tokens=tokens)


def plan_losses(
    task: Task, ledger: PlannedLedger, *, stage: str, tokens: int, pool: Pool | None = None, models: int = 1
) -> None:
    """Charge `ledger` for `models` calls of `pool_losses`."""
    pool = pool or task.pool
    flops = planned_flops(task.costs.forward, pool, tokens=tokens)
    ledger.charge(SELECT, stage, models * flops)
    ledger.scored.append(task)


def whole_texts(pool: Pool) -> Pool:
    """A pool of tokens with the loss taken over every token, prompts too; other pools unchanged."""
    from cads.tasks.language.tokens import Tokens

    examples = pool.examples
    if not isinstance(examples, Tokens):
        return pool
    unmasked = replace(examples, loss_mask=np.ones(len(examples.ids), dtype=bool))
    return Pool(pool.ids, unmasked, name=pool.name)
