"""Groups in even turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.data.balanced_stream import BalancedStream, apportioned, balanced_shares, balanced_stream
from cads.errors import DataError


def stream(counts, shares=None, seed=0):
    groups = np.repeat(np.arange(len(counts)), counts)
    shares = np.full(len(counts), 1 / len(counts)) if shares is None else np.asarray(shares)
    return BalancedStream(np.arange(len(groups)) + 100, groups, shares, seed), groups


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    start=st.integers(0, 5000),
    length=st.integers(1, 300),
)
def test_every_stretch_holds_each_group_in_its_share(counts, start, length):
    drawn, groups = stream(counts)
    result = np.bincount(groups[drawn.take(start, length) - 100], minlength=len(counts))
    # A cycle begins anew at another phase of each group.
    assert np.abs(result - length / len(counts)).max() <= 3


@given(shares=st.lists(st.floats(0.05, 1), min_size=2, max_size=5), cut=st.integers(1, 2999))
def test_elements_do_not_depend_on_how_they_are_taken(shares, cut):
    drawn, _ = stream([7] * len(shares), shares)
    at_once = drawn.take(0, 3000)
    np.testing.assert_array_equal(np.concatenate([drawn.take(0, cut), drawn.take(cut, 3000 - cut)]), at_once)


def test_each_example_of_a_group_comes_in_turn():
    drawn, groups = stream([3, 11])
    taken = drawn.take(0, 4 * 1024) - 100
    for g, size in ((0, 3), (1, 11)):
        members = taken[groups[taken] == g]
        visits = np.bincount(members, minlength=14)[groups == g]
        assert visits.max() - visits.min() <= 1
        for epoch in range(len(members) // size):
            assert len(set(members[epoch * size : (epoch + 1) * size].tolist())) == size


def test_a_seed_is_an_order():
    one, other = stream([5, 5], seed=1)[0], stream([5, 5], seed=2)[0]
    assert one.take(0, 50).tolist() == stream([5, 5], seed=1)[0].take(0, 50).tolist() != other.take(0, 50).tolist()


def test_a_group_without_an_example_has_no_share():
    with pytest.raises(DataError, match="every group with a share needs an example"):
        BalancedStream(np.arange(3), np.array([0, 0, 2]), np.array([0.3, 0.3, 0.4]), 0)


@given(
    shares=st.lists(st.just(0.0) | st.floats(0.01, 1), min_size=1, max_size=9).filter(any),
    total=st.integers(10, 2000),
)
def test_apportioned_in_whole_numbers(shares, total):
    counts = apportioned(np.array(shares), total)
    exact = np.array(shares) / sum(shares) * total
    assert (counts[exact > 0] >= 1).all()
    assert not counts[exact == 0].any()
    assert (np.abs(counts - exact) <= 1).all()


class TestShares:
    def test_a_sample_of_balanced_groups_gives_equal_shares(self):
        """The chance scatter of 50 draws from 10 equal groups is not taken for imbalance."""
        rng = np.random.default_rng(0)
        errors = {"own": [], "shrunk": []}
        for _ in range(200):
            counts = np.bincount(rng.integers(0, 10, 50), minlength=10)
            errors["own"].append(np.abs(counts / 50 - 0.1).sum())
            shares = balanced_shares(counts)
            errors["shrunk"].append(np.abs(shares[shares > 0] - 1 / (shares > 0).sum()).sum())
        assert np.mean(errors["shrunk"]) < 0.3 * np.mean(errors["own"])

    def test_unbalanced_groups_keep_their_shares(self):
        np.testing.assert_allclose(balanced_shares(np.array([900, 90, 10])), [0.9, 0.09, 0.01], atol=0.003)

    def test_what_is_absent_has_none(self):
        assert balanced_shares(np.array([5, 0, 5])).tolist() == [0.5, 0.0, 0.5]

    def test_without_groups_it_is_an_epoch_after_another(self):
        taken = balanced_stream(np.arange(20), None, 3).take(0, 40)
        assert sorted(taken[:20].tolist()) == sorted(taken[20:].tolist()) == list(range(20))
