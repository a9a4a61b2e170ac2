"""A random share of each source, nested over shares."""

from __future__ import annotations

import numpy as np

from cads.data.pool import Pool


def strata(pool: Pool) -> np.ndarray:
    """The source of each example, or 0 for all if the pool has no sources; shape (N,)."""
    return np.zeros(len(pool), dtype=np.int32) if pool.sources is None else pool.sources


def subsample(pool: Pool, fidelity: float, seed: int) -> np.ndarray:
    """A random share of the contents of each source, at least one each; nested over fidelities for one seed.

    Copies of one content stay together: if they were drawn one by one, a small share of a source that holds the
    same few examples over and over would look as diverse as a share of any other.

    Returns:
        positions, sorted, int64.
    """
    sources, contents = strata(pool), pool.content_codes
    place = np.random.default_rng(seed).permutation(int(contents.max()) + 1)[contents]
    kept = []
    for members in np.split(np.argsort(sources, kind="stable"), np.cumsum(np.bincount(sources))[:-1]):
        # A sort is a hundred times faster here than np.unique, which hashes.
        ordered = np.sort(place[members])
        distinct_places = ordered[np.diff(ordered, prepend=-1) > 0]
        last = distinct_places[max(1, round(fidelity * len(distinct_places))) - 1]
        kept.append(members[place[members] <= last])
    return np.sort(np.concatenate(kept))
