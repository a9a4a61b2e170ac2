"""Comparison grids: what is refused before anything is spent, equal totals, shared rankings, shards, resuming."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from baselines.full import Full
from baselines.random import Random, random_scores
from cads.accounting.ledger import SELECT, PlannedLedger
from cads.cli.main import main
from cads.errors import BudgetError, ConfigError
from cads.registry import selector_class
from cads.runtime.lock import RunLock
from cads.runtime.signals import Interrupted
from cads.scoring.ranker import Ranker
from cads.selection import Selection
from cads.study.cells import Recorder, price
from cads.study.grid import Cell, cells, check_grid, read_grid, settings
from cads.study.runner import Study
from cads.study.shard import GridShard
from cads.study.tables import DONE, FAILED, NOT_APPLICABLE, OVER_BUDGET, read_rows, read_runs
from cads.training.final import train
from tests.support.grids import GRID, grid_file, run
from tests.support.paths import CONFIGS, ROOT

STEP = 8 / 80
"""Share of a pass that one step takes."""


def results(rows: list[dict]) -> list[tuple]:
    """All that must not depend on the machine, the time, or how often the grid was stopped."""
    exact = ("cell", "status", "error", "score", "metrics", "selection_flops", "training_flops", "n_selected", "notes")
    return [tuple(row[name] for name in exact) for row in rows]


def times(folder: Path) -> dict[Path, int]:
    return {
        f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.name not in ("grid.json", "config.yaml")
    }


def with_nan(outcome):
    return replace(outcome, metrics={name: math.nan for name in outcome.metrics})


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which the grid was run once, into `out`."""
    folder = tmp_path_factory.mktemp("compare")
    run(folder)
    return folder


class TestGrid:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"methods": ["fulll"]}, "did you mean 'full'"),
            ({"methods": [{"method": "source", "options": {"nam": "clean"}}]}, "nam"),
            ({"methods": [{"method": "source"}]}, "name"),
            ({"methods": []}, "methods is empty"),
            ({"budgets": []}, "budgets is empty"),
            ({"budgets": ["many epochs"]}, "does not parse"),
            ({"budgets": ["2 epochs", "2.0 passes"]}, "same cells"),
            ({"methods": ["random", {"method": "random", "label": "half", "options": {"epochs": 4.0}}]}, "same cells"),
            ({"methods": [{"method": "random", "sweep": {"epochs": [None, 4.0]}}]}, "same cells"),
            ({"methods": [{"method": "random", "sweep": {"epoch": [2]}}]}, "epoch"),
            ({"methods": [{"method": "random", "sweep": {"epochs": []}}]}, "epochs in sweep is empty"),
            (
                {"methods": [{"method": "random", "options": {"epochs": 2}, "sweep": {"epochs": [4]}}]},
                "epochs in sweep is among its options",
            ),
            ({"models": [{"label": "a"}, {"label": "b", "task": {"hidden": 16}}]}, "same cells"),
            ({"methods": ["full", "full"]}, "same cells"),
            ({"methods": ["full", {"method": "full", "label": "again"}]}, "same cells"),
            ({"methods": ["full", {"method": "random", "label": "full"}]}, "same cells"),
            ({"models": [{"label": "a"}, {"label": "a"}]}, "same cells"),
            ({"seeds": 0}, "seeds = 0"),
            ({"kind": "visionary"}, "did you mean 'vision'"),
            ({"charge": "half"}, "charge = 'half'"),
            ({"charge": "amortised: 0.5"}, "T >= 1"),
            ({"taks": {}}, "taks"),
            ({"task": {"hiden": 16}}, "hiden"),
            ({"train": {"batch_size": "many"}}, "batch_size"),
            ({"models": [{"label": "a", "task": {"hiden": 1}}]}, "hiden"),
        ],
    )
    def test_what_cannot_be_used_is_refused_by_name(self, tmp_path, changes, match):
        with pytest.raises((ConfigError, BudgetError), match=match):
            read_grid(grid_file(tmp_path, **changes))

    def test_files_that_are_no_grid(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_grid(tmp_path / "none.yaml")
        for text in ("- 1", "methods: full", "a: [", "!!python/object/apply:os.system [ls]"):
            (tmp_path / "g.yaml").write_text(text)
            with pytest.raises(ConfigError):
                read_grid(tmp_path / "g.yaml")

    def test_every_combination_once(self, tmp_path):
        models = [{"label": "small", "task": {"hidden": 8}}, {"label": "large", "task": {"hidden": 32}}]
        tasks = [{"label": "a"}, {"label": "b", "task": {"n_pool": 60}}]
        grid = read_grid(grid_file(tmp_path, models=models, tasks=tasks))
        made = [cell for setting in settings(grid) for cell in cells(grid, setting)]
        named = {(c.setting.task, c.setting.model, c.setting.seed, str(c.budget), c.label) for c in made}
        assert len(made) == len(named) == 2 * 2 * 2 * 2 * 3
        sizes = {(c.setting.task, c.setting.model): (c.setting.config.n_pool, c.setting.config.hidden) for c in made}
        assert sizes == {
            ("a", "small"): (80, 8),
            ("a", "large"): (80, 32),
            ("b", "small"): (60, 8),
            ("b", "large"): (60, 32),
        }
        assert {c.setting.seed: c.setting.config.data_seed for c in made} == {0: 0, 1: 1}

    def test_a_sweep_is_a_method_for_every_combination(self, tmp_path):
        ranking = {"method": "loss", "options": {"order": "low"}, "sweep": {"fraction": [None, 0.2, 0.4]}}
        both = {"label": "random and target", "sweep": {"fraction": [0.2, 0.4], "target_fraction": ["by size", 0.3]}}
        grid = read_grid(grid_file(tmp_path, methods=["full", ranking, {"method": "random", **both}]))
        low = {"order": "low"}
        assert [(grid.name(e), e.options) for e in grid.methods] == [
            ("full", {}),
            ("loss", low),
            ("loss, fraction 0.2", {**low, "fraction": 0.2}),
            ("loss, fraction 0.4", {**low, "fraction": 0.4}),
            *(
                (f"random and target, fraction {f}, target_fraction {t}", {"fraction": f, "target_fraction": t})
                for f in (0.2, 0.4)
                for t in ("by size", 0.3)
            ),
        ]

    def test_keys_follow_contents(self, tmp_path):
        def key(contents=("p", "t", "e"), version="1", which=0, **changes):
            grid = read_grid(grid_file(tmp_path, **changes))
            cell: Cell = cells(grid, next(iter(settings(grid))))[which]
            return cell.key(dict(zip(("pool", "target", "test"), contents, strict=True)), version)

        assert key() == key()
        others = [
            key(contents=("q", "t", "e")),
            key(version="2"),
            key(which=1),
            key(budgets=["3 epochs"]),
            key(train={"batch_size": 8, "learning_rate": 0.1}),
            key(count_selection=False),
            key(which=1, charge="amortised: 2"),
            key(methods=[{"method": "random", "label": "full"}]),
        ]
        assert len({key(), *others}) == len(others) + 1

    def test_a_method_that_took_over_a_name_has_cells_of_its_own(self, tmp_path, monkeypatch):
        grid = read_grid(grid_file(tmp_path))
        cell = cells(grid, next(iter(settings(grid))))[0]
        before = cell.key({}, "1")
        monkeypatch.setattr(selector_class(cell.entry.method), "revision", 2, raising=False)
        assert cell.key({}, "1") != before

    def test_a_search_is_paid_for_whole_where_rankings_are_shared(self, tmp_path):
        grid = read_grid(grid_file(tmp_path, charge="amortised: 4", methods=["random", "halving"]))
        assert {c.label: c.sharing for c in cells(grid, next(iter(settings(grid))))} == {"random": 4, "halving": 1}

    def test_labels_say_which_budget_is_meant(self, tmp_path):
        methods = ["full", {"method": "full", "count_selection": False}]
        grid = read_grid(grid_file(tmp_path, methods=methods))
        assert [grid.name(e) for e in grid.methods] == ["full", "full, on top"]
        grid.count_selection = False
        grid.methods[1].count_selection = True
        assert [grid.name(e) for e in grid.methods] == ["full", "full, all in"]
        check_grid(grid)

    @pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2"])
    def test_shards_that_are_none(self, text):
        with pytest.raises(ConfigError, match="i/n"):
            GridShard.parse(text)

    def test_published_configs_are_read(self):
        for path in CONFIGS.glob("compare-*.yaml"):
            grid = read_grid(path)
            assert grid.count_selection
            assert {"full", "random", "target-only"} <= {e.method for e in grid.methods}
            # Every ranking, as published and with the target as `cads` has it, by the rule and at fixed shares.
            rankings = {e.method for e in grid.methods if issubclass(selector_class(e.method), Ranker)} - {"random"}
            assert rankings
            for name in rankings:
                cuts = [
                    (e.options.get("target_fraction"), e.options.get("fraction"))
                    for e in grid.methods
                    if e.method == name
                ]
                assert cuts == [(None, None), *(("by size", f) for f in (None, 0.2, 0.4, 0.6, 0.8))]


class TestRun:
    def test_totals_meet_the_budget_to_the_step(self, ran):
        rows = read_runs(ran / "out")
        assert [row["status"] for row in rows] == [DONE] * 12
        for row in rows:
            epochs = float(row["budget"].split()[0])
            assert row["budget_flops"] == pytest.approx(epochs * row["full_flops"], rel=1e-6)
            assert row["total_flops"] == row["selection_flops"] + row["training_flops"]
            assert row["budget_flops"] * (1 - STEP / epochs - 1e-9) <= row["total_flops"] <= row["budget_flops"]

    def test_a_cell_keeps_selection_and_hparams(self, ran):
        for row in read_runs(ran / "out"):
            place = ran / "out" / "cells" / row["cell"]
            assert int(Selection.load(place / "selection").selected.sum()) == row["n_selected"]
            assert list((place / "tensorboard" / "hparams").glob("*tfevents*"))
        assert not list((ran / "out" / "cells").glob(".*"))

    def test_tables_agree_with_the_selections(self, ran):
        rows = {row["cell"]: row for row in read_runs(ran / "out")}
        selected: dict[str, list] = {}
        for row in read_rows(ran / "out", "selections"):
            selected.setdefault(row["cell"], []).append(row)
        assert {key: len(s) for key, s in selected.items()} == {key: row["n_selected"] for key, row in rows.items()}
        only_clean = [s for key, s in selected.items() if rows[key]["method"] == "only clean"]
        assert {r["source"] for s in only_clean for r in s} == {"clean"}
        examples = read_rows(ran / "out", "examples")
        assert {e["cell"] for e in examples} == set(rows)
        assert all(e["image"].startswith(b"\x89PNG") for e in examples)

    def test_rankings_are_made_once_and_cut_for_every_budget(self, ran):
        rankings = read_rows(ran / "out", "rankings")
        assert len({r["ranking"] for r in rankings}) == 2, "one a seed"
        runs = {row["cell"]: row for row in read_runs(ran / "out")}
        ids: dict[tuple, set] = {}
        for row in read_rows(ran / "out", "selections"):
            cell = runs[row["cell"]]
            if cell["method"] == "random":
                ids.setdefault((cell["seed"], cell["budget"]), set()).add(row["id"])
        for seed in (0, 1):
            assert ids[seed, "2 epochs"] < ids[seed, "4 epochs"]

    def test_finished_cells_are_not_run_again(self, ran, monkeypatch):
        before, rows = times(ran / "out"), read_runs(ran / "out")
        monkeypatch.setattr("cads.study.runner.run_cell", lambda *_: pytest.fail("a finished cell was run"))
        assert run(ran) == rows
        assert times(ran / "out") == before

    def test_a_lost_cell_is_run_again_with_the_same_result(self, ran):
        rows = read_runs(ran / "out")
        lost = next(row for row in rows if row["method"] == "random")
        (ran / "out" / "tables" / "runs" / f"{lost['cell']}.parquet").unlink()
        assert results(run(ran)) == results(rows)

    def test_shards_together_are_the_grid(self, ran, tmp_path):
        first = {row["cell"] for row in run(tmp_path, shard="1/2")}
        both = run(tmp_path, shard="2/2")
        assert 0 < len(first) < 12
        assert results(both) == results(read_runs(ran / "out"))

    def test_shards_have_about_the_same_to_do_and_rankings_to_themselves(self, tmp_path):
        plans = Study(read_grid(grid_file(tmp_path, seeds=4)), tmp_path / "o", Console(quiet=True)).plan()
        parts = [GridShard(i, 3).part(plans) for i in (1, 2, 3)]
        assert sorted(p.key for part in parts for p in part) == sorted(p.key for p in plans)
        assert max(sum(price(part)) for part in parts) < 1.35 * min(sum(price(part)) for part in parts)
        rankings = [{p.ranking for p in part if p.ranking} for part in parts]
        assert len(set.union(*rankings)) == sum(map(len, rankings)) == 4
        assert [p.key for p in plans if p in parts[0]] == [p.key for p in parts[0]]

    def test_a_cell_that_another_process_runs_is_left_to_it(self, tmp_path):
        study = Study(
            read_grid(grid_file(tmp_path, seeds=1, budgets=["2 epochs"])), tmp_path / "o", Console(quiet=True)
        )
        plans = study.plan()
        with RunLock(tmp_path / "o" / "locks" / plans[0].key):
            assert study.run(plans, GridShard()) == [plans[0].key]
        assert {row["cell"] for row in read_runs(tmp_path / "o")} == {p.key for p in plans[1:]}
        assert study.run(plans, GridShard()) == []

    def test_a_failure_is_recorded_and_tried_again(self, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("out of memory <b>")

        with monkeypatch.context() as patch:
            patch.setattr(Full, "select", fail)
            rows = run(tmp_path, seeds=1)
        assert {row["method"]: row["status"] for row in rows} == {"full": FAILED, "random": DONE, "only clean": DONE}
        assert {row["error"] for row in rows if row["status"] == FAILED} == {"RuntimeError: out of memory <b>"}
        before = {row["cell"]: row["seconds"] for row in rows if row["status"] == DONE}
        rows = run(tmp_path, seeds=1)
        assert {row["status"] for row in rows} == {DONE}
        assert {row["cell"]: row["seconds"] for row in rows if row["cell"] in before} == before

    def test_failures_are_named_at_the_end_and_the_command_fails(self, tmp_path, monkeypatch, capsys):
        def fail(*_, **__):
            raise RuntimeError("out of memory")

        words = ["compare", str(grid_file(tmp_path, seeds=1)), "--out", str(tmp_path / "o")]
        with monkeypatch.context() as patch:
            patch.setattr(Full, "select", fail)
            assert main(words) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "2 of 6 cells failed" in said
        assert said.count("RuntimeError: out of memory") == 2
        assert main(words) == 0

    @pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("stopped", signal.SIGTERM)])
    def test_a_grid_that_is_stopped_stops_and_notes_no_failure(self, tmp_path, monkeypatch, stop):
        def interrupted(*_, **__):
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr(Full, "select", interrupted)
            with pytest.raises(type(stop)):
                run(tmp_path, seeds=1, budgets=["2 epochs"])
        assert not (tmp_path / "out" / "tables").exists()
        assert {row["status"] for row in run(tmp_path, seeds=1, budgets=["2 epochs"])} == {DONE}

    def test_an_unknown_metric_is_refused_before_anything_is_spent(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cads.study.runner.run_cell", lambda *_: pytest.fail("compute was spent"))
        with pytest.raises(ConfigError, match=r"metric = 'acuracy'.*choose from.*accuracy"):
            run(tmp_path, metric="acuracy")

    def test_another_metric(self, tmp_path):
        assert run(tmp_path, "usual", seeds=1, budgets=["2 epochs"], methods=["full"])[0]["maximised"] is True
        rows = run(tmp_path, seeds=1, budgets=["2 epochs"], methods=["full"], metric="loss")
        assert rows[0]["score"] == json.loads(rows[0]["metrics"])["loss"]
        assert (rows[0]["maximised"], rows[0]["stderr"]) == (False, None)

    def test_finished_cells_are_scored_by_the_metric_that_is_asked_for_now(self, tmp_path, monkeypatch):
        changes = {"seeds": 1, "budgets": ["2 epochs"]}
        before = run(tmp_path, **changes, methods=["full"])
        rows = run(tmp_path, **changes, methods=["full", "random"], metric="loss")
        assert {row["metric"] for row in rows} == {"loss"}
        assert rows[0]["score"] == json.loads(before[0]["metrics"])["loss"]
        assert rows[0]["seconds"] == before[0]["seconds"], "it was not run again"
        monkeypatch.setattr("cads.study.runner.run_cell", lambda *_: pytest.fail("a finished cell was run"))
        assert run(tmp_path, **changes, methods=["full"]) == before

    def test_a_score_that_is_no_number_is_a_failure(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cads.study.cells.train", lambda *a, **k: with_nan(train(*a, **k)))
        (row,) = run(tmp_path, seeds=1, budgets=["2 epochs"], methods=["full"])
        assert row["status"] == FAILED
        assert "accuracy of the trained model is nan" in row["error"]

    def test_methods_that_do_not_apply_are_said_once(self, tmp_path, capsys):
        console = Console(force_terminal=False, width=300)
        task = {name: value for name, value in GRID["task"].items() if name != "sources"}
        study = Study(read_grid(grid_file(tmp_path, task=task, methods=["full", "search"])), tmp_path / "o", console)
        study.run(study.plan(), GridShard())
        rows = read_runs(tmp_path / "o")
        assert {(row["method"], row["status"]) for row in rows} == {("full", DONE), ("search", NOT_APPLICABLE)}
        said = capsys.readouterr().out
        reason = next(row["error"] for row in rows if row["status"] == NOT_APPLICABLE)
        assert said.count("n/a: search: ") == said.count(reason) == 1

    def test_budgets_that_come_to_the_same_flops(self, tmp_path):
        with pytest.raises(ConfigError, match="'2 epochs' and budget '160 usages' are both"):
            run(tmp_path, budgets=["2 epochs", "160 usages"])

    def test_a_grid_in_which_nothing_fits(self, tmp_path):
        with pytest.raises(BudgetError, match="does not buy one step"):
            run(tmp_path, budgets=["10 FLOPs", "20 FLOPs"])
        assert not (tmp_path / "out").exists()

    def test_budgets_of_training_alone(self, tmp_path):
        rows = run(tmp_path, seeds=1, budgets=["2 epochs"], count_selection=False)
        assert len({row["training_flops"] for row in rows}) == 1
        assert {row["count_selection"] for row in rows} == {False}


class TestCostlyRanking:
    """What a ranking costs, and who pays: a random one that charges 2.5 passes over the pool."""

    @pytest.fixture
    def cost(self, monkeypatch):
        passes, ranked = 2.5, []

        def flops(task):
            return passes * len(task.pool) * task.costs.per_usage(task.pool, task.recipe.batch_size)

        def rank(self, task, *, seed, ledger, monitor=None):
            ranked.append(seed)
            ledger.charge(SELECT, "scores", flops(task))
            return self.ranking(task, random_scores(task.pool, seed), seed=seed, ledger=ledger)

        def rank_plan(self, task):
            ledger = PlannedLedger()
            ledger.charge(SELECT, "scores", flops(task))
            return ledger

        monkeypatch.setattr(Random, "rank", rank)
        monkeypatch.setattr(Random, "rank_plan", rank_plan)
        return ranked

    def test_each_run_pays_all_and_what_does_not_fit_is_not_run(self, tmp_path, cost):
        rows = run(tmp_path, seeds=1, methods=["random"])
        assert [row["status"] for row in rows] == [OVER_BUDGET, DONE]
        assert "too little is left" in rows[0]["error"]
        assert (
            rows[1]["selection_flops"] == rows[1]["selection_flops_spent"] == pytest.approx(2.5 * rows[1]["full_flops"])
        )
        assert rows[1]["total_flops"] <= rows[1]["budget_flops"]
        assert rows[1]["training_flops"] <= 1.5 * rows[1]["full_flops"]

    def test_amortised_over_tasks(self, tmp_path, cost):
        rows = run(tmp_path, seeds=1, methods=["random"], charge={"amortised": 5})
        assert [row["status"] for row in rows] == [DONE, DONE]
        for row in rows:
            assert row["selection_flops_spent"] == pytest.approx(2.5 * row["full_flops"])
            assert row["selection_flops"] == pytest.approx(0.5 * row["full_flops"])
            assert row["total_flops"] <= row["budget_flops"]
        assert rows[1]["training_flops"] > 3.3 * rows[1]["full_flops"]
        assert cost == [0], "ranked once for both budgets"

    def test_the_price_counts_a_ranking_once(self, tmp_path, cost):
        budgets = ["3 epochs", "4 epochs", "5 epochs"]
        methods = [{"method": "random", "label": f"r{e}", "options": {"epochs": e}} for e in (1, 2)]
        grid = read_grid(grid_file(tmp_path, seeds=1, methods=methods, budgets=budgets))
        study = Study(grid, tmp_path / "o", Console(quiet=True))
        plans = study.plan()
        passes = [
            x / study.task(plans[0].cell.setting).costs.per_usage(study.task(plans[0].cell.setting).pool, 8) / 80
            for x in price(plans)
        ]
        assert passes == pytest.approx([2.5, 2 * (0.5 + 1.5 + 2.5)], rel=1e-6)
        assert cost == [], "planning ranks nothing"


class TestCommand:
    def test_dry_run_prints_the_price_and_spends_nothing(self, tmp_path, capsys):
        assert main(["compare", str(grid_file(tmp_path)), "--out", str(tmp_path / "o"), "--dry-run"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "12 of 12 cells to run" in said
        assert "only clean" in said
        assert not (tmp_path / "o").exists()

    def test_the_command_of_the_page_is_planned(self, tmp_path, monkeypatch, capsys):
        root = ROOT
        (line,) = re.findall(r"^(cads compare .*)$", (root / "docs/comparing.md").read_text(), re.MULTILINE)
        monkeypatch.chdir(root)
        # Whoever ran the demo before has its cells.
        argv = line.replace("runs/demo", str(tmp_path)).split()[1:]
        assert main([*argv, "--dry-run"]) == 0
        assert "90 of 90 cells to run" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        "argv", [[], ["none.yaml"], ["--import", "none.csv", "--out", "o"], ["--import", "none.csv"]]
    )
    def test_bad_calls_are_refused_without_a_traceback(self, tmp_path, monkeypatch, capsys, argv):
        monkeypatch.chdir(tmp_path)
        assert main(["compare", *argv]) == 1
        assert "Error: " in capsys.readouterr().err

    @pytest.mark.slow
    def test_killed_anywhere_it_goes_on_with_the_same_results(self, ran, tmp_path):
        out = tmp_path / "out"
        command = [sys.executable, "-c", "import sys; from cads.cli.main import main; sys.exit(main(sys.argv[1:]))"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        argv = ["compare", str(grid_file(tmp_path)), "--out", str(out)]
        with subprocess.Popen([*command, *argv], stdout=subprocess.DEVNULL, env=environment) as process:
            deadline = time.monotonic() + 120
            while not list((out / "tables" / "runs").glob("*.parquet")) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        kept = {f: f.stat().st_mtime_ns for f in (out / "tables" / "runs").glob("*.parquet")}
        assert 1 <= len(kept) < 12
        assert results(run(tmp_path)) == results(read_runs(ran / "out"))
        assert {f: f.stat().st_mtime_ns for f in kept} == kept
        assert not list((out / "cells").glob(".*"))


def test_the_course_of_probabilities_is_kept(tmp_path):
    with (recorder := Recorder(tmp_path)):
        recorder.probabilities(("a", "b"), [0.5, 0.25], 0)
        recorder.probabilities(("a", "b"), [0.75, 0.25], 1)
    assert recorder.course == [{"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.25}]
