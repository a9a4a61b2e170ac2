"""A grid as jobs of a launcher: the results are those of one machine, lost jobs are run again, failed cells are not."""

from __future__ import annotations

import pytest
from rich.console import Console

from cads.cli import study_commands
from cads.cli.main import main
from cads.errors import ConfigError
from cads.launch.launcher import Launcher, Outcome
from cads.study.grid import read_grid
from cads.study.launched import LaunchedGrid
from cads.study.runner import Study
from cads.study.shard import units_of
from cads.study.tables import FAILED, read_runs
from tests.support.grids import grid_file, run

TIMES = ("seconds", "ledger", "code")


class InThisProcess(Launcher):
    """Runs jobs here; the first one of all is lost before it does anything."""

    def __init__(self, folder, entry, settings):
        super().__init__(folder, entry, settings)
        self.rounds = []

    def run(self, jobs):
        lost = jobs[:1] if not self.rounds else []
        self.rounds.append([job.name for job in jobs])
        return {job.name: Outcome(None, "lost") if job in lost else Outcome(main(job.argv)) for job in jobs}


@pytest.fixture
def launcher(monkeypatch):
    """The launcher of the command, once it has been made."""
    made = []

    def make(settings, folder, entry):
        made.append(InThisProcess(folder, entry, settings))
        return made[0]

    monkeypatch.setattr(study_commands, "make_launcher", make)
    return made


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_results_are_those_of_one_machine_and_lost_jobs_are_run_again(tmp_path, launcher):
    expected = without_times(run(tmp_path, "one", seeds=1))
    flags = ["--out", str(tmp_path / "out"), "--launcher", "slurm", "--shards", "2"]
    assert main(["compare", str(grid_file(tmp_path, seeds=1)), *flags]) == 0
    assert without_times(read_runs(tmp_path / "out")) == expected
    assert launcher[0].rounds == [["cells-1-of-2", "cells-2-of-2"], ["cells-1-of-2"]]


def test_a_finished_grid_starts_nothing(tmp_path, launcher):
    run(tmp_path, "out", seeds=1)
    flags = ["--out", str(tmp_path / "out"), "--launcher", "local"]
    assert main(["compare", str(grid_file(tmp_path, seeds=1)), *flags]) == 0
    assert launcher[0].rounds == []


def test_a_cell_that_fails_by_itself_is_named_and_not_started_again(tmp_path, launcher, capfd):
    changes = {"seeds": 1, "budgets": ["2 epochs"], "train": {"batch_size": 8, "learning_rate": 1e30}}
    flags = ["--out", str(tmp_path / "out"), "--launcher", "slurm"]
    assert main(["compare", str(grid_file(tmp_path, **changes)), *flags]) == 1
    assert "cells failed" in capfd.readouterr().err.replace("\n", " ")
    assert {row["status"] for row in read_runs(tmp_path / "out")} == {FAILED}
    # The lost job alone has a second turn; those whose cells have failed have not.
    assert [len(names) for names in launcher[0].rounds] == [3, 1]


def test_there_are_as_many_jobs_as_units_at_most(tmp_path):
    grid = read_grid(grid_file(tmp_path, seeds=1))
    study = Study(grid, tmp_path / "out", Console(quiet=True))
    plans = study.plan()
    jobs = LaunchedGrid(study, plans, 1000).pending()
    # Cells that share a ranking are one unit.
    assert len(jobs) == len(units_of(plans)) == 5
    assert {job.argv[0] for job in jobs} == {"compare"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--shard", "1/2", "--launcher", "local"], "one of the two"), (["--workers", "2"], "without effect")],
)
def test_flags_that_contradict_each_other(tmp_path, flags, reason):
    with pytest.raises(ConfigError, match=reason):
        study_commands.compare([str(grid_file(tmp_path)), "--out", str(tmp_path / "out"), *flags])
