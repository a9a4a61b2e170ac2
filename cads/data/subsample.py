"""Random subsamples of each source of a pool. A smaller subsample is contained in a larger one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cads.data.pool import Pool
from cads.data.token_batches import by_id


def strata(pool: Pool) -> np.ndarray:
    """The source code of each example, or 0 for all if the pool has no sources; int32, shape (N,)."""
    return np.zeros(len(pool), dtype=np.int32) if pool.sources is None else pool.sources


def subsample(pool: Pool, fidelity: float, seed: int) -> np.ndarray:
    """A random share of the distinct contents of each source, at least one; nested over fidelities for one seed.

    All copies of a content are drawn together. If they were drawn one by one, a small share of a source that repeats
    a few examples would be as diverse as a share of any other source. Contents are numbered in the order of the ids, so
    that a permuted pool gives the same draw.

    Args:
        pool: to draw from.
        fidelity: the share, 0 to 1.
        seed: of the order in which contents are drawn.

    Returns:
        positions, sorted, int64.
    """
    ids = by_id(pool)
    sources, contents = strata(pool)[ids], numbered_by_first(pool.content_codes[ids])
    draw_order = np.random.default_rng(seed).permutation(int(contents.max()) + 1)[contents]
    selected = []
    for members in np.split(np.argsort(sources, kind="stable"), np.cumsum(np.bincount(sources))[:-1]):
        # np.unique hashes, which is a hundred times slower here than a sort.
        ordered = np.sort(draw_order[members])
        distinct_contents = ordered[np.diff(ordered, prepend=-1) > 0]
        last = distinct_contents[max(1, round(fidelity * len(distinct_contents))) - 1]
        selected.append(members[draw_order[members] <= last])
    return np.sort(ids[np.concatenate(selected)])


def numbered_by_first(codes: np.ndarray) -> np.ndarray:
    """Codes (int64, shape (N,)) with other numbers: 0 for the first that occurs, 1 for the next new one, and so on."""
    return np.asarray(pa.array(codes).dictionary_encode().indices).astype(np.int64)
