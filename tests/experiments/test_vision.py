"""The experiment grids: a tiny one is run, tabulated and reported; published configurations are read."""

from __future__ import annotations

import pytest
from PIL import Image

from cads.study.analysis.points import points_of, score_text
from cads.study.grid import read_grid, settings
from cads.study.report.page import write_report
from cads.study.tables import read_runs
from experiments.vision import main
from tests.support.paths import CONFIGS

pytestmark = pytest.mark.slow

GRID = """
task:
  {hidden: 16, n_pool: 80, n_target: 40, n_test: 100, sources: [{name: clean}, {name: noise 90 %, label_noise: 0.9}]}
train: {batch_size: 8, learning_rate: 0.003}
budgets: [4 epochs]
seeds: 2
count_selection: false
methods:
  - full
  - {method: source, label: only clean, options: {name: clean}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a grid that was run once: grid.yaml, run/, table.md, table.png."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(GRID)
    table = str(folder / "table.md")
    assert main([str(folder / "grid.yaml"), "--out", str(folder / "run"), "--results", table]) == 0
    return folder


def test_methods_at_one_budget_train_for_the_same(ran):
    rows = read_runs(ran / "run")
    assert [(r["seed"], r["method"]) for r in rows] == [(s, m) for s in (0, 1) for m in ("full", "only clean")]
    assert len({r["training_flops"] for r in rows}) == 1
    assert {r["selection_flops"] for r in rows} == {0.0}


def test_the_table_has_the_command_and_the_numbers(ran):
    text = (ran / "table.md").read_text()
    assert text.startswith("# grid: 2 seeds, 95% t-intervals\n\n    python -m experiments.vision ")
    assert "The budget is that of the training" in text
    rows = [
        [x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| 4 epochs")
    ]
    assert [row[1] for row in rows] == ["full", "only clean"]
    for row, point in zip(rows, points_of(read_runs(ran / "run")), strict=True):
        assert f"{score_text(point.mean, 'accuracy')} ± {score_text(point.half_width, 'accuracy')}" in row[4]
        assert row[5] == ("100%" if point.method == "full" else "50%")
    assert any(row[4].startswith("*") for row in rows)


def test_the_runs_are_kept_for_a_report(ran):
    assert read_runs(ran / "table") == read_runs(ran / "run")
    made = write_report(ran / "table")
    assert made.answers == write_report(ran / "run").answers


def test_a_page_named_as_the_folder_of_the_runs_is_refused(ran, capsys):
    """Its runs would be written among those that it shows."""
    words = [str(ran / "grid.yaml"), "--out", str(ran / "run"), "--results", str(ran / "run.md")]
    before = read_runs(ran / "run")
    assert main(words) == 1
    assert "name the page differently" in " ".join(capsys.readouterr().out.split())
    assert read_runs(ran / "run") == before


def test_the_figure_is_a_figure(ran):
    with Image.open(ran / "table.png") as image:
        assert image.width >= 600
        colours = image.convert("RGB").getcolors(10**6)
        white = {colour: count for count, colour in colours}[255, 255, 255]
    assert len(colours) > 20
    assert 0.5 < white / (image.width * image.height) < 0.99


def test_it_ends_with_the_report(ran):
    assert "only clean" in (ran / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "counted", "n_settings"),
    [("demo", True, 5), ("cifar10-noise", True, 15)],
)
def test_published_configs_are_read(name, counted, n_settings):
    grid = read_grid(CONFIGS / f"{name}.yaml")
    assert {"full", "random", "target-only", "joint", "search", "cads"} <= {e.method for e in grid.methods}
    assert grid.count_selection == counted
    assert [len(setting.config.sources) for setting in settings(grid)] == [5] * n_settings


def test_a_missing_file_is_refused_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "cannot be read" in " ".join(capsys.readouterr().out.split())
