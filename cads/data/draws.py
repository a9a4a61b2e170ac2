"""Random samples of a pool, drawn by id: a pool that is sorted or shuffled gives the same ones."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from cads.data.pool import Pool
from cads.data.subsample import strata
from cads.seeding import derive_each

_last_order: WeakKeyDictionary[Pool, tuple[int, np.ndarray]] = WeakKeyDictionary()
"""The last order that was drawn of each pool, and its seed: a plan and its run ask for the same one many times."""


def draw_order(pool: Pool, seed: int) -> np.ndarray:
    """All positions in the order of a hash of (seed, id), int64, shape (N,): any prefix is a uniform random sample.

    Prefixes of one seed are nested. The order of two examples depends on their ids alone, and on no other example.
    """
    known = _last_order.get(pool)
    if known is None or known[0] != seed:
        known = seed, np.argsort(derive_each(seed, pool.ids), kind="stable")
        _last_order[pool] = known
    return known[1]


def draw(pool: Pool, count: int, seed: int) -> np.ndarray:
    """Positions of `count` random examples, or of all if there are fewer, int64, in the order of the draw."""
    return draw_order(pool, seed)[:count]


def draw_by_source(pool: Pool, count: int, seed: int) -> list[np.ndarray]:
    """Positions of `count` random examples of each source, or of all of it if it has fewer, in the order of the draw.

    A pool without sources counts as one source.
    """
    order = draw_order(pool, seed)
    sources = strata(pool)[order]
    members = np.split(order[np.argsort(sources, kind="stable")], np.cumsum(np.bincount(sources))[:-1])
    return [positions[:count] for positions in members]
