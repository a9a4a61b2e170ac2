"""The known-answer benchmark: a world that is not shipped is run, and the truth is held against other ways to it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import ConfigError
from cads.registry import build_selector
from cads.selection import Selection
from cads.study.analysis.points import half_width
from experiments import oracle
from experiments.bound import Trained, bound, neighbours, sample
from experiments.oracle import contenders, main, value_of
from experiments.oracle_report import Cell, Reference, draw, markdown, rows_of, summary_of, weights
from experiments.truth import Truth, truth, worth
from experiments.worlds import BUILT_IN, SHIPPED, read_world

WORLD = """
task:
  dataset: digits
  hidden: 32
  n_target: 150
  sources:
    - {name: clean, size: 120}
    - {name: noise 80 %, size: 120, label_noise: 0.8}
    - {name: half of the classes, size: 120, classes: [0, 1, 2, 3, 4]}
train: {batch_size: 16, learning_rate: 0.003}
"""
BUDGET, SHORT, TRUTH_SEEDS = Budget(8, "epochs"), Budget(1, "epochs"), 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a world was written, and the benchmark run on it."""
    place = tmp_path_factory.mktemp("oracle")
    (place / "small.yaml").write_text(WORLD)
    assert run(place) == 0
    return place


@pytest.fixture(scope="module")
def task(folder):
    return read_world(folder / "small.yaml").build()


@pytest.fixture(scope="module")
def known(task, folder):
    return truth(task, BUDGET, TRUTH_SEEDS, folder / "truth")


def run(place, *more):
    words = ["--world", place / "small.yaml", "--budgets", "8", "--methods", "full,search,joint", "--seeds", "2"]
    words += ["--truth-seeds", TRUTH_SEEDS, "--json", place / "all.json", "--results", place / "table.md"]
    return main([*map(str, words), "--cache", str(place / "cells"), "--truth", str(place / "truth"), *more])


def cells(place):
    return [Cell(**c) for c in json.loads((place / "all.json").read_text())["cells"]]


def test_cads_is_not_worse_than_uniform(folder):
    regret = {
        name: [(c.regret_acc, c.regret_val) for c in cells(folder) if c.method == name] for name in ("full", "search")
    }
    assert len(regret["search"]) == 2
    assert np.mean(regret["full"], axis=0)[0] > 0.01, "the world is no test if the full pool is best"
    assert (np.mean(regret["search"], axis=0) <= np.mean(regret["full"], axis=0)).all()


def test_everything_is_in_the_json(folder, known):
    record = json.loads((folder / "all.json").read_text())
    assert [(c["method"], c["seed"]) for c in record["cells"]] == [
        (m, s) for m in ("full", "search", "joint") for s in (0, 1)
    ]
    for cell in record["cells"]:
        assert {"world", "budget", "chosen", "regret_val", "regret_acc", "selection_over_C", "seconds"} <= set(cell)
        assert cell["selection_over_C"] == pytest.approx(0) or cell["method"] == "search"
    (about,) = record["truth"]
    assert (about["subsets"], about["exhaustive"], about["world"]) == (7, True, "small")
    assert about["uniform_regret_acc"] == known.regret(np.ones(3, dtype=bool))[1]
    text = (folder / "table.md").read_text()
    assert "python -m experiments.oracle --world" in text
    assert text.count("| search |") == 2
    assert (folder / "table.png").stat().st_size > 10_000


def test_finished_cells_are_read_and_fresh_ones_run_again(folder, monkeypatch):
    before = cells(folder)

    def never(*_):
        raise AssertionError("a finished cell was run")

    with monkeypatch.context() as patched:
        patched.setattr(oracle, "value_of", never)
        assert run(folder) == 0
        assert cells(folder) == before
        with pytest.raises(AssertionError, match="finished"):
            run(folder, "--fresh", "joint")
    assert run(folder, "--fresh", "joint") == 0
    for old, new in zip(before, cells(folder), strict=True):
        assert (old.regret_acc, old.chosen, old.losses) == (new.regret_acc, new.chosen, new.losses)


class TestTruth:
    def test_the_best_is_chosen_on_even_seeds_and_measured_on_odd_ones(self):
        masks = np.array([[True, False], [False, True], [True, True]])
        accuracy = np.array([[0.9, 0.5, 0.9, 0.5], [0.8, 0.8, 0.8, 0.8], [0.1, 0.9, 0.1, 0.7]])
        known = Truth(masks, 1 - accuracy, accuracy, 1.0)
        assert known.regret(masks[1]) == pytest.approx((0.5 - 0.8 + 0.0, 0.5 - 0.8))
        assert known.regret(masks[0]) == pytest.approx((0, 0))
        assert known.floor == pytest.approx((0.3, 0.3))
        with pytest.raises(ConfigError, match=r"\[0, 0\] was not trained"):
            known.regret(np.array([False, False]))

    def test_a_subset_is_worth_the_same_as_a_selection(self, task, known, tmp_path):
        mask = np.array([True, False, True])
        selected = np.zeros(len(task.pool), dtype=bool)
        selected[task.pool.positions_in(mask)] = True
        made = Selection.from_pool(task.pool, selected=selected, method="x", seed=0, budget=BUDGET, ledger=Ledger())
        losses, accuracy = worth(task, made, known.flops, [1, 3], tmp_path)
        row = known.row(mask)
        assert losses == pytest.approx(known.losses[row, 1::2], rel=1e-4)
        assert accuracy == pytest.approx(known.accuracy[row, 1::2], abs=0.01)
        table = value_of(task, made, BUDGET, known, TRUTH_SEEDS, tmp_path)
        assert table[0].tolist() == known.losses[row, 1::2].tolist()

    def test_replicas_of_other_seeds_are_what_they_are_alone(self, task, known, tmp_path):
        target_only = build_selector("target-only").select(task, BUDGET, seed=0, ledger=Ledger())
        both, _ = worth(task, target_only, known.flops / 8, [1, 3], tmp_path)
        alone, _ = worth(task, target_only, known.flops / 8, [1], tmp_path)
        assert both[0] == pytest.approx(alone[0], rel=1e-4)
        assert both[0] != both[1]

    def test_what_trained_on_less_is_not_read_off_the_truth(self, task, known, tmp_path, monkeypatch):
        trained = []
        monkeypatch.setattr(oracle, "worth", lambda *given: trained.append(given) or (np.zeros(2), np.zeros(2)))
        ledger = Ledger()
        ledger.charge("select", "x", known.flops / 2)
        counted = Budget(8, "epochs", count_selection=True)
        everything = np.ones(len(task.pool), dtype=bool)
        made = Selection.from_pool(task.pool, selected=everything, method="x", seed=0, budget=counted, ledger=ledger)
        value_of(task, made, counted, known, TRUTH_SEEDS, tmp_path)
        assert trained[0][2] == pytest.approx(known.flops / 2)
        assert list(trained[0][3]) == [1, 3]


class TestBound:
    def test_with_few_sources_it_is_the_truth(self, task, tmp_path):
        known, found = (find(task, SHORT, TRUTH_SEEDS, tmp_path) for find in (truth, bound))
        assert not found.exhaustive
        assert len(found.masks) == 7
        for mask in known.masks:
            here, there = found.row(mask), known.row(mask)
            assert found.losses[here] == pytest.approx(known.losses[there], rel=1e-3)
        assert (found.masks[found.best[0]] == known.masks[known.best[0]]).all()

    def test_it_goes_on_where_it_was(self, task, tmp_path, monkeypatch):
        short = bound(task, SHORT, 2, tmp_path, seconds=0.0)
        assert np.isfinite(short.losses[short.best[0]]).all(), "even without time there is a measure"
        whole = bound(task, SHORT, 2, tmp_path)
        monkeypatch.setattr("experiments.bound.train_masks", lambda *_, **__: pytest.fail("trained again"))
        again = bound(task, SHORT, 2, tmp_path)
        assert np.array_equal(again.losses, whole.losses)

    def test_local_search_climbs_to_the_best(self, tmp_path, monkeypatch):
        hidden = np.random.default_rng(3).random(12) < 0.5
        fake = type("Task", (), {"pool": type("Pool", (), {"source_names": ("s",) * 12})()})()
        monkeypatch.setattr("experiments.bound.content_key", lambda *_: "fake")

        def distances(_, masks, flops, *, seed):
            away = np.array([(m != hidden).sum() for m in masks]) / 12
            return away, 1 - away

        monkeypatch.setattr("experiments.bound.train_masks", distances)
        found = bound(fake, Flops(), 4, tmp_path)
        assert (found.masks[found.best[0]] == hidden).all()
        assert len(found.masks) < 2**12 / 4

    def test_neighbours_differ_in_one_source(self):
        assert sorted(neighbours((True, False, True))) == [(False, False, True), (True, False, False), (True,) * 3]
        assert neighbours((True, False)) == [(True, True)]
        rows = sample(13, 100, 0)
        assert len(set(rows)) == len(rows) == 100
        assert all(any(row) for row in rows)
        assert sample(13, 100, 0) == rows

    def test_the_best_come_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr("experiments.bound.content_key", lambda *_: "fake")
        trained = Trained(None, 1.0, tmp_path, 1.0)
        trained.results = {((True, False), 0): (0.5, 0.2), ((True, True), 0): (0.4, 0.1), ((True, True), 2): (0.4, 0.1)}
        assert trained.best([0], 0) == [(True, True), (True, False)]
        assert trained.best([0], 1) == [(True, False), (True, True)]
        assert trained.best([0, 2], 0) == [(True, True)]


class Flops:
    """A budget that asks no task."""

    def flops(self, task):
        return 1.0


def cell(regret, method="m", seed=0, world="w", budget=4.0, chosen=(1.0, 0.0)):
    return Cell(world, budget, method, seed, list(chosen), regret / 10, regret, 2.0, 1.0, [], [])


def known_at(world, budget, uniform):
    return Reference(world, budget, ["a", "b"], [1.0, 0.0], 0.9, 0.1, uniform, 0.0, 0.001, True, 3)


class TestReport:
    def test_means_and_intervals_over_seeds(self):
        rows = rows_of([cell(0.01), cell(0.02, seed=1), cell(0.03, seed=2), cell(0.05, "n")])
        assert [r.method for r in rows] == ["m", "n"]
        # t(0.975, 2) = 4.302653 and the standard deviation of 1, 2, 3 is 1: 4.302653 / sqrt(3) = 2.484138.
        assert (rows[0].regret_acc, rows[0].width_acc) == pytest.approx((0.02, 0.02484138))
        assert np.isnan(half_width([1.0]))

    def test_the_summary_counts_cells_that_lose_to_uniform(self):
        references = [known_at("w", 1.0, 0.01), known_at("w", 4.0, 0.02), known_at("v", 4.0, 0.03)]
        regrets = {("w", 1.0): 0.016, ("w", 4.0): 0.024, ("v", 4.0): 0.01}
        made = [cell(r, seed=s, world=w, budget=b) for (w, b), r in regrets.items() for s in (0, 1)]
        (row,) = summary_of(made, references)
        assert row.regret_acc == pytest.approx(np.mean([0.016, 0.024, 0.01]))
        assert row.long_acc == pytest.approx(np.mean([0.024, 0.01]))
        assert row.worse == ["w 1 (+0.6)"]
        text = markdown(made, references)
        assert "1 of 3: w 1 (+0.6)" in text
        assert text.count("\n## ") == 4

    def test_no_long_budget(self, tmp_path):
        made, references = [cell(0.01, budget=1.0)], [known_at("w", 1.0, 0.01)]
        (row,) = summary_of(made, references)
        assert np.isnan(row.long_acc)
        assert "nan" not in markdown(made, references).lower()
        draw(made, references, tmp_path / "f.png")
        assert (tmp_path / "f.png").stat().st_size > 5_000

    def test_weights_in_short(self):
        assert weights([1.0, 0.0, 0.306, 0.999]) == "1 0 .31 1"


class TestInput:
    def test_labels_carry_options(self):
        (one, two) = contenders(["search", "free"], ["free={method: search, guard: false, count_selection: true}"])
        assert (one.method, one.options, one.count_selection) == ("search", {}, False)
        assert (two.method, two.options, two.count_selection) == ("search", {"guard": False}, True)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            (["full={colour: 1}"], "colour"),
            (["other={}"], "label of --methods"),
            (["full=3"], "LABEL="),
            (["full={"], "parse"),
        ],
    )
    def test_bad_options(self, settings, match):
        with pytest.raises(ConfigError, match=match):
            contenders(["full"], settings)

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [("task:", "tusk:", "tusk"), ("size: 120", "siz: 200", "siz"), ("dataset: digits", "dataset: dogs", "dogs")],
    )
    def test_bad_worlds(self, tmp_path, old, new, match):
        (tmp_path / "w.yaml").write_text(WORLD.replace(old, new))
        with pytest.raises(ConfigError, match=match):
            read_world(tmp_path / "w.yaml")

    @pytest.mark.parametrize("text", ["[1", "3", "task: {dataset: digits, sources: [{name: a}]}"])
    def test_no_world(self, tmp_path, text):
        (tmp_path / "w.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"w\.yaml"):
            read_world(tmp_path / "w.yaml")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--methods", "fulll"],
            ["--budgets", "x"],
            ["--seeds", "0"],
            ["--truth-seeds", "1"],
            ["--fresh", "nobody"],
            ["--world", "missing.yaml"],
        ],
    )
    def test_refused_without_a_traceback(self, tmp_path, capsys, flags):
        (tmp_path / "small.yaml").write_text(WORLD)
        assert run(tmp_path, *flags) == 1
        assert "Error: " in capsys.readouterr().out
        assert not (tmp_path / "truth").exists()

    def test_shipped_worlds_are_read(self):
        names = {world.name: len(world.task.sources) for world in map(read_world, BUILT_IN.glob("*.yaml"))}
        assert {"noise", "complementary", "domains", "redundant", "many"} <= set(names)
        assert names["many"] == 13
        assert set(names) == set(SHIPPED)

    def test_worlds_by_default_exist(self):
        given = oracle._arguments(["--json", "x"]).world
        assert [path.stem for path in given] == list(SHIPPED)
        assert all(path.exists() for path in given)
