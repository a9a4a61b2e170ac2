"""The figures published by CCDS (Yin and Rush, ICLR 2025) come out of its points, fits and formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from cads.study.analysis.fits import GroupFits, analyse
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
from cads.study.analysis.points import points_of
from cads.study.published_points import PUBLISHED_COLUMNS, import_points
from cads.study.tables import read_runs
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


def misread(folder: Path, method: str, errors: dict[str, float]) -> GroupFits:
    """The fits of the excerpt after an import in which totals of a method are misread by these shares, by budget."""
    with EXCERPT.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["task"], row["size"]) == ("mmlu", "7b")]
    for row in rows:
        if row["method"] == method:
            row["total_flops"] = str(float(row["total_flops"]) * (1 + errors.get(row["budget_pct"], 0.0)))
    with (folder / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    import_points(folder / "points.csv", folder / "study")
    (group,) = analyse(points_of(read_runs(folder / "study")))
    return group


@pytest.mark.parametrize("method", ["less", "ppl"])
@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ({}, False),
        ({"10": 0.01, "50": -0.01}, False),
        ({"2.5": 0.01, "5": -0.01, "10": 0.005, "25": -0.005, "50": 0.01, "100": -0.01}, False),
        ({"25": 0.3}, True),
        ({"2.5": 0.1, "5": -0.1, "25": 0.1, "100": -0.05}, True),
    ],
)
def test_a_figure_that_is_misread_a_little_changes_no_fit_and_one_misread_by_more_is_named(
    tmp_path, caplog, method, errors, told
) -> None:
    group = misread(tmp_path, method, errors)
    fit = group.fits[method]["shifted"]
    p0, lam = SHIFTED_FITS[method]
    assert fit.c_select == pytest.approx(C_SELECT[method], rel=0.05)
    assert (fit.p0, fit.lam) == (pytest.approx(p0, abs=0.006), pytest.approx(lam, rel=0.005))
    assert (set(group.doubtful_costs) == {method}) == told
    assert (f"mmlu 7b: {method}: selection costs" in caplog.text) == told
    if told:
        assert all(f"at {budget} %" in caplog.text for budget, error in errors.items() if error > 0.05)


@pytest.mark.parametrize("method", ["random", "bm25", "embed"])
def test_free_selection_stays_free_where_totals_are_misread_a_little(tmp_path, caplog, method) -> None:
    group = misread(tmp_path, method, {"50": 0.01, "100": 0.01} if method != "random" else {"50": 0.01})
    assert group.fits[method]["shifted"].c_select == 0
    assert group.fits[method]["shifted"].p0 == pytest.approx(SHIFTED_FITS[method][0], abs=0.02)
    assert not caplog.records


def test_published_selection_that_grows_with_the_budget_is_not_paid_before_training(tmp_path, caplog) -> None:
    """Each budget pays for selection half of what it pays for training."""
    header = ",".join(PUBLISHED_COLUMNS)
    lines = [f"t,7b,free,{b},{b}e16,{40 + b / 20}" for b in (5, 10, 50, 100)]
    lines += [f"t,7b,search,{b},{1.5 * b}e16,{42 + b / 20}" for b in (5, 10, 50, 100)]
    (tmp_path / "points.csv").write_text("\n".join([header, *lines]))
    import_points(tmp_path / "points.csv", tmp_path / "study")
    (group,) = analyse(points_of(read_runs(tmp_path / "study")))
    assert group.fits["search"]["shifted"].c_select == 0
    assert "fitted as if nothing were paid before training: check the points" in caplog.text
