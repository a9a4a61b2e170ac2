"""Every estimator against the truth: all masks, or all tuples of masks, enumerated."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cads.errors import ConfigError
from cads.estimators.control_variate import fit_control
from cads.estimators.enumeration import enumerate_masks, expected, expected_gradient
from cads.estimators.rao_blackwell import expected_mean, rao_blackwell, rao_blackwell_leading
from cads.estimators.score_function import Baseline, corrected, direct, penalty
from cads.policies.bernoulli import BernoulliPolicy

LAW = settings(deadline=None)
"""A busy machine must not fail a law."""

SEEDS = st.integers(0, 2**32 - 1)
WIDTH = 4
"""Items whose pairs of masks (256) are enumerated."""


def world(seed: int, n: int = WIDTH) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities s (n,), the value of each mask (2^n,), its score (2^n, n) and its probability (2^n,)."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.1, 0.9, n)
    policy = BernoulliPolicy(s)
    masks = enumerate_masks(n)
    return s, rng.normal(2, 3, 2**n), policy.score(masks), np.exp(policy.log_prob(masks))


def moments(
    estimate: Callable[[np.ndarray], np.ndarray], probabilities: np.ndarray, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and covariance trace of estimate(indices of masks), over all tuples of `draws` masks."""
    tuples = [np.array(t) for t in product(range(probabilities.size), repeat=draws)]
    chances = np.array([probabilities[t].prod() for t in tuples])
    estimates = np.array([estimate(t) for t in tuples])
    mean = chances @ estimates
    return mean, chances @ ((estimates - mean) ** 2).sum(axis=1)


def ratio(losses: np.ndarray, weights: np.ndarray, empty: float) -> np.ndarray:
    """R(m) of every mask: (2^n,)."""
    shares = enumerate_masks(losses.size) * weights
    totals = shares.sum(axis=1)
    return np.where(totals > 0, shares @ losses / np.where(totals > 0, totals, 1), empty)


@LAW
@given(SEEDS)
def test_leave_one_out_is_unbiased(seed: int) -> None:
    s, values, scores, chances = world(seed)
    mean, _ = moments(lambda t: direct(values[t], scores[t]), chances, 2)
    np.testing.assert_allclose(mean, expected_gradient(values, s), atol=1e-10)


@LAW
@given(SEEDS, st.integers(1, 3))
def test_no_baseline_is_unbiased_and_the_mean_baseline_shrinks_by_its_factor(seed: int, draws: int) -> None:
    s, values, scores, chances = world(seed, n=3)
    truth = expected_gradient(values, s)
    mean, _ = moments(lambda t: direct(values[t], scores[t], "none"), chances, draws)
    np.testing.assert_allclose(mean, truth, atol=1e-10)
    mean, _ = moments(lambda t: direct(values[t], scores[t], "mean"), chances, draws)
    np.testing.assert_allclose(mean, (draws - 1) / draws * truth, atol=1e-10)


@LAW
@given(SEEDS, st.integers(1, 10))
def test_a_single_draw_is_unbiased_for_up_to_ten_items(seed: int, n: int) -> None:
    s, values, scores, chances = world(seed, n)
    np.testing.assert_allclose((chances * values) @ scores, expected_gradient(values, s), atol=1e-9)


@LAW
@given(SEEDS, st.floats(-1e3, 1e3))
def test_leave_one_out_ignores_a_constant_and_the_order_of_draws(seed: int, constant: float) -> None:
    rng = np.random.default_rng(seed)
    values, scores = rng.normal(size=6), rng.normal(size=(6, 3))
    estimate = direct(values, scores)
    np.testing.assert_allclose(direct(values + constant, scores), estimate, atol=1e-9)
    order = rng.permutation(6)
    np.testing.assert_allclose(direct(values[order], scores[order]), estimate, atol=1e-12)
    by_definition = sum((values[k] - np.delete(values, k).mean()) * scores[k] / len(values) for k in range(len(values)))
    np.testing.assert_allclose(estimate, by_definition, atol=1e-12)


@LAW
@given(SEEDS, st.floats(0, 5))
def test_penalty_is_unbiased_for_the_weighted_gap(seed: int, alpha: float) -> None:
    s, training, scores, chances = world(seed)
    reachable = np.random.default_rng(seed + 1).normal(size=training.size)
    mean, _ = moments(lambda t: penalty(training[t], reachable[t], scores[t], alpha), chances, 2)
    np.testing.assert_allclose(mean, alpha * expected_gradient(training - reachable, s), atol=1e-9)


inclusions = st.integers(1, 10).flatmap(
    lambda n: arrays(np.float64, n, elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-12, 1 - 1e-12, 1.0])))
)


@LAW
@given(inclusions, SEEDS, st.floats(-5, 5))
def test_rao_blackwell_is_the_enumerated_derivative(s: np.ndarray, seed: int, empty: float) -> None:
    losses = np.random.default_rng(seed).normal(2, 1, s.size)
    values = ratio(losses, np.ones(s.size), empty)
    assert expected_mean(losses, s, empty=empty) == pytest.approx(expected(values, s), abs=1e-10)
    gradient = rao_blackwell(losses, s, empty=empty)
    np.testing.assert_allclose(gradient, expected_gradient(values, s), atol=1e-10)


@LAW
@given(inclusions, SEEDS, st.floats(-5, 5), st.floats(0, 6))
def test_rao_blackwell_with_unequal_sources(s: np.ndarray, seed: int, empty: float, decades: float) -> None:
    rng = np.random.default_rng(seed)
    losses, weights = rng.normal(2, 1, s.size), 10 ** rng.uniform(0, decades, s.size)
    values = ratio(losses, weights, empty)
    assert expected_mean(losses, s, weights, empty) == pytest.approx(expected(values, s), abs=1e-9)
    gradient = rao_blackwell(losses, s, weights, empty)
    np.testing.assert_allclose(gradient, expected_gradient(values, s), atol=1e-9)


@pytest.mark.parametrize(("n", "rate"), [(30, 1.0), (60, 0.5), (200, 0.9), (3000, 0.01), (3000, 1.0)])
def test_both_quadratures_agree_for_many_items(n: int, rate: float) -> None:
    rng = np.random.default_rng(n)
    s, losses = np.minimum(rng.uniform(0, 2 * rate, n), 1.0), rng.normal(size=n)
    gradient = rao_blackwell(losses, s)
    np.testing.assert_allclose(rao_blackwell(losses, s, np.full(n, 7.0)), gradient, atol=1e-11 * np.abs(gradient).max())


def test_rao_blackwell_is_the_derivative_of_the_mean_for_many_items() -> None:
    rng = np.random.default_rng(0)
    n = 500
    s, losses, direction = rng.uniform(0.2, 0.8, n), rng.normal(size=n), rng.normal(size=n)
    step = 1e-4
    slope = (expected_mean(losses, s + step * direction) - expected_mean(losses, s - step * direction)) / (2 * step)
    assert rao_blackwell(losses, s) @ direction == pytest.approx(slope, rel=1e-6)


def test_rao_blackwell_ignores_the_order_of_items() -> None:
    rng = np.random.default_rng(0)
    s, losses, weights, order = rng.random(20), rng.random(20), rng.random(20), rng.permutation(20)
    for a in (None, weights):
        permuted = rao_blackwell(losses[order], s[order], None if a is None else a[order])
        np.testing.assert_allclose(permuted, rao_blackwell(losses, s, a)[order], atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_leading_order_is_wrong_by_one_over_the_expected_size(weighted: bool) -> None:
    errors = []
    for n in (100, 1000, 10_000):
        rng = np.random.default_rng(n)
        s, losses = rng.uniform(0.2, 0.8, n), rng.normal(size=n)
        weights = rng.uniform(1, 3, n) if weighted else None
        exact = rao_blackwell(losses, s, weights)
        leading = rao_blackwell_leading(losses, s, weights)
        errors.append(np.linalg.norm(leading - exact) / np.linalg.norm(exact) * s.sum())
    assert max(errors) < 3
    assert errors[0] == pytest.approx(errors[2], rel=0.5)


def test_enumeration_holds_every_mask_once() -> None:
    masks = enumerate_masks(5)
    assert masks.shape == (32, 5)
    assert len({tuple(row) for row in masks}) == 32
    assert [int(row @ 2 ** np.arange(5)) for row in masks] == list(range(32))
    s = np.array([0.0, 0.2, 0.5, 0.7, 1.0])
    assert expected(np.ones(32), s) == pytest.approx(1)
    np.testing.assert_allclose([expected(masks[:, i], s) for i in range(5)], s)


@LAW
@given(inclusions, SEEDS)
def test_the_enumerated_gradient_is_the_slope(s: np.ndarray, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=2**s.size)
    # The expectation is linear in each s_i, so the slope between 0 and 1 is the derivative.
    slopes = [
        expected(values, np.where(np.arange(s.size) == i, 1.0, s))
        - expected(values, np.where(np.arange(s.size) == i, 0.0, s))
        for i in range(s.size)
    ]
    np.testing.assert_allclose(expected_gradient(values, s), slopes, atol=1e-12)


@pytest.mark.parametrize("baseline", ["loo", "none"])
@LAW
@given(SEEDS)
def test_corrected_is_unbiased_for_any_control(baseline: Baseline, seed: int) -> None:
    s, values, scores, chances = world(seed, n=3)
    control = 10 * np.random.default_rng(seed + 1).normal(size=values.size)
    slope = expected_gradient(control, s)
    mean, _ = moments(lambda t: corrected(values[t], control[t], slope, scores[t], baseline), chances, 2)
    np.testing.assert_allclose(mean, expected_gradient(values, s), atol=1e-9)


@LAW
@given(SEEDS)
def test_a_control_that_follows_the_values_lowers_the_variance(seed: int) -> None:
    s, values, scores, chances = world(seed)
    control = values + 0.2 * np.random.default_rng(seed + 1).normal(size=values.size)
    slope = expected_gradient(control, s)
    _, plain = moments(lambda t: direct(values[t], scores[t]), chances, 2)
    _, reduced = moments(lambda t: corrected(values[t], control[t], slope, scores[t]), chances, 2)
    assert reduced < 0.5 * plain


def test_a_perfect_control_leaves_no_variance() -> None:
    s, values, scores, chances = world(0)
    slope = expected_gradient(values, s)
    _, variance = moments(lambda t: corrected(values[t], values[t], slope, scores[t]), chances, 2)
    assert variance < 1e-20


@LAW
@given(SEEDS, st.floats(0, 4), st.floats(0, 4))
def test_fit_control_recovers_the_weights(seed: int, c1: float, c2: float) -> None:
    rng = np.random.default_rng(seed)
    r, reachable = rng.normal(2, 1, 40), rng.normal(1, 1, 40)
    fitted = fit_control(5 + c1 * r - c2 * reachable, r, reachable, ridge=0.0)
    np.testing.assert_allclose(fitted, (c1, c2), atol=1e-8)


@LAW
@given(SEEDS, st.integers(2, 8), st.floats(0.01, 10))
def test_fit_control_is_non_negative_timid_and_free_of_units(seed: int, count: int, ridge: float) -> None:
    f, r, reachable = np.random.default_rng(seed).normal(size=(3, count))
    fitted = np.array(fit_control(f, r, reachable, ridge))
    assert (fitted >= 0).all()
    np.testing.assert_allclose(fit_control(7 * f + 3, r, reachable, ridge), 7 * fitted, atol=1e-8)
    np.testing.assert_allclose(fit_control(f, 7 * r - 2, 7 * reachable, ridge), fitted / 7, atol=1e-8)
    shifted = np.array(fit_control(f, r, reachable, ridge + 100))
    spread = np.array([r.std(), reachable.std()])
    assert np.linalg.norm(shifted * spread) <= np.linalg.norm(fitted * spread) + 1e-9


def test_fit_control_survives_poor_triples() -> None:
    rising = [1.0, 2.0, 3.0]
    assert fit_control([], [], []) == (0.0, 0.0)
    assert fit_control([1.0], [1.0], [1.0]) == (0.0, 0.0)
    assert fit_control([4.0, 4.0, 4.0], rising, rising) == (0.0, 0.0)
    assert fit_control(rising, [0.1, 0.1, 0.1], [5.0, 5.0, 5.0]) == (0.0, 0.0)
    c1, c2 = fit_control(rising, rising, [0.3, 0.3, 0.3])
    assert 0 < c1 < 1
    assert c2 == 0
    assert fit_control([*rising, np.nan, 9.0], [*rising, 1.0, np.inf], [0.3] * 5) == (c1, c2)
    assert np.isfinite(fit_control(np.array(rising) * 1e307, rising, rising)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: direct([1.0], [[1.0]]),
        lambda: direct([1.0, 2.0], [[1.0]]),
        lambda: direct([1.0, np.inf], [[1.0], [1.0]]),
        lambda: direct([], np.empty((0, 2)), "none"),
        lambda: direct([1.0, 2.0], [[1.0], [1.0]], "median"),
        lambda: penalty([1.0, 2.0], [1.0], [[1.0], [1.0]], 1.0),
        lambda: penalty([1.0, 2.0], [1.0, 1.0], [[1.0], [1.0]], np.nan),
        lambda: corrected([1.0, 2.0], [1.0, 1.0], [1.0, 1.0], [[1.0], [1.0]]),
        lambda: enumerate_masks(17),
        lambda: enumerate_masks(0),
        lambda: expected([1.0, 2.0, 3.0], [0.5]),
        lambda: expected([1.0, 2.0], [1.5]),
        lambda: expected_gradient([1.0, 2.0], [np.nan]),
        lambda: expected_mean([1.0, 2.0], [0.5]),
        lambda: expected_mean([1.0], [0.5], empty=np.inf),
        lambda: rao_blackwell([1.0], [0.5], [0.0]),
        lambda: rao_blackwell_leading([1.0], [1.5]),
        lambda: rao_blackwell_leading([1.0], [0.0]),
        lambda: fit_control([1.0], [1.0, 2.0], [1.0]),
        lambda: fit_control([1.0], [1.0], [1.0], ridge=-1.0),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        call()
