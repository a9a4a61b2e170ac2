"""The signal of a source."""

import numpy as np
import pytest

from cads.selectors.online.signal import SourceExcess

FOREVER = 1e12


def added(losses, sources, groups, weights=None, right=None, memory=FOREVER, n_sources=2, n_groups=2):
    excess = SourceExcess(n_sources, n_groups, memory)
    losses = np.asarray(losses, dtype=np.float64)
    weights = np.ones(len(losses)) if weights is None else weights
    excess.add(losses, np.asarray(sources), np.asarray(groups), weights, right)
    return excess


def test_hard_groups_do_not_make_a_source_bad():
    """Source 0 holds the hard group, source 1 the easy one, and both are as good as the group allows."""
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 2000)
    losses = rng.normal(size=4000) + np.where(groups == 0, 5.0, 0.5)
    np.testing.assert_allclose(added(losses, groups, groups).mean, 0, atol=0.02)


def test_a_source_with_higher_losses_in_its_groups_is_worse():
    rng = np.random.default_rng(0)
    sources, groups = rng.integers(0, 2, 4000), rng.integers(0, 2, 4000)
    losses = rng.normal(size=4000) + 5.0 * groups + 1.0 * sources
    mean = added(losses, sources, groups).mean
    assert mean[1] - mean[0] == pytest.approx(1 / np.sqrt(1.25), abs=0.05)


def test_few_examples_count_for_little():
    """One example, far out, is shrunk by half by one pseudo-example."""
    excess = added([10.0, 0.0, 0.0, 0.0], [1, 0, 0, 0], [0, 0, 0, 0], n_groups=1)
    z = (10 - 2.5) / np.std([10, 0, 0, 0])
    assert excess.mean[1] == pytest.approx(z / 2)
    assert excess.stderr[1] > excess.stderr[0] * 0.5


def test_what_is_drawn_more_does_not_move_the_moments():
    """Half as many rows of source 0, each counted twice: the same moments."""
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(size=40_000), rng.normal(size=40_000) + 3
    sources = np.repeat([0, 1], 40_000)
    plain = added(np.concatenate([easy, hard]), sources, np.zeros(80_000, dtype=int), n_groups=1)
    thinned = added(
        np.concatenate([easy[::2], hard]),
        np.repeat([0, 1], [20_000, 40_000]),
        np.zeros(60_000, dtype=int),
        np.repeat([2.0, 1.0], [20_000, 40_000]),
        n_groups=1,
    )
    np.testing.assert_allclose(thinned.mean, plain.mean, atol=0.02)


def test_wrong_labels_do_not_count_against_right_ones():
    """Half of source 1 has wrong labels, which are known: the other half is as good as source 0."""
    rng = np.random.default_rng(0)
    losses, sources, wrong = rng.normal(size=40_000), np.repeat([0, 1], 20_000), np.arange(40_000) >= 30_000
    zeros = np.zeros(40_000, dtype=int)
    mean = added(losses + 3 * wrong, sources, zeros, right=1.0 - wrong).mean
    np.testing.assert_allclose(mean, 0, atol=0.03)
    assert added(losses + 3 * wrong, sources, zeros).mean[1] > 0.3


def test_it_forgets():
    excess = SourceExcess(2, 1, memory=100)
    zeros = np.zeros(50, dtype=int)
    for shift in (3.0, -3.0):
        for _ in range(40):
            losses = np.random.default_rng(0).normal(size=50)
            excess.add(losses, zeros, zeros, np.ones(50))
            excess.add(losses + shift, zeros + 1, zeros, np.ones(50))
    assert excess.mean[1] < -0.5 < 0.5 < excess.mean[0]


def test_what_is_not_finite_is_left_out():
    one = added([1.0, np.nan, 3.0, np.inf], [0, 0, 1, 1], [0, 0, 0, 0])
    assert np.isfinite(one.mean).all()
    np.testing.assert_array_equal(one.mean, added([1.0, 3.0], [0, 1], [0, 0]).mean)


def test_restored_it_is_the_same():
    excess = added([1.0, 2.0, 4.0], [0, 1, 1], [0, 1, 0])
    other = SourceExcess(2, 2, FOREVER)
    other.restore(excess.state())
    np.testing.assert_array_equal(other.mean, excess.mean)
    assert other.reachable(np.array([0.5, 0.5])) == excess.reachable(np.array([0.5, 0.5]))
