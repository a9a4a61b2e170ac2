"""The trackers of a grid: each cell is a run of each of them, under its key."""

import pytest

from cads.cli.main import main
from cads.runtime import trackers
from cads.runtime.trackers import Tracker
from tests.support.grids import grid_file, run


class Memory(Tracker):
    """Keeps the settings of runs in memory."""

    runs: dict = {}  # noqa: RUF012

    def __init__(self, folder, run):
        self.run = run
        Memory.runs[run] = {"tags": set()}

    def scalar(self, tag, value, step):
        Memory.runs[self.run]["tags"].add(tag)

    def hparams(self, settings, metrics):
        Memory.runs[self.run] |= settings

    def close(self):
        Memory.runs[self.run]["closed"] = True


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(Memory, "runs", {})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Memory, "json"))
    return Memory


SMALL = {"methods": ["full"], "budgets": ["2 epochs"]}


def test_each_cell_is_a_run_of_each_tracker(tmp_path, memory):
    rows = run(tmp_path, track=["tensorboard", "wandb"], **SMALL)
    assert len(rows) == 2
    assert memory.runs.keys() == {row["cell"] for row in rows}
    for row in rows:
        kept = memory.runs[row["cell"]]
        assert (kept["seed"], kept["method"], kept["closed"]) == (row["seed"], "full", True)
        assert "final model/training_loss" in kept["tags"]
        assert list((tmp_path / "out" / "cells" / row["cell"]).rglob("*tfevents*"))


def test_trackers_change_no_cell(tmp_path, memory):
    first = run(tmp_path, **SMALL)
    again = run(tmp_path, track="wandb", **SMALL)
    assert [(row["cell"], row["score"]) for row in again] == [(row["cell"], row["score"]) for row in first]
    assert not memory.runs, "finished cells were run again"


def test_none_at_all(tmp_path):
    (row, _) = run(tmp_path, track=None, **SMALL)
    assert (tmp_path / "out" / "cells" / row["cell"] / "selection").exists()
    assert not list(tmp_path.rglob("*tfevents*"))


def test_the_command_says_where_curves_are(tmp_path, memory, capsys):
    words = ["compare", str(grid_file(tmp_path, **SMALL)), "--out", str(tmp_path / "out"), "--seeds", "1"]
    assert main([*words, "--track", "wandb"]) == 0
    printed = capsys.readouterr().out
    assert "Weights & Biases: the project `cads`" in printed
    assert "TensorBoard" not in printed
    assert len(memory.runs) == 1


def test_what_is_not_installed_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", (Memory, "no_such_package"))
    words = ["compare", str(grid_file(tmp_path, **SMALL)), "--out", str(tmp_path / "out"), "--track", "mlflow"]
    assert main(words) == 1
    assert "pip install 'cads-select[mlflow]'" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("out/tables/runs/*"))
