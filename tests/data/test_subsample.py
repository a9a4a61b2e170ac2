"""Samples of a pool: nested, by source, with copies together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.data.pool import Pool
from cads.data.subsample import strata, subsample


class Nothing:
    """Examples that nobody looks at; those with equal contents are copies."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def digests(self):
        return [str(c).encode() for c in self.contents]


def pool_of(sizes, seed, contents=None):
    codes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    names = [f"s{i}" for i in range(len(sizes))]
    contents = range(len(codes)) if contents is None else contents[: len(codes)]
    return Pool([str(i) for i in range(len(codes))], Nothing(contents), codes, names)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    low=st.floats(1e-3, 1),
    high=st.floats(1e-3, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_samples_are_nested_and_hold_their_share_of_every_source(sizes, low, high, seed):
    low, high = sorted((low, high))
    pool = pool_of(sizes, seed % 1000)
    small, large = subsample(pool, low, seed), subsample(pool, high, seed)
    assert set(small) <= set(large)
    for chosen, fidelity in ((small, low), (large, high)):
        assert (np.diff(chosen) > 0).all()
        counts = np.bincount(pool.sources[chosen], minlength=len(sizes))
        assert (counts >= 1).all()
        share = fidelity * pool.source_sizes
        assert (np.abs(counts - share) <= np.maximum(0.5, 1 - share)).all()
    assert np.array_equal(subsample(pool, low, seed), small)
    assert np.array_equal(subsample(pool, 1.0, seed), np.arange(len(pool)))


@given(copies=st.integers(1, 8), fidelity=st.floats(1e-3, 1), seed=st.integers(0, 1000))
def test_copies_stay_together_and_contents_are_counted(copies, fidelity, seed):
    contents = np.random.default_rng(seed).integers(0, max(1, 200 // copies), 200)
    pool = pool_of([120, 80], seed, contents)
    chosen = subsample(pool, fidelity, seed)
    for source in range(2):
        here = contents[pool.sources == source]
        subsampled = contents[chosen[pool.sources[chosen] == source]]
        assert len(subsampled) == np.isin(here, subsampled).sum()
        assert len(set(subsampled)) == max(1, round(fidelity * len(set(here))))


def test_samples_depend_on_the_seed_alone():
    pool = pool_of([50, 50], 0)
    assert not np.array_equal(subsample(pool, 0.5, 0), subsample(pool, 0.5, 1))
    no_sources = Pool(pool.ids, Nothing(range(100)))
    assert (strata(no_sources) == 0).all()
    assert len(subsample(no_sources, 0.3, 0)) == 30
