"""The figures published by CCDS (Yin and Rush, ICLR 2025) come out of its points, fits and formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from cads.study.analysis.frontier import (
    FrontierLine,
    PerformanceFit,
    advice,
    break_even_tasks,
    compute_optimal,
    crossovers,
    fit_performance,
    log_linear_frontier,
    non_dominated,
    simulate_figure1,
)
from tests.support.paths import EXCERPT, SHARED

PUBLISHED = SHARED / "ccds_points.csv"

C_FULL_7B = 4.5931e18
C_SELECT = {"random": 0.0, "bm25": 0.0, "embed": 0.0, "ppl": 1.5313e18, "less": 8.2692e18}
SHIFTED_FITS = {
    "random": (45.25, 2.54),
    "bm25": (45.35, 5.07),
    "embed": (45.32, 7.00),
    "ppl": (43.96, 17.3),
    "less": (46.08, 4.77),
}


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
