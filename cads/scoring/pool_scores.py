"""Scoring a pool with a model: one forward pass in batches by token budget, every FLOP charged as it is spent.

Examples are sorted by length, so that batches hold hardly any padding. A batch holds as many examples as fit in a
budget of padded tokens: on a CPU large batches of texts are slower, and on other devices small ones are
(`cads.data.token_batches.scoring_limits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import device_type, lengths, scoring_batches
from cads.errors import DataError
from cads.runtime.journal import map_shards
from cads.training.precision import autocast

PLANNED_BATCHES = 4096
"""Largest number of batches that a plan collates to price them."""

Score = Callable[[Batch], Tensor]
"""One number for each example of a batch, shape (B,)."""
BatchPrice = Callable[[Batch], float]
"""What scoring a batch costs, FLOPs."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients while the block runs."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training_modules:
            module.training = True


def planned_flops(price: BatchPrice, pool: Pool, *, tokens: int | None = None) -> float:
    """What `score_pool` will charge for all of `pool`, padding included; nothing is computed on the examples.

    Of more than `PLANNED_BATCHES` batches, only that many, evenly spaced, are priced; the sum is scaled up.
    """
    if lengths(pool) is None:
        representatives, codes = pool.examples.shapes()
        prices = np.array([price(pool.batch([r])) for r in representatives], dtype=np.float64)
        return float(prices @ np.bincount(codes, minlength=len(prices)))
    batches = scoring_batches(pool, tokens=tokens)
    count = min(len(batches), PLANNED_BATCHES)
    priced = [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
    return sum(price(pool.batch(rows)) for rows in priced) * len(batches) / count


def reading_flops(price: BatchPrice, pool: Pool, positions: np.ndarray) -> float:
    """What `score_pool` will charge for the examples at `positions`, padding included."""
    if lengths(pool) is None:
        representatives, _ = pool.examples.shapes()
        if len(representatives) == 1:
            # All examples have one price: no example has to be read.
            return price(pool.batch(representatives)) * len(positions)
    return sum(price(pool.batch(rows)) for rows in scoring_batches(pool, positions=positions))


def score_pool(
    pool: Pool,
    score: Score,
    price: BatchPrice,
    *,
    ledger: Ledger,
    stage: str,
    device: torch.device | str = "cpu",
    tokens: int | None = None,
    positions: np.ndarray | None = None,
    precision: str = "no",
) -> np.ndarray:
    """One number for each example of `pool`, or for those at `positions`, float64, shape (n,).

    Args:
        score: of a batch on `device`, called without gradients.
        price: of a batch; charged to "select"/`stage`, batch by batch.
        tokens: padded tokens of a batch; None: the limit of this process's device (`scoring_limits`).
        precision: of the forward passes, as in `TrainConfig`.

    Raises:
        DataError: if a score is not finite, naming the examples.
    """
    positions = np.arange(len(pool)) if positions is None else np.asarray(positions, dtype=np.int64)
    batches = scoring_batches(pool, tokens=tokens, positions=positions)

    def shard(i: int) -> np.ndarray:
        batch = pool.batch(batches[i])
        # Outside inference mode: counting the FLOPs of the first batch of a shape may take gradients.
        ledger.charge(SELECT, stage, price(batch), tokens=batch.tokens)
        with ledger.timed(SELECT, stage), torch.inference_mode(), autocast(precision, device):
            return score(batch.to(device)).cpu().double().numpy()

    scores = np.full(len(pool), np.nan)
    scores[np.concatenate(batches)] = map_shards(
        "scoring", [stage, len(positions), *batching_key()], ledger, len(batches), shard
    )
    requested = scores[positions]
    check_finite(requested, pool, stage, positions)
    return requested


def batching_key() -> list[str]:
    """What operations of a journal must agree on beside their examples: shards are batches, which follow the device."""
    return [] if device_type() == "cpu" else [device_type()]


def check_finite(scores: np.ndarray, pool: Pool, label: str, positions: np.ndarray | None = None) -> None:
    """Refuse scores that are NaN or infinite.

    Args:
        scores: shape (n,).
        label: of the scores in the message: the stage or the method.
        positions: of the scores in `pool`, shape (n,); None if they are in the order of the pool.

    Raises:
        DataError: naming the first such examples.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        bad_positions = bad if positions is None else positions[bad]
        raise DataError(
            f"{label}: the scores of {len(bad)} examples of the {pool.name}, such as "
            f"{pool.ids.take(pa.array(bad_positions[:5])).to_pylist()}, are not finite: look at these examples"
        )
