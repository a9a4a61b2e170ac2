"""Who wins where: laws of frontiers, break-even, crossovers and advice, and how far selections overlap."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.errors import BudgetError, ConfigError, DataError
from cads.study.analysis.frontier import (
    FrontierLine,
    PerformanceCurve,
    advice,
    amortised_flops,
    break_even_tasks,
    compute_optimal,
    compute_optimal_method,
    crossovers,
    expected_jaccard,
    jaccard,
    log_linear_frontier,
    non_dominated,
    smallest_optimal_ratio,
)
from tests.support.performance_curves import curves

# --- frontier


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=25))
def test_frontier_points_are_non_dominated_and_cover_the_rest(points) -> None:
    costs, scores = zip(*points, strict=True)
    frontier = [points[i] for i in non_dominated(costs, scores)]
    for cost, score in frontier:
        assert not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    for cost, score in points:
        assert any(c <= cost and s >= score for c, s in frontier)
    assert len(set(frontier)) == len(frontier)
    assert [c for c, _ in frontier] == sorted(c for c, _ in frontier)


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
    result = crossovers(a, b, low, high)
    assert result == pytest.approx(crossovers(b, a, low, high))
    assert len(result) <= (1 if one_ceiling else 2)
    start = max(low, a.c_select, b.c_select)
    grid = np.geomspace(start, high, 4001)
    difference = a.predict(grid) - b.predict(grid)
    clear = np.abs(difference) > 1e-6
    signs = np.sign(difference[clear])
    seen = np.flatnonzero(np.diff(signs))
    assert len(result) >= len(seen)
    for i in seen:
        left, right = grid[clear][i], grid[clear][i + 1]
        assert any(left <= c <= right for c in result)
    for c in result:
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
