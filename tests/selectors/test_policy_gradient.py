"""The gradient that `search` follows: where it would be unbiased, and that it is biased as it is used."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from cads.estimators.control_variate import ControlVariate
from cads.estimators.enumeration import enumerate_masks, expected_gradient
from cads.estimators.reachable_loss import ReachableLossModel, mean_over_sources
from cads.estimators.score_function import corrected
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.space import SubsetSpace
from cads.selectors.search.policy_gradient import RegressionGradient, ascend_policy
from cads.selectors.search.proposals import initial_design, sample_candidates

FIDELITY = 0.1
PROBABILITIES = np.array([0.3, 0.5, 0.8])


def objective_of(seed, n):
    """An objective that falls with the share of right labels and with their number; it takes masks (K, n)."""
    right = 1 - np.random.default_rng(seed).uniform(0, 0.9, n)

    def objective(masks):
        size, clean = np.maximum(masks.sum(axis=1), 0.1), np.maximum(masks @ right, 0.05)
        return 2 / np.sqrt(clean) - np.log(0.1 + clean / size)

    return objective


def nothing(masks):
    return np.zeros(len(masks))


def fitted(draws, values, features, target_loss=nothing, reachable_loss=nothing):
    fidelity = np.full(len(draws), FIDELITY)
    return ControlVariate(
        draws, values, fidelity, fidelity, features=features, target_loss=target_loss, reachable_loss=reachable_loss
    )


def relative_bias(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def expectation(estimate, seed):
    """The exact mean of `estimate(one, other)` over two independent pairs of draws, and the exact gradient."""
    masks, policy = enumerate_masks(3), BernoulliPolicy(PROBABILITIES)
    values = objective_of(seed, 3)(masks)
    chances, scores = np.exp(policy.log_prob(masks)), policy.score(masks)

    def control(pair):
        h = fitted(masks[pair].astype(float), values[pair], lambda m: np.asarray(m, dtype=float))(masks, FIDELITY)
        return h, expected_gradient(h, PROBABILITIES)

    pairs = [np.array(pair) for pair in itertools.product(range(8), repeat=2)]
    controls = [control(pair) for pair in pairs]

    def one_sided(draws, h, slope):
        return corrected(values[draws], h[draws], slope, scores[draws])

    mean = np.zeros(3)
    for i, j in itertools.product(range(len(pairs)), repeat=2):
        chance = chances[pairs[i]].prod() * chances[pairs[j]].prod()
        mean += chance * estimate(one_sided, pairs[i], pairs[j], controls[i], controls[j])
    return mean, expected_gradient(values, PROBABILITIES)


def cross_fitted(one_sided, one, other, control_of_one, control_of_other):
    return (one_sided(one, *control_of_other) + one_sided(other, *control_of_one)) / 2


def fitted_to_its_own_draws(one_sided, one, _, control_of_one, __):
    return one_sided(one, *control_of_one)


@pytest.mark.parametrize("seed", range(3))
def test_independent_draws_and_a_regression_on_others_are_unbiased(seed):
    mean, exact = expectation(cross_fitted, seed)
    np.testing.assert_allclose(mean, exact, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_regression_on_the_same_draws_is_biased(seed):
    mean, exact = expectation(fitted_to_its_own_draws, seed)
    assert relative_bias(mean, exact) > 0.05


def as_used(world, n, count, seed=0):
    """The first gradient of `search` in a world without noise, with its draws, its penalty and its regression.

    Returns:
        the gradient, the policy, and the exact gradient of the objective.
    """
    space, objective = SubsetSpace(SimpleNamespace(source_sizes=np.full(n, 50))), objective_of(world, n)
    policy, rng = space.policy(), np.random.default_rng(world)
    wrong = rng.uniform(0, 0.9, n)  # as in `objective_of`
    theta_losses = 0.3 + 2 * wrong + 0.1 * rng.normal(size=n)
    draws = initial_design(space, sample_candidates(space, policy, seed), theta_losses, count, single=True)
    values = objective(draws) - objective(space.full[None])
    sizes = draws.sum(axis=1)
    reach = ReachableLossModel(space.weights(draws), 0.5 + 1.5 * draws @ wrong / sizes - 0.3 / sizes, space.sizes)
    control = fitted(
        draws,
        values,
        space.features,
        target_loss=lambda m: mean_over_sources(space.weights(m), space.sizes, theta_losses),
        reachable_loss=lambda m: reach(space.weights(m)),
    )
    masks = enumerate_masks(n)
    exact = objective(masks)
    exact[0] = exact[1:].max()
    gradient = RegressionGradient(space, policy, control, draws, values, FIDELITY, seed)
    return gradient, policy, expected_gradient(exact, policy.probabilities)


@pytest.mark.parametrize(("n", "count"), [(4, 6), (5, 10), (8, 10)])
def test_as_used_it_is_biased(n, count):
    """On average over what the policy draws, in worlds without noise."""
    for world in range(5):
        found = []
        for seed in range(8):
            gradient, policy, exact = as_used(world, n, count, seed)
            found.append(gradient.at(policy))
        assert relative_bias(np.mean(found, axis=0), exact) > 0.3


def test_it_points_downhill_all_the_same():
    cosines = []
    for world in range(10):
        gradient, policy, exact = as_used(world, 5, 10)
        found = gradient.at(policy)
        cosines.append(found @ exact / np.linalg.norm(found) / np.linalg.norm(exact))
    assert np.mean(cosines) > 0.8


def test_where_the_regression_fits_the_trials_its_gradient_is_all_there_is():
    space = SubsetSpace(SimpleNamespace(source_sizes=np.full(4, 50)))
    masks, slopes = enumerate_masks(4)[1:].astype(float), np.array([-1.0, 2.0, 0.5, -3.0])
    draws = np.concatenate([space.full[None], masks[:-1]])
    values = (draws - 1) @ slopes
    control = fitted(draws, values, lambda m: np.asarray(m, dtype=float))
    gradient, policy = RegressionGradient(space, space.policy(), control, draws, values, FIDELITY, 0), space.policy()
    np.testing.assert_allclose(gradient.at(policy), gradient.of_regression(policy), atol=0.05)
    moved = ascend_policy(policy, gradient, 30).probabilities
    assert ((moved > 0.5) == (slopes < 0)).all()
