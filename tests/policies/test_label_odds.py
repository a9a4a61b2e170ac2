"""The probability that a label is right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr

from cads.policies.label_odds import START, LabelOdds
from cads.policies.tilt import tilted


def odds(wrong):
    label_odds = LabelOdds(len(wrong), np.log(10), 1000)
    label_odds.wrong = np.array(wrong)
    return label_odds


@given(wrong=st.floats(0.01, 0.99), loss=st.floats(0, 12))
def test_it_is_the_posterior(wrong, loss):
    right = (1 - wrong) * np.exp(-loss)
    result = odds([wrong]).weights(np.array([0]), np.array([loss]))
    assert result[0] == pytest.approx(right / (right + wrong / 10))


@given(wrong=st.floats(0.05, 0.95), loss=st.floats(0, 8))
def test_it_is_a_mirror_descent_step_on_the_penalty(wrong, loss):
    """argmin_w  w (l - l0) + KL(Bernoulli(w) || Bernoulli(1 - rho)), found numerically."""

    def objective(w):
        divergence = rel_entr(w, 1 - wrong) + rel_entr(1 - w, wrong)
        return w * (loss - np.log(10)) + divergence

    best = minimize_scalar(objective, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-10}).x
    assert odds([wrong]).weights(np.array([0]), np.array([loss]))[0] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("batch", [8, 64])
def test_the_share_of_wrong_labels_is_learned(batch):
    """A calibrated model, whose first choice (probability 0.9) is right as often as that: rho goes to the truth."""
    rng, truth = np.random.default_rng(0), np.array([0.05, 0.5, 0.9])
    learned = LabelOdds(3, np.log(10), 9000)
    assert learned.wrong.tolist() == [START] * 3
    for _ in range(120_000 // batch):
        sources = rng.integers(0, 3, batch)
        flipped = rng.random(batch) < truth[sources]
        # A wrong label is uniform over all ten: one in ten is the first choice by chance.
        first_choice = rng.random(batch) < np.where(flipped, 0.1, 0.9)
        losses = -np.log(np.where(first_choice, 0.9, 0.1 / 9))
        learned.update(sources, learned.weights(sources, losses))
    np.testing.assert_allclose(learned.wrong, truth, atol=0.06)


def test_sources_that_are_not_drawn_keep_theirs():
    learned = odds([0.2, 0.7])
    learned.update(np.array([0, 0]), np.array([0.0, 0.0]))
    assert learned.wrong[1] == 0.7
    assert learned.wrong[0] > 0.2


class TestTilt:
    def test_entropic_mirror_descent(self):
        """argmin_v  sum v_s z_s + KL(v || uniform) / kappa on the simplex is the tilt, up to its scale."""
        z, rng = np.array([0.3, -0.2, 0.9]), np.random.default_rng(0)
        best = tilted(z, 2.0, 0.0)
        best /= best.sum()

        def objective(v):
            return v @ z + rel_entr(v, 1 / 3).sum() / 2.0

        for _ in range(200):
            other = rng.dirichlet(np.ones(3))
            assert objective(best) <= objective(other) + 1e-12

    def test_bounds(self):
        assert tilted(np.array([0.0, 9.0]), 2.0, 0.02).tolist() == [1.0, 0.02]
        assert tilted(np.array([0.0, 9.0]), 2.0, 0.0, max_difference=3)[1] == pytest.approx(np.exp(-6))
