"""The experiment grid: a tiny one is run; finished cells are kept; tables and intervals are checked."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cads.errors import ConfigError
from cads.selection import Selection
from experiments import vision
from experiments.vision import Cell, Row, draw, main, markdown_table, read_grid, summarise

GRID = """
task:
  {hidden: 16, n_pool: 80, n_target: 30, n_test: 100, sources: [{name: clean}, {name: noise 90 %, label_noise: 0.9}]}
train: {batch_size: 8, learning_rate: 0.003}
budgets: [4 epochs]
seeds: 2
methods:
  - full
  - {method: source, label: only clean, options: {name: clean}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a grid that was run once: grid.yaml, run/, table.md, table.png."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(GRID)
    assert run(folder) == 0
    return folder


def run(folder):
    table = str(folder / "table.md")
    return main([str(folder / "grid.yaml"), "--out", str(folder / "run"), "--results", table])


def cells(folder):
    return [Cell(**c) for c in json.loads((folder / "run" / "cells.json").read_text())]


class TestGrid:
    def test_a_cell_for_each_method_budget_and_seed(self, ran):
        found = [(c.method, c.budget, c.seed) for c in cells(ran)]
        assert found == [(m, "4 epochs", s) for s in (0, 1) for m in ("full", "only clean")]
        for cell in cells(ran):
            assert cell.selection_flops == 0
            assert cell.training_flops > 0
            assert 0 <= cell.accuracy <= 1
            assert cell.selected == (1.0 if cell.method == "full" else 0.5)

    def test_methods_at_one_budget_train_for_the_same(self, ran):
        assert len({c.training_flops for c in cells(ran)}) == 1

    def test_each_cell_keeps_its_selection_and_event_files(self, ran):
        places = sorted((ran / "run" / "cells").iterdir())
        assert len(places) == 4
        for place in places:
            assert Selection.load(place / "selection").method in ("full", "source")
            assert list((place / "tensorboard").rglob("*tfevents*"))

    def test_rows_of_the_table(self, ran):
        lines = (ran / "table.md").read_text().splitlines()
        rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line.startswith("| 4 epochs")]
        assert [row[1] for row in rows] == ["full", "only clean"]
        for row, summary in zip(rows, summarise(cells(ran)), strict=True):
            assert any(f"{100 * summary.accuracy:.2f} ± {100 * summary.half_width:.2f}" in text for text in row)
        assert sum("*" in text for row in rows for text in row) >= 1

    @pytest.mark.parametrize("name", ["table.png", "run/accuracy.png"])
    def test_the_figure_is_a_figure(self, ran, name):
        with Image.open(ran / name) as image:
            assert image.width >= 600
            assert image.height >= 400
            colours = image.convert("RGB").getcolors(10**6)
            white = dict((colour, count) for count, colour in colours)[255, 255, 255]
        assert len(colours) > 20
        assert 0.5 < white / (image.width * image.height) < 0.99

    def test_finished_cells_are_not_run_again(self, ran, monkeypatch):
        def times():
            return {f: f.stat().st_mtime_ns for f in (ran / "run" / "cells").rglob("*") if f.is_file()}

        before, results = times(), cells(ran)
        monkeypatch.setattr(vision, "run_cell", lambda *_: pytest.fail("a finished cell was run"))
        assert run(ran) == 0
        assert times() == before
        assert cells(ran) == results

    def test_a_stopped_grid_goes_on_where_it_was(self, ran):
        record = next((ran / "run" / "cells").glob("full-*-1")) / "cell.json"
        others = {f: f.stat().st_mtime_ns for f in (ran / "run" / "cells").rglob("cell.json") if f != record}
        before = cells(ran)
        record.unlink()
        assert run(ran) == 0
        assert {f: f.stat().st_mtime_ns for f in others} == others
        for old, new in zip(before, cells(ran), strict=True):
            assert dataclasses.replace(old, seconds=new.seconds) == new, "the same seed gives the same result"

    def test_other_settings_are_other_cells(self, ran):
        grid = read_grid(ran / "grid.yaml")
        first = vision._key(grid, grid.methods[0], "4 epochs")
        grid.train.learning_rate = 0.1
        assert vision._key(grid, grid.methods[0], "4 epochs") != first


class TestReadGrid:
    def test_published_configs_are_read(self):
        for name in ("demo", "fashion-mnist-noise", "cifar10-noise"):
            grid = read_grid(vision.Path(__file__).parents[1] / "experiments" / "configs" / f"{name}.yaml")
            assert {"full", "random", "target-only", "joint", "cads-s", "cads-e"} <= {e.method for e in grid.methods}
            assert len(grid.task.sources) == 5
            assert grid.seeds == 3

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            ("- full", "- fulll", "did you mean 'full'"),
            ("{name: clean}}", "{nam: clean}}", "nam"),
            ("{name: clean}}", "{}}", "name"),
        ],
    )
    def test_bad_methods_are_refused(self, tmp_path, old, new, match):
        (tmp_path / "g.yaml").write_text(GRID.replace(old, new))
        with pytest.raises(ConfigError, match=match):
            read_grid(tmp_path / "g.yaml")

    def test_a_missing_file_is_refused_without_a_traceback(self, tmp_path, capsys):
        assert main([str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")]) == 1
        assert "cannot be read" in " ".join(capsys.readouterr().out.split())


def cell(accuracy, seed=0, method="m", budget="1 epochs", flops=1e6):
    return Cell(method, budget, seed, accuracy, flops, 2 * flops, 0.5, 1.0, {}, {})


class TestSummarise:
    @pytest.mark.parametrize("values", [[0.5, 0.7], [0.81, 0.85, 0.8], list(np.linspace(0.2, 0.9, 10))])
    def test_intervals_are_those_of_scipy(self, values):
        (row,) = summarise([cell(v, s) for s, v in enumerate(values)])
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert row.accuracy == pytest.approx((low + high) / 2)
        assert row.half_width == pytest.approx((high - low) / 2)

    def test_known_numbers(self):
        # t(0.975, 2) = 4.302653 and the standard deviation of 1, 2, 3 is 1: 4.302653 / sqrt(3) = 2.484138.
        (row,) = summarise([cell(v) for v in (0.01, 0.02, 0.03)])
        assert row.half_width == pytest.approx(0.02484138, abs=1e-8)

    def test_one_seed_has_no_interval(self):
        (row,) = summarise([cell(0.5)])
        assert np.isnan(row.half_width)

    def test_a_row_for_each_method_and_budget(self):
        made = [cell(a, s, m, b) for s, a in ((0, 0.2), (1, 0.4)) for b in ("1 epochs", "5 epochs") for m in "xy"]
        rows = summarise(made)
        assert [(r.budget, r.method) for r in rows] == [(b, m) for b in ("1 epochs", "5 epochs") for m in "xy"]
        for row in rows:
            assert (row.accuracy, row.selection_flops, row.training_flops) == pytest.approx((0.3, 1e6, 2e6))

    def test_the_best_of_each_budget_is_marked(self):
        rows = summarise([cell(0.2, 0, "x"), cell(0.3, 0, "y"), cell(0.9, 0, "x", "5 epochs")])
        marked = [line for line in markdown_table(rows).splitlines() if "*" in line]
        assert len(marked) == 2
        assert "30.00" in marked[0]
        assert "90.00" in marked[1]


def test_a_figure_of_rows_without_intervals(tmp_path):
    rows = summarise([cell(0.2, 0, "cads-s"), cell(0.3, 0, "full", flops=0.0)])
    assert isinstance(rows[0], Row)
    draw(rows, tmp_path / "f.png", "one seed")
    assert (tmp_path / "f.png").stat().st_size > 10_000
