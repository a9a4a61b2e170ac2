"""A D-optimal design: it learns more than draws at random, and starts with the draw it is given."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.estimators.design import MAX_COLUMNS, PRIOR, _columns, d_optimal, n_columns, spaced
from cads.estimators.enumeration import enumerate_masks


def information(draws):
    x = _columns(draws)
    return x, PRIOR * np.eye(x.shape[1])


@given(st.integers(2, 6), st.integers(1, 20))
def test_each_step_takes_the_draw_that_multiplies_the_determinant_by_most(n_sources, count):
    draws = enumerate_masks(n_sources)[:0:-1].astype(float)
    taken = d_optimal(draws, count)
    assert taken[0] == 0
    assert len(set(taken)) == len(taken) == min(count, len(draws))
    x, matrix = information(draws)
    for place, index in enumerate(taken):
        growth = np.array([np.linalg.slogdet(matrix + np.outer(row, row))[1] for row in x])
        rest = np.setdiff1d(np.arange(len(draws)), taken[:place])
        if place:
            assert growth[index] == pytest.approx(growth[rest].max(), abs=1e-6)
        matrix += np.outer(x[index], x[index])


def test_it_leaves_less_uncertain_than_draws_at_random():
    draws = enumerate_masks(5)[:0:-1].astype(float)
    x, prior = information(draws)

    def spread(chosen):
        inverse = np.linalg.inv(prior + x[chosen].T @ x[chosen])
        return np.einsum("mp,pq,mq->m", x, inverse, x).mean()

    rng = np.random.default_rng(0)
    random = [spread(np.r_[0, 1 + rng.permutation(30)[:8]]) for _ in range(200)]
    assert spread(d_optimal(draws, 9)) < np.quantile(random, 0.02)


def test_many_sources_are_compared_one_by_one():
    n = 40
    draws = np.random.default_rng(0).random((300, n)) < 0.5
    assert n_columns(n) == 1 + n <= MAX_COLUMNS < 1 + n + n * (n - 1) // 2
    taken = d_optimal(draws.astype(float), n + 1)
    x, _ = information(draws.astype(float))
    assert x.shape == (300, n + 1)
    assert np.linalg.matrix_rank(x[taken]) == n + 1


def test_a_source_that_never_changes_is_no_column_of_noise():
    draws = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.5]])
    assert set(d_optimal(draws, 2)) == {0, 1}


@pytest.mark.parametrize(("n", "count", "kept"), [(6, 6, [0, 1, 2, 3, 4, 5]), (6, 4, [0, 2, 3, 5]), (3, 9, [0, 1, 2])])
def test_draws_are_spaced_evenly(n, count, kept):
    assert spaced(np.arange(n), count).tolist() == kept
