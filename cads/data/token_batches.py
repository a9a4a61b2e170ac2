"""Batches of similar length, in an order of ids, for passes that only read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.pool import Pool
from cads.errors import ConfigError

SCORED_TOKENS = 512
"""Padded tokens in one forward pass; the best of 128 to 4,096 on two CPU cores."""
SCORED_EXAMPLES = 1024
"""Most examples in one forward pass, where they have no length."""
SCORED_VALUES = 2**24
"""Most input values in one forward pass, where examples have no length: 64 MB as float32."""


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
