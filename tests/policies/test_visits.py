"""Visits of sources, where each further one is worth less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from cads.errors import ConfigError
from cads.policies.visits import visits

WORTHS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6)


def gain(x, worth, sizes, half):
    return sizes @ (worth * half * np.log1p(x / half))


@given(WORTHS, st.floats(0.1, 50.0), st.floats(0.2, 8.0), st.integers(0, 99))
def test_no_other_visits_are_worth_more(worth, passes, half, seed):
    worth, rng = np.array(worth), np.random.default_rng(seed)
    sizes = rng.integers(1, 100, len(worth)).astype(float)
    total = passes * sizes.sum()
    x = visits(worth, sizes, total, half)
    assert x.min() >= 0
    assert sizes @ x == pytest.approx(total)
    for _ in range(20):
        other = rng.dirichlet(np.ones(len(worth))) * total / sizes
        assert gain(other, worth, sizes, half) <= gain(x, worth, sizes, half) * (1 + 1e-9)


def test_they_are_those_of_a_general_optimiser():
    worth, sizes, half = np.array([1.0, 0.7, 0.4, 0.05]), np.array([10.0, 30.0, 20.0, 40.0]), 2.0
    for total in (20.0, 100.0, 1000.0):
        found = minimize(
            lambda x: -gain(x, worth, sizes, half),
            np.full(4, total / sizes.sum()),
            jac=lambda x: -sizes * worth / (1 + x / half),
            bounds=[(0, None)] * 4,
            constraints={
                "type": "eq",
                "fun": lambda x, t=total: (sizes @ x - t) / t,
                "jac": lambda x, t=total: sizes / t,
            },
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        np.testing.assert_allclose(visits(worth, sizes, total, half), found.x, atol=2e-3 * total / sizes.sum())


def test_a_short_run_visits_the_best_source_and_a_long_one_all():
    worth, sizes = np.array([0.5, 1.0, 0.25]), np.array([10.0, 10.0, 10.0])
    assert visits(worth, sizes, 5.0, 2.0).tolist() == [0.0, 0.5, 0.0]
    x = visits(worth, sizes, 1e6, 2.0)
    np.testing.assert_allclose(x / x.max(), worth, rtol=1e-3)


def test_sources_of_equal_worth_are_visited_alike():
    np.testing.assert_allclose(visits(np.ones(3), np.array([1.0, 5.0, 0.0]), 12.0, 2.0), 2.0)


def test_what_is_worth_nothing_is_not_visited():
    assert visits(np.array([1.0, 0.0]), np.ones(2), 1e6, 2.0).tolist() == [1e6, 0.0]


@pytest.mark.parametrize(("worth", "total"), [([0.0, 0.0], 1.0), ([1.0, -0.1], 1.0), ([1.0, 1.0], 0.0)])
def test_other_numbers_are_refused(worth, total):
    with pytest.raises(ConfigError, match="must be positive"):
        visits(np.array(worth), np.ones(2), total, 2.0)
