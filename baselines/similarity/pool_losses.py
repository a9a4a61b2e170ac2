"""The loss of every pool example under a model, in one forward pass, and the order in which losses rank examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from torch import Tensor, nn

from baselines.kernels.autocast import Passes
from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.scoring.pool_scores import score_pool
from cads.scoring.reference_models import device_of
from cads.scoring.stages import ReadPool
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


def check_batch_tokens(tokens: int | None) -> None:
    """Refuse batches without a token; None leaves their size to the device (`cads.data.token_batches.scoring_limits`).

    Raises:
        ConfigError: naming the option.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"batch_tokens = {tokens}: it must be at least 1")


def in_order(values: np.ndarray, order: Order) -> np.ndarray:
    """Scores, the higher the better, that rank `values` (shape (N,)) in `order`."""
    if order == "mid":
        return -np.abs(values - np.median(values))
    return values if order == "high" else -values


def pool_losses(task: Task, model: nn.Module, stage: ReadPool, *, ledger: Ledger, autocast: bool = False) -> np.ndarray:
    """Carry out `stage` for one model: the loss of each example that is read, nats, float64, shape (N,).

    Puts `model` in evaluation mode, and computes in the precision of the task's recipe.

    Args:
        autocast: compute in bfloat16 instead: faster on hardware that supports it, and off by about 1 % (`Passes`).
    """
    model.eval()
    device = device_of(model)
    precision = "bf16" if autocast else task.recipe.precision
    passes = Passes(model, "bf16" if precision == "bf16" else "no")

    def score(batch: Batch) -> Tensor:
        with passes():
            return task.losses(model, batch).float()

    pool, price = stage.pool_of(task), task.costs.forward
    return score_pool(
        pool,
        score,
        price,
        ledger=ledger,
        stage=stage.name,
        device=device,
        tokens=stage.tokens,
        precision=precision,
    )


def whole_texts(pool: Pool) -> Pool:
    """A pool of tokens with the loss taken over every token, prompts too; other pools unchanged."""
    from cads.tasks.language.tokens import Tokens

    examples = pool.examples
    if not isinstance(examples, Tokens):
        return pool
    unmasked = replace(examples, loss_mask=np.ones(len(examples.ids), dtype=bool))
    return Pool(pool.ids, unmasked, name=pool.name)
