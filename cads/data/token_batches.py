"""Batches of similar length, in the order of ids, for forward passes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.pool import Pool
from cads.errors import ConfigError

SCORED_TOKENS = 512
"""Padded tokens in one forward pass; the fastest of 128 to 4,096 on two CPU cores."""
SCORED_EXAMPLES = 1024
"""Maximum number of examples in one forward pass, for examples without a length."""
SCORED_VALUES = 2**24
"""Maximum number of input values in one forward pass, for examples without a length: 64 MB as float32."""


def by_id(pool: Pool) -> np.ndarray:
    """Positions in the order of the ids, int64, shape (N,). This order of examples is the same for a permuted pool."""
    return np.asarray(pc.sort_indices(pool.ids)).astype(np.int64)


def lengths(pool: Pool) -> np.ndarray | None:
    """Number of tokens of each example, int64, shape (N,), or None if examples have no length."""
    read_lengths = getattr(pool.examples, "lengths", None)
    return np.asarray(read_lengths(), dtype=np.int64) if callable(read_lengths) else None


def budget_batches(length: np.ndarray, ids: pa.Array, tokens: int) -> list[np.ndarray]:
    """Positions in batches of at most `tokens` padded tokens (or of one example), longest first.

    Equal lengths are sorted by id, so that the batches do not depend on the order of the examples.

    Args:
        length: number of tokens of each example, shape (n,).
        ids: one an example.
        tokens: maximum number of padded tokens in a batch.

    Raises:
        ConfigError: if `tokens` is not positive.
    """
    if tokens < 1:
        raise ConfigError(f"a batch of {tokens} tokens holds no example: give at least 1, such as {SCORED_TOKENS}")
    table = pa.table({"length": length, "id": ids})
    order = pc.sort_indices(table, [("length", "descending"), ("id", "ascending")]).to_numpy().astype(np.int64)
    sorted_length = length[order]
    batches, start = [], 0
    while start < len(order):
        count = max(1, tokens // max(1, int(sorted_length[start])))
        batches.append(order[start : start + count])
        start += count
    return batches


def scoring_batches(
    pool: Pool, *, tokens: int = SCORED_TOKENS, positions: np.ndarray | None = None
) -> list[np.ndarray]:
    """All positions of `pool` (or only `positions`) in batches for one forward pass.

    Examples with a length are batched by `tokens`; see `budget_batches`. Other examples are batched in the order of
    their ids, within `SCORED_EXAMPLES` and `SCORED_VALUES`.
    """
    positions = np.arange(len(pool)) if positions is None else np.asarray(positions, dtype=np.int64)
    length, ids = lengths(pool), pool.ids.take(pa.array(positions))
    if length is not None:
        return [positions[rows] for rows in budget_batches(length[positions], ids, tokens)]
    values = max(1, *(x[0].numel() for x in pool.batch(np.zeros(1, dtype=np.int64)).inputs.values()))
    size = max(1, min(SCORED_EXAMPLES, SCORED_VALUES // values))
    order = positions[np.asarray(pc.sort_indices(ids))]
    return [order[start : start + size] for start in range(0, len(order), size)]
