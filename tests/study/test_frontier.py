"""Laws of the cost-aware analysis, and the figures published by CCDS (Yin and Rush, ICLR 2025)."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cads.errors import BudgetError, CadsError, ConfigError, DataError
from cads.study import fits, frontier
from cads.study.frontier import (
    FrontierLine,
    PerformanceCurve,
    PerformanceFit,
    advice,
    amortised_flops,
    bootstrap_fits,
    bootstrap_intervals,
    break_even_tasks,
    compute_optimal,
    compute_optimal_method,
    crossovers,
    expected_jaccard,
    fit_performance,
    jaccard,
    log_linear_frontier,
    non_dominated,
    simulate_figure1,
    smallest_optimal_ratio,
)

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "ccds_points.csv"
PUBLISHED = Path(__file__).resolve().parents[3] / "shared/data/ccds_points.csv"

C_FULL_7B = 4.5931e18
C_SELECT = {"random": 0.0, "bm25": 0.0, "embed": 0.0, "ppl": 1.5313e18, "less": 8.2692e18}
SHIFTED_FITS = {
    "random": (45.25, 2.54),
    "bm25": (45.35, 5.07),
    "embed": (45.32, 7.00),
    "ppl": (43.96, 17.3),
    "less": (46.08, 4.77),
}
FRACTIONS = np.array([0.025, 0.05, 0.1, 0.25, 0.5, 1.0])


def read_7b_mmlu(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    if not path.exists():
        pytest.skip(f"published points not found at {path}")
    points: dict[str, tuple[list[float], list[float]]] = {method: ([], []) for method in C_SELECT}
    with path.open() as file:
        for row in csv.DictReader(file):
            if (row["task"], row["size"]) == ("mmlu", "7b"):
                points[row["method"]][0].append(float(row["total_flops"]))
                points[row["method"]][1].append(float(row["score"]))
    return points


@pytest.fixture(params=[EXCERPT, PUBLISHED], ids=["excerpt", "published"])
def points(request: pytest.FixtureRequest) -> dict[str, tuple[list[float], list[float]]]:
    return read_7b_mmlu(request.param)


def fits_of(points, **kwargs) -> list[PerformanceFit]:
    return [
        fit_performance(method, *points[method], p_bar=47.32, c_full=C_FULL_7B, c_select=C_SELECT[method], **kwargs)
        for method in C_SELECT
    ]


@st.composite
def curves(draw, method: str = "a", p_bar: float | None = None) -> PerformanceCurve:
    p0 = draw(st.floats(10, 60))
    return PerformanceCurve(
        method,
        p0,
        p0 + draw(st.floats(1, 30)) if p_bar is None else p_bar,
        draw(st.floats(0.5, 30)),
        1e18,
        draw(st.sampled_from([0.0, 1e16, 3e17])),
        draw(st.sampled_from(["shifted", "published"])),
    )


# --- published figures


def test_shifted_fits_of_7b_mmlu(points) -> None:
    fits = fits_of(points)
    assert {fit.method for fit in fits} == set(SHIFTED_FITS)
    for fit in fits:
        p0, lam = SHIFTED_FITS[fit.method]
        assert fit.p0 == pytest.approx(p0, abs=0.006)
        assert fit.lam == pytest.approx(lam, rel=0.005)
        assert not fit.degenerate


def test_published_form_is_degenerate_for_methods_that_are_mostly_selection(points) -> None:
    degenerate = {fit.method for fit in fits_of(points, form="published") if fit.degenerate}
    assert degenerate == {"ppl", "less"}


def test_line_through_the_best_score_per_budget(points) -> None:
    flops = np.concatenate([points[method][0] for method in points])
    scores = np.concatenate([points[method][1] for method in points])
    best = non_dominated(flops, scores)
    line = log_linear_frontier(flops[best], scores[best])
    assert line.slope_per_decade == pytest.approx(1.1178, abs=5e-5)
    assert line.score_at_reference == pytest.approx(45.636, abs=5e-4)
    assert float(line.predict(1e17)) == pytest.approx(45.636, abs=5e-4)


def test_less_meets_the_line_after_ten_to_twenty_tasks_and_more(points) -> None:
    line = FrontierLine(1.1178, 45.636)
    tasks = [
        break_even_tasks(C_SELECT["less"], total - C_SELECT["less"], line.flops_to_reach(score))
        for total, score in zip(*points["less"], strict=True)
    ]
    assert min(tasks) > 10
    assert any(tasks_needed < 30 for tasks_needed in tasks)


def test_advice_on_the_7b_mmlu_fits(points) -> None:
    assert advice(fits_of(points), 3e17) == (
        "at 3e17 FLOPs: embed; ppl pays from 2.8e18; less does not pay up to 4.6e18"
    )


@pytest.mark.parametrize("n_parameters", [7.5e9, 7.5e10, 1.5e12])
def test_simulated_crossovers_do_not_depend_on_the_trained_size(n_parameters: float) -> None:
    _, bm25, ppl, gradient = simulate_figure1(n_parameters)
    assert bm25.c_full == pytest.approx(6e8 * n_parameters)
    assert (ppl.c_select, gradient.c_select) == pytest.approx((1.5e18, 4.5e18))
    assert crossovers(bm25, ppl, 1e17, 1e21) == pytest.approx([2.0e18])
    (late,) = crossovers(ppl, gradient, 1e17, 1e21)
    assert round(late / 1e18, 1) == 7.8


def test_simulated_winners_by_size() -> None:
    winners = [
        [method for method, _, _ in compute_optimal(simulate_figure1(n), 1e17, 6e8 * n)] for n in (7.5e9, 7.5e10)
    ]
    assert winners == [["bm25", "ppl"], ["bm25", "ppl", "gradient"]]


# --- fit


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
    kept = fit_performance("a", FRACTIONS, scores, p_bar=47.3, c_full=1.0)
    moved = fit_performance("a", FRACTIONS[list(order)], scores[list(order)], p_bar=47.3, c_full=1.0)
    assert moved == kept


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
    kept = [refit for i, refit in enumerate(usual) if i % failing]
    assert record["failed_refits"] == len(usual) - len(kept) == math.ceil(fits.N_RESAMPLES / failing)
    if kept:
        assert record["intervals"]["lambda"] == bootstrap_intervals(kept)["lam"]
    else:
        assert "intervals" not in record


# --- frontier


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=25))
def test_frontier_points_are_non_dominated_and_cover_the_rest(points) -> None:
    costs, scores = zip(*points, strict=True)
    kept = [points[i] for i in non_dominated(costs, scores)]
    for cost, score in kept:
        assert not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    for cost, score in points:
        assert any(c <= cost and s >= score for c, s in kept)
    assert len(set(kept)) == len(kept)
    assert [c for c, _ in kept] == sorted(c for c, _ in kept)


@given(st.floats(0.1, 5), st.floats(10, 60), st.lists(st.integers(1, 90), min_size=2, unique=True))
def test_line_recovers_itself_and_inverts(slope, height, costs) -> None:
    truth = FrontierLine(slope, height)
    flops = 1e16 * np.array(costs)
    line = log_linear_frontier(flops, truth.predict(flops))
    assert line.slope_per_decade == pytest.approx(slope, rel=1e-6)
    assert line.score_at_reference == pytest.approx(height, rel=1e-6)
    assert float(truth.predict(truth.flops_to_reach(height + 1))) == pytest.approx(height + 1)
    assert float(truth.predict(1e18) - truth.predict(1e17)) == pytest.approx(slope)


def test_line_needs_two_costs_and_a_rise() -> None:
    with pytest.raises(DataError, match="2 different costs"):
        log_linear_frontier([1e17, 1e17], [1.0, 2.0])
    with pytest.raises(DataError, match="falls"):
        FrontierLine(-1.0, 40.0).flops_to_reach(41.0)


# --- break-even


@given(st.floats(0, 1e19), st.floats(1e16, 1e19), st.floats(1.01, 1e3))
def test_break_even_is_where_amortised_cost_meets_the_rival(c_select, c_train, factor) -> None:
    c_rival = c_train * factor
    tasks = break_even_tasks(c_select, c_train, c_rival)
    assert amortised_flops(c_select, c_train, tasks) <= c_rival * (1 + 1e-9)
    if tasks > 1:
        assert amortised_flops(c_select, c_train, max(1.0, 0.99 * tasks)) > c_rival


def test_break_even_limits() -> None:
    assert amortised_flops(8.0, 2.0, 1) == 10.0
    assert amortised_flops(8.0, 2.0, math.inf) == 2.0
    assert break_even_tasks(8.0, 2.0, 2.0) == math.inf
    assert break_even_tasks(8.0, 2.0, 1.0) == math.inf
    assert break_even_tasks(8.0, 2.0, 4.0) == 4.0
    assert break_even_tasks(8.0, 2.0, 100.0) == 1.0
    with pytest.raises(ConfigError, match="n_tasks"):
        amortised_flops(8.0, 2.0, 0)


# --- who wins where


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_crossovers_are_exactly_the_changes_of_sign(data, one_ceiling: bool) -> None:
    p_bar = 95.0 if one_ceiling else None
    a, b = data.draw(curves("a", p_bar)), data.draw(curves("b", p_bar))
    low, high = 1e16, 3e18
    found = crossovers(a, b, low, high)
    assert found == pytest.approx(crossovers(b, a, low, high))
    assert len(found) <= (1 if one_ceiling else 2)
    start = max(low, a.c_select, b.c_select)
    grid = np.geomspace(start, high, 4001)
    difference = a.predict(grid) - b.predict(grid)
    clear = np.abs(difference) > 1e-6
    signs = np.sign(difference[clear])
    seen = np.flatnonzero(np.diff(signs))
    assert len(found) >= len(seen)
    for i in seen:
        left, right = grid[clear][i], grid[clear][i + 1]
        assert any(left <= c <= right for c in found)
    for c in found:
        assert start < c < high
        assert float(a.predict(c)) == pytest.approx(float(b.predict(c)), abs=1e-8)


def test_curves_that_start_together_but_for_rounding_do_not_cross_at_the_start() -> None:
    a = PerformanceCurve("a", 10.0, 18.0, 10.0, 1e18, 1e16, "shifted")
    b = PerformanceCurve("b", math.nextafter(10.0, 11.0), 11.000000000000002, 1.0, 1e18, 1e16, "shifted")
    assert crossovers(a, b, 1e16, 3e18) == ()


def test_both_crossovers_of_one_pair_are_found() -> None:
    early = PerformanceCurve("early", 0.0, 50.0, 20.0, 1e18)
    late = PerformanceCurve("late", 10.0, 52.0, 3.0, 1e18)
    first, second = crossovers(early, late, 1e15, 1e20)
    assert [float(early.predict(c) - late.predict(c)) > 0 for c in (first / 2, 2 * first, 2 * second)] == [
        False,
        True,
        False,
    ]


def test_crossover_is_found_where_both_curves_round_to_the_ceiling() -> None:
    slow = PerformanceCurve("slow", 40.0, 50.0, 50.0, 1e18)
    fast = PerformanceCurve("fast", 40.0, 50.0, 100.0, 1e18, 1e18)
    assert float(slow.predict(2e18)) == float(fast.predict(2e18)) == 50.0
    assert crossovers(slow, fast, 1e17, 1e19) == pytest.approx([2e18])


def test_curves_that_never_meet_have_no_crossover() -> None:
    curve = PerformanceCurve("a", 10.0, 50.0, 5.0, 1e18)
    assert crossovers(curve, replace(curve, method="b"), 1e15, 1e20) == ()
    assert crossovers(curve, replace(curve, p0=12.0, p_bar=53.0), 1e15, 1e20) == ()
    assert crossovers(curve, replace(curve, c_select=1e21), 1e15, 1e20) == ()
    with pytest.raises(ConfigError, match="range"):
        crossovers(curve, curve, 1e20, 1e15)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_optimal_pieces_tile_the_range_and_name_the_highest_curve(data) -> None:
    rivals = [data.draw(curves(name, data.draw(st.sampled_from([None, 95.0])))) for name in "abc"]
    low, high = 1e16, 3e18
    pieces = compute_optimal(rivals, low, high)
    affordable_from = max(low, min(curve.c_select for curve in rivals))
    assert [pieces[0][1], pieces[-1][2]] == [affordable_from, high]
    for before, after in itertools.pairwise(pieces):
        assert before[2] == after[1]
        assert before[0] != after[0]
    for method, left, right in pieces:
        for c in np.geomspace(left * (1 + 1e-9), right, 5)[:-1]:
            scores = {curve.method: float(curve.predict(c)) for curve in rivals}
            assert scores[method] >= np.nanmax(list(scores.values())) - 1e-8
    assert pieces == compute_optimal(rivals[::-1], low, high)


def test_optimal_pieces_do_not_depend_on_the_order_of_the_curves() -> None:
    # Three curves whose crossovers differ in the last digit with the order of each pair.
    params = {"a": (10.0, 1.0), "b": (10.0, 24.0), "c": (11.0, 23.0)}
    rivals = [PerformanceCurve(method, p0, 95.0, lam, 1e18) for method, (p0, lam) in params.items()]
    answers = {tuple(compute_optimal(order, 1e16, 3e18)) for order in itertools.permutations(rivals)}
    assert len(answers) == 1


def test_duplicate_methods_are_refused() -> None:
    curve = PerformanceCurve("a", 10.0, 50.0, 5.0, 1e18)
    with pytest.raises(DataError, match="once"):
        compute_optimal([curve, curve], 1e16, 1e18)


def test_equal_curves_go_to_the_cheaper_selection_and_nothing_to_nobody() -> None:
    cheap = PerformanceCurve("z", 10.0, 50.0, 5.0, 1e18, 0.0, "published")
    dear = replace(cheap, method="a", c_select=1e17)
    assert compute_optimal_method([dear, cheap], 5e17) == "z"
    assert compute_optimal_method([dear], 1e17) is None


def test_size_ratio_is_the_threshold_of_being_optimal() -> None:
    cheap = PerformanceCurve("cheap", 40.0, 50.0, 5.0, 1e18)
    dear = PerformanceCurve("dear", 40.0, 50.0, 10.0, 1e18, 4e18)
    # They meet at C = lam_dear * c_select / (lam_dear - lam_cheap) = 8e18, below C(D) from ratio 8 on.
    assert smallest_optimal_ratio("dear", [cheap, dear]) == pytest.approx(8.0, rel=1e-6)
    assert smallest_optimal_ratio("cheap", [cheap, dear]) == 1.0
    assert smallest_optimal_ratio("dear", [cheap, dear], max_ratio=7.9) == math.inf
    assert smallest_optimal_ratio("dear", [cheap, dear], margin=0.5) > 8.1
    assert smallest_optimal_ratio("dear", [cheap, dear], margin=3.0) == math.inf
    with pytest.raises(DataError, match="LESS"):
        smallest_optimal_ratio("LESS", [cheap, dear])


def test_advice_names_the_winner_and_when_others_pay() -> None:
    embedding = PerformanceCurve("embedding", 40.0, 50.0, 5.0, 1e19)
    less = PerformanceCurve("LESS", 40.0, 50.0, 10.0, 1e19, 1e18)
    assert advice([less, embedding], 3e17) == "at 3e17 FLOPs: embedding; LESS pays from 2e18"
    assert advice([less, embedding], 3e18) == "at 3e18 FLOPs: LESS"
    assert advice([less], 3e17) == "at 3e17 FLOPs: no selection is affordable; LESS pays from 1e18"
    assert advice([less, embedding], 3e17, horizon=1.5e18).endswith("LESS does not pay up to 1.5e18")
    assert advice([embedding], 2e19) == "at 2e19 FLOPs: embedding; training on everything costs 1e19"
    with pytest.raises(BudgetError):
        advice([], 3e17)


# --- overlap


@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20)))
def test_jaccard_is_symmetric_bounded_and_one_only_for_equals(a, b) -> None:
    overlap = jaccard(a, b)
    assert overlap == jaccard(np.array(sorted(b), dtype=int), np.array(sorted(a), dtype=int))
    assert 0 <= overlap <= 1
    assert (overlap == 1) == (a == b)
    assert (overlap == 0) == a.isdisjoint(b)


def test_jaccard_refuses_repeated_ids_and_nothing() -> None:
    for a, b in ((["x", "x"], ["x"]), (["x"], ["y", "y"]), ([], [])):
        with pytest.raises(DataError):
            jaccard(a, b)


@pytest.mark.parametrize("fraction", [0.025, 0.1, 0.5, 1.0])
def test_random_selections_overlap_as_expected(fraction: float) -> None:
    rng = np.random.default_rng(0)
    n_pool = 4000
    overlaps = [
        jaccard(*(rng.choice(n_pool, int(fraction * n_pool), replace=False) for _ in range(2))) for _ in range(40)
    ]
    assert np.mean(overlaps) == pytest.approx(expected_jaccard(fraction), rel=0.05, abs=1e-3)


def test_expected_jaccard_refuses_what_is_no_fraction() -> None:
    for fraction in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ConfigError):
            expected_jaccard(fraction)
