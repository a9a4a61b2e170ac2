"""Tables of results, points over seeds, and the fits of published points."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

import cads.runtime.safe_read
from cads.cli.main import main
from cads.errors import ConfigError, DataError
from cads.study.analysis.fits import analyse, fixed_selection, to_json
from cads.study.analysis.points import (
    MethodPoint,
    best_of,
    budgets_of,
    differs_significantly,
    higher_is_better,
    place_name,
    points_of,
    regrets,
    within_budget,
)
from cads.study.analysis.verdicts import answers
from cads.study.published_points import PUBLISHED_COLUMNS, import_points, parameters_of
from cads.study.report.text_tables import markdown_table
from cads.study.tables import DONE, FAILED, RUNS, VERSION_KEY, read_rows, read_runs, write_rows
from tests.support.paths import EXCERPT, SHARED

PUBLISHED = SHARED / "ccds_points.csv"
GOLDEN = {
    "random": (45.25, 2.54),
    "bm25": (45.35, 5.07),
    "embed": (45.32, 7.00),
    "ppl": (43.96, 17.3),
    "less": (46.08, 4.77),
}


def row(cell: str, **more) -> dict:
    return {"cell": cell, "status": DONE, "seed": 0, "metric": "accuracy", "score": 0.5, **more}


class TestTables:
    def test_what_is_written_is_read(self, tmp_path):
        write_rows(tmp_path, "runs", "b", [row("b", score=0.25)])
        write_rows(tmp_path, "runs", "a", [row("a", error="quotes ' \" and <b>")])
        rows = read_runs(tmp_path)
        assert [(r["cell"], r["score"], r["error"]) for r in rows] == [
            ("a", 0.5, "quotes ' \" and <b>"),
            ("b", 0.25, None),
        ]
        assert set(rows[0]) == set(RUNS.names)

    def test_a_cell_has_its_last_rows_alone(self, tmp_path):
        for score in (0.1, 0.2):
            write_rows(tmp_path, "runs", "a", [row("a", score=score)])
        assert [r["score"] for r in read_runs(tmp_path)] == [0.2]

    def test_a_write_that_fails_leaves_what_was_there(self, tmp_path, monkeypatch):
        write_rows(tmp_path, "runs", "a", [row("a")])

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr(pq, "write_table", fail)
        with pytest.raises(OSError, match="disk full"):
            write_rows(tmp_path, "runs", "a", [row("a", score=0.9)])
        assert [f.name for f in (tmp_path / "tables" / "runs").iterdir()] == ["a.parquet"]
        assert read_runs(tmp_path)[0]["score"] == 0.5

    def test_files_of_another_schema_version_are_refused(self, tmp_path):
        path = write_rows(tmp_path, "runs", "a", [row("a")])
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({VERSION_KEY: b"99"}), path)
        with pytest.raises(DataError, match="schema version 99; this library reads 1, 2"):
            read_runs(tmp_path)

    def test_files_of_the_first_schema_are_read(self, tmp_path):
        path = write_rows(tmp_path, "runs", "a", [row("a", score=0.25, maximised=True)])
        assert read_runs(tmp_path)[0]["maximised"] is True
        old = pq.read_table(path).drop_columns(["maximised"])
        pq.write_table(old.replace_schema_metadata({VERSION_KEY: b"1"}), path)
        (read,) = read_runs(tmp_path)
        assert (read["score"], read["maximised"], list(read)) == (0.25, None, RUNS.names)
        pq.write_table(old.replace_schema_metadata({VERSION_KEY: b"2"}), path)
        with pytest.raises(DataError, match="has columns"):
            read_runs(tmp_path)

    def test_files_of_the_second_schema_are_read(self, tmp_path):
        path = write_rows(tmp_path, "runs", "a", [row("a", shares='{"x": 1.0}')])
        assert read_runs(tmp_path)[0]["shares"] == '{"x": 1.0}'
        old = pq.read_table(path).drop_columns(["shares"])
        pq.write_table(old.replace_schema_metadata({VERSION_KEY: b"2"}), path)
        (read,) = read_runs(tmp_path)
        assert (read["shares"], list(read)) == (None, RUNS.names)

    def test_files_that_unpack_beyond_memory_are_refused_unread(self, tmp_path, monkeypatch):
        examples = [{"cell": "a", "id": str(i), "text": "long " * 1000, "image": b"x" * 1000} for i in range(500)]
        path = write_rows(tmp_path, "examples", "a", examples)
        assert path.stat().st_size < 50_000
        assert [r["image"] for r in read_rows(tmp_path, "examples")] == [b"x" * 1000] * 500
        monkeypatch.setattr(cads.runtime.safe_read, "memory_limit", lambda: 1e6)
        with pytest.raises(DataError, match=r"'text' of .* more than memory holds"):
            read_rows(tmp_path, "examples")
        monkeypatch.setattr(cads.runtime.safe_read, "memory_limit", lambda: 1e3)
        with pytest.raises(DataError, match=r"has 500 rows, which take .* more than memory holds"):
            read_rows(tmp_path, "examples")

    @pytest.mark.parametrize("broken", [b"no parquet", b""])
    def test_damaged_files_are_named(self, tmp_path, broken):
        write_rows(tmp_path, "runs", "a", [row("a")]).write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.parquet"):
            read_runs(tmp_path)

    def test_foreign_columns_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="skore"):
            write_rows(tmp_path, "runs", "a", [row("a", skore=1)])
        path = write_rows(tmp_path, "runs", "a", [row("a")])
        pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({VERSION_KEY: b"1"}), path)
        with pytest.raises(DataError, match="has columns"):
            read_runs(tmp_path)

    def test_only_cells_of_the_last_grid_are_reported_in_its_order(self, tmp_path):
        for key in "abc":
            write_rows(tmp_path, "runs", key, [row(key)])
        (tmp_path / "grid.json").write_text(json.dumps({"cells": ["c", "a"]}))
        assert [r["cell"] for r in read_runs(tmp_path)] == ["c", "a"]
        (tmp_path / "grid.json").write_text("{")
        with pytest.raises(DataError, match="damaged"):
            read_runs(tmp_path)

    def test_folders_without_results(self, tmp_path, capsys):
        with pytest.raises(DataError, match="holds no results of a grid"):
            read_runs(tmp_path)
        assert main(["report", str(tmp_path)]) == 1
        assert "holds no results of a grid" in " ".join(capsys.readouterr().err.split())

    def test_a_cell_that_two_files_hold_is_refused(self, tmp_path):
        write_rows(tmp_path, "runs", "a", [row("a")])
        write_rows(tmp_path, "runs", "all", [row("a"), row("b")])
        with pytest.raises(DataError, match=r"'a' is in .* more than once, in \['a.parquet', 'all.parquet'\]"):
            read_runs(tmp_path)

    def test_rows_of_some_cells(self, tmp_path):
        for key in "ab":
            write_rows(tmp_path, "selections", key, [{"cell": key, "id": f"{key}{i}", "rank": i} for i in range(3)])
        assert [r["id"] for r in read_rows(tmp_path, "selections", ["b"])] == ["b0", "b1", "b2"]


class TestImport:
    def write(self, folder: Path, lines: list[str], header: str = ",".join(PUBLISHED_COLUMNS)) -> Path:
        path = folder / "points.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    def test_selection_is_what_goes_beyond_the_share_of_full_training(self, tmp_path):
        lines = ["t,7b,free,100,1e18,50", "t,7b,dear,50,0.8e18,49", "t,7b,free,50,0.5e18,48"]
        assert import_points(self.write(tmp_path, lines), tmp_path / "o") == 3
        assert import_points(tmp_path / "points.csv", tmp_path / "o") == 3, "importing twice changes nothing"
        result = {(r["method"], r["budget"]): r for r in read_runs(tmp_path / "o")}
        assert len(result) == 3
        assert result["dear", "50 %"]["selection_flops"] == pytest.approx(0.3e18)
        assert result["free", "50 %"]["selection_flops"] == 0
        assert {r["n_parameters"] for r in result.values()} == {7e9}

    def test_a_corrected_point_takes_the_place_of_the_first(self, tmp_path):
        lines = ["t,7b,free,100,1e18,50", "t,7b,free,50,0.5e18,48"]
        import_points(self.write(tmp_path, lines[:1]), tmp_path / "o")
        import_points(self.write(tmp_path, ["t,7b,free,100,1e18,51", *lines[1:]]), tmp_path / "o")
        assert [r["score"] for r in read_runs(tmp_path / "o")] == [48, 51]

    @pytest.mark.parametrize(
        ("lines", "match"),
        [
            ([], "no points"),
            (["t,7b,m,100,x,50"], "line 2"),
            (["t,7b,m,100,1e18"], "line 2"),
            (["t,7b,m,100,nan,50"], "line 2"),
            (["t,7b,m,0,1e18,50"], "line 2"),
            (["t,7b,m,100,-1,50"], "line 2"),
            (["t,7b,m,50,1e18,50"], "budget_pct 100"),
            (["t,7b,m,100,1e18,50", "t,7b,m,100,1e18,51"], "given twice"),
        ],
    )
    def test_bad_points_are_refused_by_line(self, tmp_path, lines, match):
        with pytest.raises(DataError, match=match):
            import_points(self.write(tmp_path, lines), tmp_path / "o")
        assert not (tmp_path / "o").exists()

    def test_missing_columns_are_named(self, tmp_path):
        with pytest.raises(DataError, match="total_flops"):
            import_points(self.write(tmp_path, ["a"], "task,size"), tmp_path / "o")

    @pytest.mark.parametrize(
        ("text", "n"), [("7b", 7e9), ("135M", 1.35e8), ("1.5t", 1.5e12), ("large", None), ("", None)]
    )
    def test_sizes(self, text, n):
        assert parameters_of(text) == n


@pytest.mark.parametrize("path", [EXCERPT, PUBLISHED], ids=["excerpt", "published"])
def test_fits_of_the_published_points(tmp_path, path):
    """From the CSV file to fits.json: the figures published for MMLU with the 7B model."""
    if not path.exists():
        pytest.skip(f"published points not found at {path}")
    assert main(["compare", "--import", str(path), "--out", str(tmp_path)]) == 0
    points = [p for p in points_of(read_runs(tmp_path)) if p.group == ("mmlu", "7b")]
    result = to_json(analyse(points), {"mmlu": "7b"})
    json.dumps(result, allow_nan=False)
    (group,) = result["groups"]
    assert set(group["fits"]) == set(GOLDEN)
    for method, (p0, lam) in GOLDEN.items():
        fit = group["fits"][method]["shifted"]
        assert (fit["p0"], fit["lambda"]) == pytest.approx((p0, lam), rel=0.005)
        low, high = fit["intervals"]["lambda"]
        assert low < fit["lambda"] < high
    assert {m for m, f in group["fits"].items() if f["published"]["degenerate"]} == {"ppl", "less"}
    assert group["line"]["slope_per_decade"] == pytest.approx(1.1178, abs=5e-5)
    assert group["line"]["score_at_1e17"] == pytest.approx(45.636, abs=5e-4)
    assert [c["flops"] for c in group["crossovers"] if c["methods"] == ["embed", "ppl"]] == [
        [pytest.approx(2.81e18, rel=0.01)]
    ]
    assert set(group["size_ratios"]) == {"ppl", "less"}
    assert {b["method"] for b in group["break_even"]} == {"ppl", "less"}
    for simulated in result["simulation"]:
        assert simulated["crossovers"]["bm25/ppl"] == pytest.approx([2.0e18])
        assert simulated["crossovers"]["ppl/gradient"] == pytest.approx([7.8e18], rel=0.005)


def point(
    method="m", budget=1.0, scores=(0.5,), selection=0.0, metric="accuracy", training=None, budgets=None, seeds=None
) -> MethodPoint:
    """A point; `budgets` in FLOPs of each seed, by default what the budget is called."""
    return MethodPoint(
        task="t",
        model="",
        method=method,
        selector=method,
        budget=f"{budget:g} epochs",
        metric=metric,
        maximised=higher_is_better(metric),
        seeds=tuple(range(len(scores))) if seeds is None else seeds,
        scores=tuple(scores),
        budgets=(budget,) * len(scores) if budgets is None else budgets,
        selection=selection,
        spent=selection,
        train_flops=budget - selection if training is None else training,
        full_flops=1.0,
        selected=0.5,
        imported=False,
    )


class TestPoints:
    def test_means_over_seeds_of_finished_runs(self):
        columns = {"task": "t", "model": "", "budget": "1", "budget_flops": 1.0, "method": "m", "selector": "m"}
        columns |= {"maximised": None}
        flops = {"selection_flops": 1.0, "selection_flops_spent": 2.0, "training_flops": 3.0, "full_flops": 1.0}
        sizes = {"n_selected": 1, "n_pool": 2, "metrics": '{"accuracy": 0.5, "loss": 2.0}'}
        rows = [row(f"c{s}", **columns, **flops, **sizes) | {"seed": s, "score": v} for s, v in enumerate((0.2, 0.4))]
        failed = row("c3", **columns) | {"status": FAILED, "score": None}
        (result,) = points_of([*rows, failed])
        assert (result.mean, result.total, result.selected, result.seeds) == (pytest.approx(0.3), 4.0, 0.5, (0, 1))
        (other,) = points_of(rows, "loss")
        assert (other.mean, other.metric) == (2.0, "loss")
        with pytest.raises(ConfigError, match=r"'f1' was not measured: choose from \['accuracy', 'loss'\]"):
            points_of(rows, "f1")

    @pytest.mark.parametrize("values", [[0.5, 0.7], [0.81, 0.85, 0.8], list(np.linspace(0.2, 0.9, 10))])
    def test_intervals_are_those_of_scipy(self, values):
        result = point(scores=values)
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (result.mean, result.half_width) == pytest.approx(((low + high) / 2, (high - low) / 2))

    def test_a_size_is_named_once(self):
        assert place_name("language/5M", "5M") == "language/5M"
        assert place_name("mmlu", "7b") == "mmlu 7b"
        assert place_name("vision/digits", "") == "vision/digits"

    def test_known_interval(self):
        # t(0.975, 2) = 4.302653 and the standard deviation of 1, 2, 3 is 1: 4.302653 / sqrt(3) = 2.484138.
        assert point(scores=(0.01, 0.02, 0.03)).half_width == pytest.approx(0.02484138, abs=1e-8)

    def test_one_seed_has_no_interval(self):
        assert math.isnan(point().half_width)

    @pytest.mark.parametrize("seed", range(3))
    def test_told_apart_is_the_paired_test(self, seed):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0.5, 0.1, 4), rng.normal(0.5 + 0.1 * seed, 0.1, 4)
        expected = stats.ttest_rel(a, b).pvalue < 0.05
        assert differs_significantly(point(scores=a), point("n", scores=b)) == expected
        assert differs_significantly(point(), point("n")) is None

    def test_affordable_is_the_costliest_run_within_the_total(self):
        points = [point("free", b) for b in (1, 2, 4)]
        points += [point("dear", b, selection=1.5, training=b) for b in (1, 2, 4)]
        one, two, four = budgets_of(points)
        assert [limit.flops for limit in (one, two, four)] == [1, 2, 4]
        assert {(p.method, p.budget_flops) for p in within_budget(points, four)} == {("free", 4), ("dear", 2)}
        assert {(p.method, p.budget_flops) for p in within_budget(points, two)} == {("free", 2)}

    def test_budgets_that_differ_by_seed_are_held_against_runs_of_the_same_seeds(self):
        """One percent apart, as where seeds draw examples of other lengths: each method spends all it may."""
        flops = {0: 1.00, 1: 1.01, 2: 1.02}

        def of(method, score, seeds, scale=1.0):
            costs = tuple(scale * flops[s] for s in seeds)
            scores = [score + 0.01 * s for s in seeds]
            return point(method, scale, scores, budgets=costs, seeds=seeds, training=float(np.mean(costs)))

        for order in itertools.permutations((0, 1, 2)):
            points = [of("a", 0.5, order), of("late", 0.6, order[1:]), of("b", 0.3, order)]
            points += [of("a", 0.7, order, 2.0), of("late", 0.5, order[1:], 2.0), of("b", 0.9, order, 2.0)]
            result = answers(points)
            assert [(a.budget, a.flops, a.best.method) for a in result] == [
                ("1 epochs", pytest.approx(1.01), "a"),
                ("2 epochs", pytest.approx(2.02), "b"),
            ]
            assert all("run with" not in a.sentence for a in result)
            assert all({p.budget for p in within_budget(points, x)} == {x.budget} for x in budgets_of(points))
            assert {m: len(rows) for m, rows in regrets(points).items()} == {"a": 2, "b": 2}

    def test_a_method_with_fewer_seeds_is_not_held_against_the_others(self):
        points = [point("a", scores=(0.5, 0.6, 0.7)), point("lucky", scores=(0.9,)), point("b", scores=(0.4, 0.5, 0.5))]
        (answer,) = answers(points)
        assert answer.best.method == "a"
        assert answer.sentence.endswith(" Not compared: lucky (1 of 3 seeds).")
        assert set(regrets(points)) == {"a", "b"}
        table = markdown_table(points)
        assert "| *60.00 ±" in table
        assert "| 90.00 (1 of 3 seeds) |" in table

    def test_runs_scored_by_different_metrics_are_not_mixed(self):
        columns = {"task": "t", "model": "", "budget": "1", "budget_flops": 1.0, "selector": "m", "maximised": None}
        flops = {"selection_flops": 0.0, "selection_flops_spent": 0.0, "training_flops": 3.0, "full_flops": 1.0}
        columns |= flops | {"n_selected": 1, "n_pool": 2, "metrics": '{"accuracy": 0.5, "loss": 2.0}'}
        for methods in (("a", "a"), ("a", "b")):
            rows = [row(m, **columns) | {"method": m, "seed": i} for i, m in enumerate(methods)]
            rows[1] |= {"metric": "loss", "score": 2.0}
            with pytest.raises(ConfigError, match="give --metric"):
                points_of(rows)
            assert {p.metric for p in points_of(rows, "loss")} == {"loss"}
        with pytest.raises(DataError, match="a has accuracy nan"):
            points_of([row("a", **columns) | {"method": "a", "score": math.nan}])

    def test_a_budget_given_in_two_ways_is_one(self):
        points = [point("a", 1.0), dataclasses.replace(point("b", 1.0), budget="1e0 FLOPs")]
        assert [limit.budget for limit in budgets_of(points)] == ["1 epochs"]

    def test_the_direction_is_what_the_run_says(self):
        columns = {"task": "t", "model": "", "budget": "1", "budget_flops": 1.0, "selector": "m"}
        columns |= {"metric": "utility_loss"}
        flops = {"selection_flops": 1.0, "selection_flops_spent": 2.0, "training_flops": 3.0, "full_flops": 1.0}
        sizes = {"n_selected": 1, "n_pool": 2, "metrics": '{"utility_loss": 0.5, "bits_per_byte": 2.0}'}
        for said, best in ((True, "b"), (False, "a"), (None, "a")):
            rows = [
                row(m, **columns, **flops, **sizes) | {"method": m, "score": v, "maximised": said}
                for m, v in (("a", 0.2), ("b", 0.4))
            ]
            assert best_of(points_of(rows)).method == best
            assert not points_of(rows, "bits_per_byte")[0].maximised

    @pytest.mark.parametrize(
        ("metric", "best"),
        [("accuracy", "b"), ("loss", "a"), ("calibrated_loss", "a"), ("test_nll", "a"), ("mae", "a")],
    )
    def test_best_by_the_direction_of_the_metric(self, metric, best):
        points = [point("a", scores=(0.2,), metric=metric), point("b", scores=(0.3,), metric=metric)]
        assert best_of(points).method == best
        assert higher_is_better(metric) == (best == "b")

    def test_ties_go_to_the_cheaper_selection(self):
        assert best_of([point("dear", 2, selection=1.0), point("free", 2)]).method == "free"

    def test_an_answer_for_each_budget(self):
        points = [
            point("a", 1, (0.5, 0.52)),
            point("b", 1, (0.4, 0.41)),
            point("a", 2, (0.5, 0.6)),
            point("b", 2, (0.6, 0.5)),
        ]
        first, second = answers(points)
        assert (first.best.method, first.level) == ("a", ("b",)) or first.level == ()
        assert first.sentence.startswith("At 1 epoch (1 FLOPs in all) a has the best mean: accuracy 51.00 ±")
        assert second.level == ("b",)
        assert "By 2 seeds it cannot be told apart from b." in second.sentence

    def test_regret_is_the_distance_to_the_best(self):
        points = [point(m, b, (s,)) for m, b, s in (("a", 1, 0.5), ("b", 1, 0.3), ("a", 2, 0.5), ("b", 2, 0.9))]
        assert regrets(points) == {
            "a": [(1, 0.0), (2, pytest.approx(0.4))],
            "b": [(1, pytest.approx(0.2)), (2, 0.0)],
        }
        assert regrets([dataclasses.replace(p, metric="loss", maximised=False) for p in points])["b"] == [
            (1, 0.0),
            (2, pytest.approx(0.4)),
        ]

    def test_selection_that_grows_is_not_paid_up_front(self):
        assert fixed_selection([point(selection=0.5, budget=b) for b in (1, 2)]) == 0.5
        assert fixed_selection([point(selection=b / 4, budget=b) for b in (1, 2)]) == 0.0

    def test_measured_selection_that_hardly_varies_is_one_cost_and_said(self, caplog):
        costs = [(1, 0.50), (4, 0.52), (16, 0.51)]
        points = [point("m", b, (0.9 - 0.5 * math.exp(-b),), c, training=b) for b, c in costs]
        (group,) = analyse(points)
        assert fixed_selection(points) == group.fits["m"]["shifted"].c_select == 0.51
        assert (
            "differs by over 1%: 0.5 at 1 epochs, 0.52 at 4 epochs. The curve is fitted with the median" in caplog.text
        )
        assert to_json([group], {})["groups"][0]["doubtful_costs"] == group.doubtful_costs

    def test_the_best_of_each_budget_is_marked(self):
        points = [point("x", 1, (0.2,)), point("y|z", 1, (0.3,)), point("x", 5, (0.9,))]
        marked = [line for line in markdown_table(points).splitlines() if "*" in line]
        assert ["30.00" in marked[0], "90.00" in marked[1], len(marked)] == [True, True, 2]
        assert "y\\|z" in marked[0]

    def test_curves_that_say_nothing_are_held_against_no_other(self):
        """One method learns, the other goes up and down: its best curve is no better than their mean."""
        points = [point("learns", b, (0.9 - 0.5 * math.exp(-b),)) for b in (0.5, 1.0, 2.0, 8.0)]
        points += [point("wavers", b, (0.95 + 0.04 * (-1) ** i,)) for i, b in enumerate((0.5, 1.0, 2.0, 8.0))]
        (group,) = analyse(points)
        assert ([c.method for c in group.curves], group.unused) == (["learns"], ["wavers"])
        result = to_json([group], {})["groups"][0]
        assert (result["unused"], result["crossovers"]) == (["wavers"], [])
        assert "(measured there: wavers, which no curve describes)" in result["advice"][0]

    def test_too_few_budgets_are_said_and_not_fitted(self):
        result = to_json(analyse([point("a", 1), point("a", 2, (0.6,))]), {})
        (group,) = result["groups"]
        assert group["fits"] == {}
        assert "2 budgets" in group["not_fitted"]["a"]

    def test_losses_are_fitted_turned_around(self):
        points = [point("a", b, (1 + math.exp(-b),), metric="loss") for b in (1.0, 2.0, 3.0, 8.0)]
        (group,) = analyse(points)
        assert group.p_bar == pytest.approx(-1 - math.exp(-8))
        assert group.fits["a"]["shifted"].lam == pytest.approx(1.0, rel=0.01)
