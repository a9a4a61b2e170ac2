"""Scoring a pool with a model: one forward pass in batches by token budget, every FLOP charged as it is spent.

On a CPU large batches of texts lose: examples are sorted by length, so that hardly anything is padding, and a
batch holds as many as fit in a budget of padded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from cads.budget import SELECT, Ledger
from cads.counting import count_flops
from cads.errors import ConfigError, DataError
from cads.flops import PROBE_SIZE
from cads.journal import in_shards
from cads.task import Batch, Pool

SCORED_TOKENS = 512
"""Padded tokens in one forward pass; the best of 128 to 4,096 on two CPU cores."""
SCORED_EXAMPLES = 1024
"""Most examples in one forward pass, where they have no length."""
SCORED_VALUES = 2**24
"""Most input values in one forward pass, where examples have no length: 64 MB as float32."""

PLANNED_BATCHES = 4096
"""Most batches that a plan collates to price them."""

Score = Callable[[Batch], Tensor]
"""One number for each example of a batch, shape (B,)."""
BatchPrice = Callable[[Batch], float]
"""What scoring a batch costs, FLOPs."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients while the block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class Counted:
    """What a function of a batch costs: counted once per shape, by running it on copies of one example.

    The function must not look at answers: the shape that counts is that of the largest input.

    Args:
        function: of a batch.
    """

    def __init__(self, function: Callable[[Batch], object]) -> None:
        self._function = function
        self._cache: dict[tuple[int, ...], float] = {}

    def __call__(self, batch: Batch) -> float:
        """FLOPs of all of `batch`."""
        shape = tuple(max((x.shape[1:] for x in batch.inputs.values()), key=prod))
        if shape not in self._cache:
            probe = batch.map(lambda x: x[:1].repeat_interleave(PROBE_SIZE, dim=0))
            with torch.no_grad():
                self._cache[shape] = count_flops(lambda: self._function(probe)) / PROBE_SIZE
        return self._cache[shape] * len(batch)


def by_id(pool: Pool) -> np.ndarray:
    """Positions in the order of the ids, int64, shape (N,): an order that a permutation of the pool leaves as it is."""
    return np.asarray(pc.sort_indices(pool.ids)).astype(np.int64)


def lengths(pool: Pool) -> np.ndarray | None:
    """Tokens of each example, int64, shape (N,), or None where examples do not have a length."""
    known = getattr(pool.examples, "lengths", None)
    return np.asarray(known(), dtype=np.int64) if callable(known) else None


def budget_batches(length: np.ndarray, ids: pa.Array, tokens: int) -> list[np.ndarray]:
    """Positions in batches of at most `tokens` padded tokens (or of one example), longest first.

    The same examples stand together whatever their order was: equal lengths are sorted by id.

    Args:
        length: tokens of each example, shape (n,). ids: one each.

    Raises:
        ConfigError: if the budget is not positive.
    """
    if tokens < 1:
        raise ConfigError(f"a batch of {tokens} tokens holds no example: give at least 1, such as {SCORED_TOKENS}")
    table = pa.table({"length": length, "id": ids})
    order = pc.sort_indices(table, [("length", "descending"), ("id", "ascending")]).to_numpy().astype(np.int64)
    falling = length[order]
    found, start = [], 0
    while start < len(order):
        count = max(1, tokens // max(1, int(falling[start])))
        found.append(order[start : start + count])
        start += count
    return found


def scoring_batches(
    pool: Pool, *, tokens: int = SCORED_TOKENS, positions: np.ndarray | None = None
) -> list[np.ndarray]:
    """All positions of `pool` (or those given) in batches for one forward pass.

    Examples with a length are batched by `tokens`, others by `SCORED_EXAMPLES` and `SCORED_VALUES` in the order of
    their ids.
    """
    positions = np.arange(len(pool)) if positions is None else np.asarray(positions, dtype=np.int64)
    length, ids = lengths(pool), pool.ids.take(pa.array(positions))
    if length is not None:
        return [positions[rows] for rows in budget_batches(length[positions], ids, tokens)]
    values = max(1, *(x[0].numel() for x in pool.batch(np.zeros(1, dtype=np.int64)).inputs.values()))
    size = max(1, min(SCORED_EXAMPLES, SCORED_VALUES // values))
    order = positions[np.asarray(pc.sort_indices(ids))]
    return [order[start : start + size] for start in range(0, len(order), size)]


def planned_flops(price: BatchPrice, pool: Pool, *, tokens: int = SCORED_TOKENS) -> float:
    """What `score_pool` will charge for all of `pool`, padding included; nothing is computed on the examples.

    Of more than `PLANNED_BATCHES` batches, as many at even distances stand for all.
    """
    if lengths(pool) is None:
        representatives, codes = pool.examples.shapes()
        prices = np.array([price(pool.batch([r])) for r in representatives], dtype=np.float64)
        return float(prices @ np.bincount(codes, minlength=len(prices)))
    batches = scoring_batches(pool, tokens=tokens)
    count = min(len(batches), PLANNED_BATCHES)
    seen = [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
    return sum(price(pool.batch(rows)) for rows in seen) * len(batches) / count


def reading_flops(price: BatchPrice, pool: Pool, positions: np.ndarray) -> float:
    """What `score_pool` will charge for the examples at `positions`, padding included."""
    if lengths(pool) is None:
        representatives, _ = pool.examples.shapes()
        if len(representatives) == 1:
            # One price for all: nothing has to be read.
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
    tokens: int = SCORED_TOKENS,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """One number for each example of `pool`, or for those at `positions`, float64, shape (n,).

    Args:
        score: of a batch on `device`, called without gradients.
        price: of a batch; charged to "select"/`stage`, batch by batch.
        tokens: padded tokens of a batch.

    Raises:
        DataError: if a score is not finite, naming the examples.
    """
    positions = np.arange(len(pool)) if positions is None else np.asarray(positions, dtype=np.int64)
    batches = scoring_batches(pool, tokens=tokens, positions=positions)

    def shard(i: int) -> np.ndarray:
        batch = pool.batch(batches[i])
        # The first batch of a shape may have to be counted, which takes gradients.
        ledger.charge(SELECT, stage, price(batch), tokens=batch.tokens)
        with ledger.timed(SELECT, stage), torch.inference_mode():
            return score(batch.to(device)).double().cpu().numpy()

    scores = np.full(len(pool), np.nan)
    scores[np.concatenate(batches)] = in_shards("scoring", [stage, len(positions)], ledger, len(batches), shard)
    found = scores[positions]
    check_finite(found, pool, stage, positions)
    return found


def check_finite(scores: np.ndarray, pool: Pool, what: str, positions: np.ndarray | None = None) -> None:
    """Refuse scores that are NaN or infinite.

    Raises:
        DataError: naming the first such examples.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        where = bad if positions is None else positions[bad]
        raise DataError(
            f"{what}: the scores of {len(bad)} examples of the {pool.name}, such as "
            f"{pool.ids.take(pa.array(where[:5])).to_pylist()}, are not finite: look at these examples"
        )
