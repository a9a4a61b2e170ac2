"""Launchers: every job runs, what is lost is started again, what fails for good is named. Small jobs, real engines."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cads.cli.main import main
from cads.errors import ConfigError
from cads.launch.launcher import WAITS, Job, Launcher, LaunchError, LaunchSettings, Outcome, launch
from cads.launch.launchers import make_launcher
from cads.runtime.shard import Shard
from tests.support.paths import ROOT

PACKAGES = {"slurm": "submitit", "ray": "ray"}


def lost_once(argv):
    """A job that its process does not survive the first time."""
    mark = Path(argv[0])
    if not mark.exists():
        mark.write_text("begun")
        os.kill(os.getpid(), signal.SIGKILL)
    mark.write_text("done")
    return 0


def settings(engine, **changes):
    options = {"slurm": {"cluster": "local", "timeout_min": 5}, "ray": {"num_cpus": 1}}
    if engine in PACKAGES:
        pytest.importorskip(PACKAGES[engine])
    return LaunchSettings(launcher=engine, workers=2, launcher_options=options.get(engine, {}), **changes)


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_every_job_runs_and_says_how_it_ended(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launcher = make_launcher(settings(engine), tmp_path / "logs", main)
    jobs = [Job("version", ("--version",)), Job("unknown", ("nonsense",))]
    launcher.folder.mkdir()
    try:
        outcomes = launcher.run(jobs)
    finally:
        launcher.close()
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"version": 0, "unknown": 2}
    assert "cads" in launcher.log_of(jobs[0]).read_text()
    assert "'nonsense' is unknown" in launcher.log_of(jobs[1]).read_text()


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_a_job_whose_process_is_killed_is_started_again(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    mark = tmp_path / "mark"
    said = []

    def pending():
        done = mark.exists() and mark.read_text() == "done"
        return [] if done else [Job("lost", (str(mark),))]

    launcher = make_launcher(settings(engine), tmp_path / "logs", lost_once)
    launch(launcher, pending, said.append)
    assert mark.read_text() == "done"
    assert (tmp_path / "logs" / "lost.log").exists()
    if engine == "slurm":
        # Ray Data starts the job again by itself.
        assert "lost" in said[0]


class Scripted(Launcher):
    """Gives outcomes from a script; None means that the job is not heard of again."""

    def __init__(self, folder, script, retries=1):
        super().__init__(folder, main, LaunchSettings(launcher="local", retries=retries))
        self.script, self.rounds = script, []

    def run(self, jobs):
        self.rounds.append([job.name for job in jobs])
        outcomes = {job.name: self.script[job.name].pop(0) for job in jobs}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def run_script(folder, script, **options):
    launcher, said = Scripted(folder, script, **options), []
    parts = {name: sum(outcome is not None and outcome.ended_well for outcome in script[name]) for name in script}

    def pending():
        ended = {name: parts[name] - sum(o is not None and o.ended_well for o in script[name]) for name in script}
        return [Job(name, (name, str(ended[name]))) for name in script if ended[name] < parts[name] or not parts[name]]

    launch(launcher, pending, said.append)
    return launcher.rounds, said


def test_jobs_that_wait_are_asked_again_and_lost_ones_started_again(tmp_path):
    script = {"a": [Outcome(WAITS), Outcome(0)], "b": [None, Outcome(0)], "c": [Outcome(0)]}
    rounds, said = run_script(tmp_path, script)
    assert rounds == [["a", "b", "c"], ["a", "b"]]
    assert said == ["b: it was lost; started again (1 of 1)"]


def test_a_job_that_fails_too_often_is_named_with_its_log(tmp_path):
    (tmp_path / "a.log").write_text("first\nConfigError: no such file\n")
    with pytest.raises(LaunchError, match=r"a \(exit status 1\).*no such file.*goes on from here"):
        run_script(tmp_path, {"a": [Outcome(1)] * 3})


def test_jobs_that_end_well_and_leave_their_part_undone_do_not_run_for_ever(tmp_path):
    launcher = Scripted(tmp_path, {"a": [Outcome(0)] * 9}, retries=2)
    with pytest.raises(LaunchError, match="left its part undone"):
        launch(launcher, lambda: [Job("a", ("a",))], lambda text: None)
    assert len(launcher.rounds) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"workers": 0, "launcher": "local"}, "workers = 0"), ({"shards": 2}, "without effect"), ({"retries": -1}, "-1")],
)
def test_settings_out_of_range(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        LaunchSettings(**fields)


def test_options_that_a_launcher_does_not_know(tmp_path):
    launcher = make_launcher(LaunchSettings(launcher="local", launcher_options={"queue": "x"}), tmp_path, main)
    with pytest.raises(ConfigError, match="has none"):
        launcher.run([Job("a", ("--version",))])
    pytest.importorskip("submitit")
    options = {"cluster": "local", "no_such_option": 1}
    launcher = make_launcher(LaunchSettings(launcher="slurm", launcher_options=options), tmp_path, main)
    with pytest.raises(ConfigError, match="no_such_option"):
        launcher.run([Job("a", ("--version",))])


class TestShard:
    def test_the_place_in_a_slurm_array(self, monkeypatch):
        for name, value in {"ID": "7", "MIN": "3", "STEP": "2", "COUNT": "4"}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        assert Shard.parse("slurm") == Shard(3, 4)
        monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
        with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_COUNT is not set"):
            Shard.parse("slurm")

    @pytest.mark.parametrize("of", [1, 2, 7, 30])
    def test_every_unit_is_in_one_shard_and_loads_are_alike(self, of):
        prices = [(37 * i) % 11 + 1.0 for i in range(25)]
        parts = [Shard(i, of).take(prices) for i in range(1, of + 1)]
        assert sorted(position for part in parts for position in part) == list(range(25))
        loads = [sum(prices[i] for i in part) for part in parts]
        assert max(loads) - min(loads) <= max(prices)
