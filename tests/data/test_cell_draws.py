"""Draws from cells whose shares may change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.data.cell_draws import CellDraws
from cads.errors import DataError


def draws(cells, copies=None, seed=0, n_cells=None):
    cells = np.asarray(cells)
    copies = None if copies is None else np.asarray(copies)
    return CellDraws(cells, int(cells.max()) + 1 if n_cells is None else n_cells, np.arange(len(cells)), copies, seed)


@given(
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda x: sum(x) > 0.01),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_what_is_drawn_never_differs_from_the_shares_by_much(shares, counts):
    cells = np.repeat(np.arange(len(shares)), 7)
    source = draws(cells)
    expected, actual = np.zeros(len(shares)), np.zeros(len(shares))
    for count in counts:
        taken = source.take(np.array(shares), count)
        assert len(taken) == count
        expected += count * np.array(shares) / sum(shares)
        actual += np.bincount(cells[taken], minlength=len(shares))
    assert np.abs(actual - expected).max() < 2.5
    assert not actual[np.array(shares) == 0].any()


def test_shares_may_change_at_every_draw():
    cells = np.repeat([0, 1], 50)
    source = draws(cells)
    source.take(np.array([1.0, 1.0]), 33)
    assert (cells[source.take(np.array([0.0, 1.0]), 20)] == 1).all()
    assert (cells[source.take(np.array([1.0, 0.0]), 20)] == 0).all()


@given(seed=st.integers(0, 100), count=st.integers(1, 17))
def test_each_example_of_a_cell_comes_once_an_epoch(seed, count):
    cells = np.array([0] * 5 + [1] * 11)
    source = draws(cells, seed=seed)
    taken = np.concatenate([source.take(np.array([0.5, 0.5]), count) for _ in range(40)])
    for cell, size in ((0, 5), (1, 11)):
        members = taken[cells[taken] == cell]
        for epoch in range(len(members) // size):
            assert len(set(members[epoch * size : (epoch + 1) * size].tolist())) == size


def test_copies_share_a_turn():
    """Contents 0 (three copies), 1, 2: each content comes equally often, and its copies in turn."""
    source = draws([0] * 5, copies=[0, 0, 0, 1, 2])
    assert source.mass.tolist() == [3.0]
    taken = source.take(np.ones(1), 9 * 3)
    assert np.bincount(taken).tolist() == [3, 3, 3, 9, 9]


def test_copies_in_two_cells_count_their_part_in_each():
    source = draws([0, 0, 1, 1], copies=[0, 1, 0, 2])
    assert source.mass.tolist() == [1.5, 1.5]
    taken = source.take(source.mass, 400)
    np.testing.assert_allclose(np.bincount(taken), [67, 133, 67, 133], atol=3)


@given(at=st.integers(0, 30), copies=st.booleans(), seed=st.integers(0, 20))
def test_restored_it_goes_on_as_it_would_have(at, copies, seed):
    rng = np.random.default_rng(seed)
    cells, codes = rng.integers(0, 4, 30), rng.integers(0, 12, 30) if copies else None

    def make():
        return draws(cells, codes, seed, n_cells=4)

    shares = rng.random((40, 4)) + 0.01
    uninterrupted, first = make(), make()
    expected = [uninterrupted.take(row, 9).tolist() for row in shares]
    actual = [first.take(row, 9).tolist() for row in shares[:at]]
    second = make()
    second.restore(first.state())
    actual += [second.take(row, 9).tolist() for row in shares[at:]]
    assert actual == expected


def test_the_order_of_the_files_changes_nothing():
    rng = np.random.default_rng(0)
    cells, permutation = rng.integers(0, 3, 40), rng.permutation(40)
    by_id = np.argsort(permutation)
    plain = draws(cells)
    permuted = CellDraws(cells[permutation], 3, by_id, None, 0)
    shares = np.array([0.2, 0.5, 0.3])
    assert plain.take(shares, 60).tolist() == permutation[permuted.take(shares, 60)].tolist()


@pytest.mark.parametrize("shares", [[0.0, 0.0, 1.0], [np.nan, 1.0, 0.0], [-1.0, 2.0, 0.0]])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(DataError, match="finite, >= 0 and not all zero"):
        draws([0, 1], n_cells=3).take(np.array(shares), 4)


def test_memory_is_a_few_bytes_an_example():
    n = 100_000
    source = draws(np.zeros(n, dtype=np.int32))
    arrays = [x for x in vars(source).values() if isinstance(x, np.ndarray)]
    assert sum(x.nbytes for x in arrays) <= 8 * n + 1000
