"""l* and the regression on trials: what they are fitted to comes back, and what says nothing weighs nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.estimators.control_variate import ControlVariate
from cads.estimators.design import n_columns
from cads.estimators.loss_curves import extrapolate
from cads.estimators.reachable_loss import ReachableLossModel, effective_size, mean_over_sources
from cads.search.space import SubsetSpace

SIZES = np.array([50, 100, 200, 400])
MASKS = np.array([m for m in itertools.product([0.0, 1.0], repeat=4) if any(m)])
SEEDS = st.integers(0, 2**32 - 1)


class Nothing:
    """Examples of which only the number is known."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


# Extrapolation.


@given(
    exponents=st.lists(st.floats(0, 2), min_size=1, max_size=4),
    scale=st.floats(0.1, 10),
    steps=st.integers(2, 60),
    further=st.floats(1, 1000),
)
def test_a_power_law_is_continued_exactly(exponents, scale, steps, further):
    flops = 1e6 * np.arange(1, steps + 1)
    losses = scale * (flops[:, None] / flops[-1]) ** -np.array(exponents)
    budget = further * flops[-1]
    expected = scale * further ** -np.array(exponents)
    np.testing.assert_allclose(extrapolate(flops, losses, budget), np.maximum(expected, 0), rtol=1e-6)


@given(SEEDS, st.integers(2, 40), st.floats(0.1, 100))
def test_more_compute_never_reaches_a_higher_loss(seed, steps, further):
    rng = np.random.default_rng(seed)
    flops, losses = np.cumsum(rng.uniform(1, 2, steps)), rng.uniform(0.01, 5, (steps, 3))
    at_end, later = (extrapolate(flops, losses, flops[-1] * f) for f in (1, 1 + further))
    assert (later <= at_end * (1 + 1e-12)).all()
    assert (later >= 0).all()


@given(SEEDS, st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_extrapolation_has_no_units(seed, flops_unit, loss_unit):
    rng = np.random.default_rng(seed)
    flops, losses = np.cumsum(rng.uniform(1, 2, 20)), rng.uniform(0.1, 5, (20, 2))
    scaled = extrapolate(flops * flops_unit, losses * loss_unit, 100 * flops_unit)
    np.testing.assert_allclose(scaled, loss_unit * extrapolate(flops, losses, 100.0), rtol=1e-6)


def test_a_curve_that_diverged_does_not_disturb_the_others():
    flops, losses = np.arange(1.0, 21), np.random.default_rng(0).uniform(1, 2, (20, 3))
    spoilt = losses.copy()
    spoilt[10:, 1] = np.nan
    actual, expected = extrapolate(flops, spoilt, 40.0), extrapolate(flops, losses, 40.0)
    assert np.isnan(actual).tolist() == [False, True, False]
    np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_batches_that_were_skipped_are_left_out_of_their_curve_alone(scale):
    """On a power law every part of the curve says the same, and of a rising end the level of what is left."""
    flops = np.arange(1.0, 21)
    losses = scale * np.stack([flops**-0.5, flops**-0.2, np.full(20, 2.0)], axis=1)
    spoilt = losses.copy()
    spoilt[[6, 11, 19], [0, 0, 0]] = np.nan, np.inf, np.nan
    spoilt[12, 2] = np.nan
    np.testing.assert_allclose(extrapolate(flops, spoilt, 80.0), scale * np.array([80**-0.5, 80**-0.2, 2.0]))


def test_two_finite_steps_are_the_least():
    flops, losses = np.arange(1.0, 6), np.full((5, 2), np.nan)
    losses[3:, 0], losses[4:, 1] = 1.0, 1.0
    result = extrapolate(flops, losses, 10.0)
    assert result[0] == pytest.approx(1.0)
    assert np.isnan(result[1])


def test_a_loss_of_zero_is_reached_and_one_step_is_no_curve():
    flops = np.arange(1.0, 11)
    assert 0 <= extrapolate(flops, np.zeros((10, 1)), 100.0)[0] < 1e-5
    with pytest.raises(ConfigError, match="1 steps"):
        extrapolate(flops[:1], np.ones((1, 2)), 10.0)


# Sizes and means.


@given(st.lists(st.integers(1, 1000), min_size=4, max_size=4))
def test_the_effective_size_of_a_mask_is_its_count(sizes):
    np.testing.assert_allclose(effective_size(MASKS, np.array(sizes)), MASKS @ np.array(sizes))


@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_effective_size_is_at_most_the_count_and_free_of_scale(seed, scale):
    weights = np.random.default_rng(seed).uniform(0, 1, (5, 4)) + 1e-6
    result = effective_size(weights, SIZES)
    assert (result <= SIZES.sum() * (1 + 1e-12)).all()
    np.testing.assert_allclose(effective_size(scale * weights, SIZES), result)


@given(SEEDS)
def test_the_mean_over_sources_is_the_mean_over_their_examples(seed):
    rng = np.random.default_rng(seed)
    losses = rng.uniform(0, 3, 4)
    codes = np.repeat(np.arange(4), SIZES)
    for mask, mean in zip(MASKS, mean_over_sources(MASKS, SIZES, losses), strict=True):
        assert mean == pytest.approx(losses[codes[mask[codes] == 1]].mean())
    weights = rng.uniform(0.01, 1, (3, 4))
    for row, mean in zip(weights, mean_over_sources(weights, SIZES, losses), strict=True):
        assert mean == pytest.approx(np.average(losses[codes], weights=row[codes]))


# l* over masks.


def ratios(weights):
    amount = weights * SIZES
    return amount / amount.sum(axis=1, keepdims=True)


def log_linear(seed):
    """A law of the kind that is fitted: log l* linear in ratios and log size."""
    rng = np.random.default_rng(seed)
    by_ratio, by_size = rng.uniform(-1, 1, 4), rng.uniform(-0.5, 0)
    return lambda w: np.exp(ratios(w) @ by_ratio + by_size * np.log(effective_size(w, SIZES)))


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_a_log_linear_law_comes_back(seed):
    law, rng = log_linear(seed), np.random.default_rng(seed + 1)
    trained, others = rng.dirichlet(np.ones(4), 60) / SIZES, rng.dirichlet(np.ones(4), 30) / SIZES
    fitted = ReachableLossModel(trained, law(trained), SIZES, ridge=1e-9)
    np.testing.assert_allclose(fitted(others), law(others), rtol=1e-4)
    np.testing.assert_allclose(fitted(7 * others), fitted(others), rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_it_passes_near_its_own_points_and_nearer_than_their_mean(seed):
    law = log_linear(seed)
    reached = law(MASKS)
    fitted = np.log(ReachableLossModel(MASKS, reached, SIZES)(MASKS))
    spread = np.log(reached).std()
    assert np.sqrt(np.mean((fitted - np.log(reached)) ** 2)) < 0.4 * spread + 1e-9


def test_pairs_that_are_harder_together_are_seen():
    first, second = ratios(MASKS)[:, 0], ratios(MASKS)[:, 3]
    reached = np.exp(-1 + 6 * first * second)
    fitted = ReachableLossModel(MASKS, reached, SIZES, ridge=1e-6)
    np.testing.assert_allclose(fitted(MASKS), reached, rtol=0.02)


def test_runs_that_diverged_are_left_out():
    reached = log_linear(0)(MASKS)
    spoilt = reached.copy()
    spoilt[[2, 5]] = np.nan, np.inf
    sound = np.isfinite(spoilt)
    expected = ReachableLossModel(MASKS[sound], reached[sound], SIZES)(MASKS)
    np.testing.assert_allclose(ReachableLossModel(MASKS, spoilt, SIZES)(MASKS), expected)
    with pytest.raises(ConfigError, match="no run reached"):
        ReachableLossModel(MASKS, np.full(len(MASKS), np.nan), SIZES)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(2, 40), st.floats(1e-3, 1))
def test_the_fit_is_the_ridge_regression(seed, runs, ridge):
    """Against least squares on rows that stand for the shrinkage."""
    rng = np.random.default_rng(seed)
    weights, reached = rng.uniform(0.1, 1, (runs, 4)), rng.uniform(0.1, 3, runs)

    def phi(w):
        i, j = np.triu_indices(4, k=1)
        r = ratios(w)
        return np.hstack([r, r[:, i] * r[:, j], np.log(effective_size(w, SIZES))[:, None]])

    x, y = phi(weights), np.log(reached)
    rows = np.vstack([x - x.mean(axis=0), np.sqrt(ridge * runs) * np.eye(11)])
    slope = np.linalg.lstsq(rows, np.concatenate([y - y.mean(), np.zeros(11)]), rcond=None)[0]
    others = rng.uniform(0.1, 1, (20, 4))
    expected = np.exp((phi(others) - x.mean(axis=0)) @ slope + y.mean())
    np.testing.assert_allclose(ReachableLossModel(weights, reached, SIZES, ridge)(others), expected, rtol=1e-8)


def test_many_sources_have_no_pairs_and_are_fitted_in_no_time():
    """Of 2,000 sources there would be two million pairs, and a matrix of their squares."""
    n = 2000
    rng = np.random.default_rng(0)
    sizes, draws = rng.integers(1, 9, n).astype(float), (rng.random((12, n)) < 0.5).astype(float)
    trend = effective_size(draws, sizes) / sizes.sum()
    fitted = ReachableLossModel(draws, np.exp(-trend), sizes, ridge=1e-6)
    np.testing.assert_allclose(fitted(draws), np.exp(-trend), rtol=1e-3)


@pytest.mark.parametrize(("sources", "columns"), [(1, 2), (5, 16), (22, 254), (23, 24), (300, 301)])
def test_features_are_as_many_as_are_charged_for(sources, columns):
    pool = Pool(
        [str(i) for i in range(sources)], Nothing(sources), np.arange(sources), [f"s{i}" for i in range(sources)]
    )
    space = SubsetSpace(pool)
    draws = np.tri(sources)[-3:]
    assert space.features(draws).shape == (len(draws), columns)
    assert space.n_features == columns == n_columns(sources)


def test_one_run_says_the_same_of_all():
    np.testing.assert_allclose(ReachableLossModel(MASKS[-1:], np.array([0.7]), SIZES)(MASKS), 0.7)


# The regression on trials.


CUBE = np.array(list(itertools.product([0.0, 1.0], repeat=5)))
PAIRS = np.triu_indices(5, k=1)


def features(draws):
    return np.hstack([draws, draws[:, PAIRS[0]] * draws[:, PAIRS[1]]])


def risk(draws):
    return 1 + draws[:, 0]


def reach(draws):
    return 2 - draws[:, 1]


def control(draws, values, weights=None, fidelity=None):
    weights = np.ones(len(draws)) if weights is None else weights
    fidelity = np.ones(len(draws)) if fidelity is None else fidelity
    return ControlVariate(draws, values, weights, fidelity, features=features, target_loss=risk, reachable_loss=reach)


@pytest.mark.parametrize(
    "values",
    [
        (2 * CUBE[:, 2] - 1) * (2 * CUBE[:, 3] - 1),
        CUBE[:, 4],
        -risk(CUBE),
        reach(CUBE),
        np.full(len(CUBE), 3.0),
    ],
    ids=["a pair", "another item", "against the risk", "against the reach", "nothing"],
)
def test_a_penalty_that_says_nothing_or_the_opposite_weighs_nothing(values):
    fitted = control(CUBE, values)
    assert fitted.c1 == pytest.approx(0, abs=1e-9)
    assert fitted.c2 == pytest.approx(0, abs=1e-9)


def test_a_penalty_that_says_all_is_followed():
    fitted = control(CUBE, 3 * risk(CUBE) - 2 * reach(CUBE))
    assert 2.5 < fitted.c1 <= 3
    assert 1.6 < fitted.c2 <= 2


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, penalty=st.floats(0, 3))
def test_items_and_pairs_come_back(seed, penalty):
    rng = np.random.default_rng(seed)
    coefficients = rng.normal(size=15)

    def law(draws):
        return 5 + penalty * risk(draws) + features(draws) @ coefficients

    order = rng.permutation(32)
    seen, others = CUBE[order[:26]], CUBE[order[26:]]
    fitted = control(seen, law(seen))
    spread = law(CUBE).std()
    assert np.abs(fitted(seen) - law(seen)).max() < 0.1 * spread
    assert np.sqrt(np.mean((fitted(others) - law(others)) ** 2)) < 0.5 * spread


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_noise_is_not_followed(seed):
    """With nothing to learn the control stays near the mean, so that it cannot add much variance."""
    rng = np.random.default_rng(seed)
    seen, values = CUBE[rng.permutation(32)[:20]], rng.normal(size=20)
    fitted = control(seen, values)
    unseen = fitted(CUBE) - values.mean()
    assert np.sqrt(np.mean(unseen**2)) < 2 * values.std()


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(-100, 100))
def test_a_constant_and_the_order_of_runs_change_nothing(seed, constant):
    rng = np.random.default_rng(seed)
    values, weights, order = rng.normal(size=32), rng.uniform(0.5, 1, 32), rng.permutation(32)
    expected = control(CUBE, values, weights)(CUBE)
    np.testing.assert_allclose(control(CUBE[order], values[order], weights[order])(CUBE), expected, atol=1e-7)
    np.testing.assert_allclose(control(CUBE, values + constant, weights)(CUBE), expected + constant, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.25, 1 / 16])
def test_the_error_left_out_is_in_the_unit_of_the_values(weight):
    """Where nothing can be learned it is the deviation of each value from the mean of the others."""
    values = np.random.default_rng(0).normal(size=12)
    others = (values.sum() - values) / 11
    fitted = control(np.ones((12, 5)), values, np.full(12, weight))
    assert fitted.loo_error == pytest.approx(np.sqrt(np.mean((values - others) ** 2)))


def test_the_trend_over_fidelities_goes_on_to_the_horizon():
    """What is best changes with the budget: item 2 helps in short runs and hurts in long ones."""

    def law(draws, fidelity):
        return draws[:, 2] * (1 + 0.8 * np.log(fidelity)) - draws[:, 3]

    fidelity = np.repeat([1 / 16, 1 / 8, 1 / 4], len(CUBE))
    draws = np.tile(CUBE, (3, 1))
    fitted = control(draws, law(draws, fidelity), fidelity=fidelity)
    assert fitted.horizon == pytest.approx(1 / 2)
    short, long = fitted(CUBE, 1 / 16), fitted(CUBE)
    np.testing.assert_allclose(long - long.mean(), law(CUBE, 1 / 2) - law(CUBE, 1 / 2).mean(), atol=0.15)
    np.testing.assert_allclose(short - short.mean(), law(CUBE, 1 / 16) - law(CUBE, 1 / 16).mean(), atol=0.15)


def test_runs_that_diverged_have_no_say():
    values = features(CUBE) @ np.arange(15.0)
    spoilt = values.copy()
    spoilt[[3, 17]] = np.nan, np.inf
    sound = np.isfinite(spoilt)
    np.testing.assert_allclose(control(CUBE, spoilt)(CUBE), control(CUBE[sound], values[sound])(CUBE))
