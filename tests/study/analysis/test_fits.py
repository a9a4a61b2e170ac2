"""Fits of performance over compute: the curve that is given comes back, and the bootstrap says how far to trust it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cads.errors import CadsError, ConfigError, DataError
from cads.study.analysis import fits, frontier
from cads.study.analysis.frontier import PerformanceCurve, bootstrap_fits, bootstrap_intervals, fit_performance
from tests.support.performance_curves import curves

FRACTIONS = np.array([0.025, 0.05, 0.1, 0.25, 0.5, 1.0])


@settings(max_examples=60, deadline=None)
@given(curves())
def test_fit_recovers_the_curve_it_is_given(truth: PerformanceCurve) -> None:
    flops = truth.c_select + FRACTIONS * truth.c_full
    assume(truth.lam * (flops[0] - truth.shift) / truth.c_full < 3)
    fit = fit_performance(
        truth.method,
        flops,
        truth.predict(flops),
        p_bar=truth.p_bar,
        c_full=truth.c_full,
        c_select=truth.c_select,
        form=truth.form,
        p0_bounds=(-math.inf, math.inf),
    )
    assert fit.lam == pytest.approx(truth.lam, rel=1e-3)
    assert fit.p0 == pytest.approx(truth.p0, abs=1e-2)
    assert np.abs(fit.residuals).max() < 1e-4


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_fit_ignores_the_order_of_the_points(order) -> None:
    scores = np.array([45.2, 45.6, 45.8, 46.3, 46.5, 47.3])
    fitted = fit_performance("a", FRACTIONS, scores, p_bar=47.3, c_full=1.0)
    moved = fit_performance("a", FRACTIONS[list(order)], scores[list(order)], p_bar=47.3, c_full=1.0)
    assert moved == fitted


def test_residuals_are_observed_minus_predicted() -> None:
    scores = [45.2, 45.6, 45.8, 46.3, 46.5, 47.3]
    fit = fit_performance("a", FRACTIONS, scores, p_bar=47.3, c_full=1.0)
    np.testing.assert_allclose(fit.residuals, scores - fit.predict(FRACTIONS), atol=1e-12)
    assert np.abs(fit.residuals).max() > 0.01


def test_fewer_than_three_budgets_are_refused_by_name_and_count() -> None:
    with pytest.raises(CadsError, match=r"'LESS' has 2 budgets.*3"):
        fit_performance("LESS", [1e17, 1e17, 2e17], [1.0, 2.0, 3.0], p_bar=5.0, c_full=1e18)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"flops": [1e17, 2e17]}, DataError),
        ({"scores": [1.0, math.nan, 2.0]}, DataError),
        ({"c_select": 2e17}, DataError),
        ({"form": "logistic"}, ConfigError),
        ({"c_full": 0.0}, DataError),
        ({"p_bar": math.nan}, DataError),
        ({"p0_bounds": (1.0, 1.0)}, ConfigError),
    ],
)
def test_bad_fits_are_refused(change, error) -> None:
    good: dict[str, Any] = {
        "flops": [1e17, 2e17, 4e17],
        "scores": [1.0, 2.0, 3.0],
        "p_bar": 4.0,
        "c_full": 1e18,
    }
    fit_performance("a", **good)
    with pytest.raises(error):
        fit_performance("a", **(good | change))


@settings(deadline=None)
@given(curves(), st.floats(0.01, 0.99))
def test_flops_to_reach_inverts_predict(curve: PerformanceCurve, part: float) -> None:
    start = float(curve.predict(max(curve.c_select, 1.0)))
    assume(curve.p_bar - start > 1e-3)
    score = start + part * (curve.p_bar - start)
    flops = curve.flops_to_reach(score)
    assert flops > curve.c_select
    assert float(curve.predict(flops)) == pytest.approx(score, abs=1e-9)
    assert curve.flops_to_reach(start - 1) == curve.c_select
    assert curve.flops_to_reach(curve.p_bar) == math.inf


def test_no_score_before_the_selection_is_paid() -> None:
    curve = PerformanceCurve("a", 10.0, 20.0, 5.0, 1e18, 1e17)
    below, at, above = curve.predict([0.9e17, 1e17, 2e17])
    assert math.isnan(below)
    assert at == 10.0
    assert above == pytest.approx(10 + 10 * (1 - math.exp(-0.5)))


def test_bootstrap_is_seeded_and_brackets_the_fit() -> None:
    truth = PerformanceCurve("a", 45.0, 47.0, 5.0, 1.0)
    noise = 0.05 * np.array([1, -1, 1, -1, 1, -1])
    fit = fit_performance("a", FRACTIONS, truth.predict(FRACTIONS) + noise, p_bar=47.0, c_full=1.0)
    refits = bootstrap_fits(fit, np.random.default_rng(3), 60)
    intervals = bootstrap_intervals(refits)
    assert refits == bootstrap_fits(fit, np.random.default_rng(3), 60)
    assert refits != bootstrap_fits(fit, np.random.default_rng(4), 60)
    assert intervals["p0"][0] < fit.p0 < intervals["p0"][1]
    assert intervals["lam"][0] < fit.lam < intervals["lam"][1]
    narrower = bootstrap_intervals(refits, confidence=0.5)
    assert intervals["lam"][0] < narrower["lam"][0] < narrower["lam"][1] < intervals["lam"][1]
    with pytest.raises(ConfigError):
        bootstrap_intervals(refits, confidence=95)


def test_bootstrap_noise_has_the_unbiased_residual_variance() -> None:
    scores = [45.2, 45.6, 45.8, 46.3, 46.5, 47.3]
    fit = fit_performance("a", FRACTIONS, scores, p_bar=47.3, c_full=1.0)
    refits = bootstrap_fits(fit, np.random.default_rng(0), 200)
    noise = np.array([refit.scores for refit in refits]) - fit.predict(FRACTIONS)
    assert noise.std() == pytest.approx(np.std(fit.residuals) * math.sqrt(6 / 4), rel=0.05)
    assert noise.mean() == pytest.approx(0, abs=0.02)


def test_bootstrap_of_exact_points_has_no_width() -> None:
    truth = PerformanceCurve("a", 45.0, 47.0, 5.0, 1.0)
    fit = fit_performance("a", FRACTIONS, truth.predict(FRACTIONS), p_bar=47.0, c_full=1.0)
    low, high = bootstrap_intervals(bootstrap_fits(fit, np.random.default_rng(0), 20))["lam"]
    assert high - low < 1e-4


@pytest.mark.parametrize("failing", [3, 1])
def test_refits_that_do_not_converge_are_left_out_and_counted(monkeypatch, failing) -> None:
    """Every third of them, or all: the report says so, and does not end."""
    fit = fit_performance("a", FRACTIONS, [45.2, 45.6, 45.8, 46.3, 46.5, 47.2], p_bar=47.3, c_full=1.0)
    usual = bootstrap_fits(fit, np.random.default_rng(fits.BOOTSTRAP_SEED), fits.N_RESAMPLES)
    solve, calls = frontier.least_squares, itertools.count()

    def sometimes(*given: Any, **options: Any) -> Any:
        solution = solve(*given, **options)
        solution.success = solution.success and next(calls) % failing > 0
        return solution

    monkeypatch.setattr(frontier, "least_squares", sometimes)
    record = fits._fit_json(fit)
    fitted = [refit for i, refit in enumerate(usual) if i % failing]
    assert record["failed_refits"] == len(usual) - len(fitted) == math.ceil(fits.N_RESAMPLES / failing)
    if fitted:
        assert record["intervals"]["lambda"] == bootstrap_intervals(fitted)["lam"]
    else:
        assert "intervals" not in record
