"""Policies of a given expected size, and its course."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from cads.errors import ConfigError
from cads.policies.annealing import annealed_size, cosine
from cads.policies.simplex import project_to_sum
from cads.policies.sized import SizedPolicy

points = arrays(np.float64, st.integers(1, 8), elements=st.floats(-3, 3))


@given(points, st.floats(0, 1))
def test_the_projection_is_feasible_and_a_shift_that_is_clipped(point, share):
    k = share * len(point)
    x = project_to_sum(point, k)
    assert x.sum() == pytest.approx(k, abs=1e-9)
    assert (x >= 0).all()
    assert (x <= 1).all()
    inside = (x > 1e-9) & (x < 1 - 1e-9)
    shifts = (point - x)[inside]
    assert np.ptp(shifts) < 1e-9 if len(shifts) else True
    np.testing.assert_allclose(project_to_sum(x, k), x, atol=1e-9)
    np.testing.assert_allclose(project_to_sum(point + 5.0, k), x, atol=1e-9)


def test_the_projection_is_the_nearest_point():
    point, k = np.array([0.9, -0.5, 0.4, 1.7, 0.1]), 2.0
    result = minimize(
        lambda x: ((x - point) ** 2).sum(),
        np.full(5, 0.4),
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda x: x.sum() - k},
    )
    np.testing.assert_allclose(project_to_sum(point, k), result.x, atol=1e-6)


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="3 probabilities cannot sum to 4"):
        project_to_sum(np.ones(3), 4)


@given(points, st.floats(0, 1), st.integers(0, 100))
def test_steps_keep_the_size(gradient, share, seed):
    n = len(gradient)
    policy = SizedPolicy(np.random.default_rng(seed).random(n), share * n)
    policy.step(gradient, 0.3)
    assert policy.probabilities.sum() == pytest.approx(share * n, abs=1e-9)
    policy.resize(n)
    np.testing.assert_array_equal(policy.probabilities, 1)


def test_it_is_read_back(tmp_path):
    policy = SizedPolicy([0.5, 0.25, 1.0], 1.5)
    policy.save(tmp_path / "policy")
    loaded = SizedPolicy.load(tmp_path / "policy")
    assert loaded.size == 1.5
    np.testing.assert_allclose(loaded.probabilities, policy.probabilities)


def test_the_course_is_that_of_pbcs():
    """The formula of the authors' code, at each of its 2,000 outer steps."""
    steps = 2000
    ts, te = int(0.16 * steps), int(0.6 * steps)
    for step in range(0, steps, 37):
        if step < ts:
            expected = 1000.0
        elif step < te:
            expected = 200 + 800 * (1 - (step - ts) / (te - ts)) ** 3
        else:
            expected = 200.0
        assert annealed_size(1000, 200, step / steps) == pytest.approx(expected)
        assert cosine(step / steps) == pytest.approx(0.5 * (1 + np.cos(np.pi * step / steps)))
    assert np.mean([cosine(t) for t in np.linspace(0, 1, 1001)]) == pytest.approx(0.5)
