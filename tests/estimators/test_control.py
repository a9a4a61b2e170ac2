"""The regression on trials with the penalty held at a weight."""

import itertools

import numpy as np
import pytest

from cads.estimators.control_variate import ControlVariate

CUBE = np.array(list(itertools.product([0.0, 1.0], repeat=4)))


def risk(draws):
    return 1 + draws[:, 0]


def reach(draws):
    return 2 - draws[:, 1]


def held(values, alpha, features):
    ones = np.ones(len(CUBE))
    return ControlVariate(
        CUBE, values, ones, ones, features=features, target_loss=risk, reachable_loss=reach, alpha=alpha
    )


@pytest.mark.parametrize("alpha", [0.0, 0.1, 3.0])
def test_a_held_penalty_is_followed_whatever_was_measured(alpha):
    control = held(-5 * risk(CUBE), alpha, lambda draws: np.zeros((len(draws), 1)))
    assert (control.c1, control.c2) == (alpha, alpha)
    differences = control(CUBE) - control(CUBE[:1])
    gaps = risk(CUBE) - reach(CUBE)
    np.testing.assert_allclose(differences, alpha * (gaps - gaps[0]), atol=1e-12)


def test_the_regression_takes_what_a_held_penalty_leaves():
    values = CUBE @ np.array([1.0, -2.0, 0.5, 3.0])
    control = held(values, 0.7, lambda draws: draws)
    np.testing.assert_allclose(control(CUBE), values, atol=0.05)
