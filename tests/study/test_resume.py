"""A grid that was stopped goes on within the cell and the ranking that were under way, to the same tables."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest

from cads.cli.main import main
from cads.errors import ConfigError
from cads.runtime import journal
from cads.runtime.checkpoint import CheckpointConfig, Checkpoints
from cads.runtime.lock import RunLock
from cads.study.grid import cells, read_grid, settings
from cads.study.tables import DONE, FAILED, TABLES, read_rows
from cads.tasks.vision.task import VisionTask
from tests.support.grids import grid_file, run
from tests.support.killed_runs import killed

NEVER, EVERY_STEP = {"every_seconds": None}, {"every_seconds": None, "every_steps": 1}
CHANGES = {"methods": ["rho", "search"], "budgets": ["5 epochs"], "seeds": 1, "count_selection": False}
MOMENTS = ("in a ranking", "in its training", "in a search", "in the last training")


@pytest.fixture(scope="module", autouse=True)
def code():
    """The code is the same in all of these runs, even if somebody is working on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cads.study.runner.code_digest", lambda _: "this")
        yield


@contextmanager
def watched(at=None, number=None):
    """Yields a list of the steps of this process: (cell or ranking, operation); after step `at` it gets a signal."""
    taken, step = [], journal._Underway.step

    def noted(self, state):
        taken.append((self._journal.store.checkpoints.folder.name, self._index, self._name))
        if at is not None and len(taken) == at + 1:
            os.kill(os.getpid(), number)
        step(self, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal._Underway, "step", noted)
        yield taken


def tables(folder):
    """All that is in the tables, but for the times and the code."""
    found = {name: read_rows(folder, name) for name in TABLES}
    for row in found["runs"]:
        del row["seconds"]
        del row["code"]
        row["ledger"] = [{k: v for k, v in e.items() if k != "seconds"} for e in json.loads(row["ledger"])]
    return found


def left_over(folder):
    return [*folder.glob("checkpoints"), *folder.glob("checkpoints/*"), *(folder / "cells").glob(".*")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid when nothing disturbs it: its tables, its steps, and a step in the middle of each of its parts."""
    folder = tmp_path_factory.mktemp("whole")
    with watched() as steps:
        run(folder, **CHANGES, checkpoint=NEVER)
    keys = list(dict.fromkeys(key for key, _, _ in steps))
    assert [key.split("-")[0] for key in keys] == ["rho", "rho", "search"], "a ranking, its cell, and another cell"
    spans = [[i for i, (key, _, _) in enumerate(steps) if key == wanted] for wanted in keys]
    last = [i for i in spans[2] if steps[i] == steps[-1]]
    spans[2:] = [spans[2][: -len(last)], last]
    assert all(len(span) > 8 for span in spans)
    middle = {moment: span[len(span) // 2] for moment, span in zip(MOMENTS, spans, strict=True)}
    return SimpleNamespace(out=folder / "out", tables=tables(folder / "out"), steps=steps, keys=keys, middle=middle)


class TestKilled:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_no_step_is_taken_twice_and_the_tables_are_the_same(self, whole, tmp_path, caplog, moment):
        at = whole.middle[moment]
        assert not killed(lambda: run(tmp_path, **CHANGES, checkpoint=EVERY_STEP), at)
        caplog.clear()
        with watched() as steps:
            run(tmp_path, **CHANGES, checkpoint=NEVER)
        assert steps == whole.steps[at + 1 :]
        assert tables(tmp_path / "out") == whole.tables
        assert caplog.text.count(f"{whole.steps[at][0]}: going on from the checkpoints") == 1
        assert not left_over(tmp_path / "out")
        place = tmp_path / "out" / "cells" / whole.keys[-1] / "tensorboard"
        assert len(list(place.glob("events*"))) == 1

    def test_again_and_again(self, whole, tmp_path):
        for first, second in pairwise([0, *(whole.middle[moment] for moment in MOMENTS[1::2])]):
            assert not killed(lambda: run(tmp_path, **CHANGES, checkpoint=EVERY_STEP), second - first - 1)
        with watched() as steps:
            run(tmp_path, **CHANGES, checkpoint=NEVER)
        assert steps == whole.steps[whole.middle[MOMENTS[-1]] :]
        assert tables(tmp_path / "out") == whole.tables

    def test_the_courses_of_probabilities_are_whole(self, whole):
        courses = {row["method"]: json.loads(row["probability_course"]) for row in whole.tables["runs"]}
        assert {method: len(course) > 0 for method, course in courses.items()} == {"rho": False, "search": True}


class TestOthers:
    """What cannot be gone on from does not stop a grid."""

    def stopped(self, folder, at):
        assert not killed(lambda: run(folder, **CHANGES, checkpoint=EVERY_STEP), at)

    @pytest.mark.parametrize(
        ("moment", "changed", "value", "said"),
        [
            ("in a ranking", "runner.code_digest", lambda _: "other", "code was 'this', now 'other'"),
            ("in a search", "journals.versions", lambda: {"torch": "0.1"}, "versions.torch was "),
        ],
    )
    def test_of_other_code_or_versions(self, whole, tmp_path, caplog, monkeypatch, moment, changed, value, said):
        at = whole.middle[moment]
        self.stopped(tmp_path, at)
        caplog.clear()
        monkeypatch.setattr(f"cads.study.{changed}", value)
        with watched() as steps:
            run(tmp_path, **CHANGES, checkpoint=NEVER)
        key = whole.steps[at][0]
        assert caplog.text.count("begins anew") == 1
        assert f"{key} begins anew, its checkpoints are discarded: " in caplog.text
        assert said in caplog.text
        assert steps == whole.steps[[other for other, _, _ in whole.steps].index(key) :]
        assert tables(tmp_path / "out") == whole.tables
        assert not left_over(tmp_path / "out")

    def test_of_a_run_that_is_not_repeated(self, whole, tmp_path, caplog, monkeypatch):
        self.stopped(tmp_path, whole.middle["in the last training"])
        key_of = journal.key_of
        monkeypatch.setattr(journal, "key_of", lambda index, name, *rest: key_of(index, f"{name}'", *rest))
        run(tmp_path, **CHANGES, checkpoint=NEVER)
        assert "does not repeat the one before" in caplog.text
        assert tables(tmp_path / "out") == whole.tables
        assert not left_over(tmp_path / "out")

    def test_of_another_grid(self, tmp_path, caplog):
        half = {"method": "random", "options": {"fraction": 0.5}}
        place, changes = tmp_path / "out" / "checkpoints" / "other-grid", {**CHANGES, "methods": [half]}
        (place / "000001-finished").mkdir(parents=True)
        with RunLock(tmp_path / "out" / "locks" / place.name):
            run(tmp_path, **changes)
        assert place.is_dir(), "another process works on it"
        assert not caplog.records
        run(tmp_path, **changes)
        assert not place.parent.exists()
        (record,) = caplog.records
        assert record.getMessage() == (
            "checkpoints of cells and rankings that are not in this grid are discarded: other-grid"
        )

    def test_of_what_was_finished_before_they_were_removed(self, whole, tmp_path, caplog):
        run(tmp_path, **CHANGES)
        caplog.clear()
        for key in whole.keys:
            (tmp_path / "out" / "checkpoints" / key / "000001-finished").mkdir(parents=True)
        (tmp_path / "out" / "checkpoints" / f".{whole.keys[0]}.abc").mkdir()
        with watched() as steps:
            run(tmp_path, **CHANGES)
        assert (steps, caplog.text) == ([], "")
        assert not left_over(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGTERM, "in a ranking"), (signal.SIGINT, "in a search"), (signal.SIGINT, "at last")]
)
def test_a_signal_stops_it_with_a_checkpoint_and_all_its_time_is_told(
    whole, tmp_path, capsys, monkeypatch, number, moment
):
    """Where each step takes a second, a cell takes as many seconds as it takes steps, in however many processes."""
    clock = [0.0]
    monkeypatch.setattr("cads.runtime.journal_store.time", SimpleNamespace(monotonic=lambda: clock[0]))
    step = journal._Underway.step

    def ticking(self, state):
        clock[0] += 1
        step(self, state)

    monkeypatch.setattr(journal._Underway, "step", ticking)
    argv = ["compare", str(grid_file(tmp_path, **CHANGES, checkpoint=NEVER)), "--out", str(tmp_path / "out")]
    at = whole.middle.get(moment, len(whole.steps) - 1)
    with watched(at, number) as before:
        assert main(argv) == 128 + number
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped by {signal.Signals(number).name} during" in said
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    # Nothing of it lasts longer than what went before.
    clock[0] += 1000
    with watched() as after:
        assert main(argv) == 0
    assert before + after == whole.steps
    assert tables(tmp_path / "out") == whole.tables
    took = [sum(other == key for other, _, _ in whole.steps) for key in whole.keys]
    seconds = {row["method"]: row["seconds"] for row in read_rows(tmp_path / "out", "runs")}
    assert seconds == {"rho": took[0] + took[1], "search": took[2]}


def test_a_cell_that_failed_goes_on_when_it_is_tried_again(whole, tmp_path, monkeypatch):
    plain, calls = VisionTask.training_losses, []

    def losses(*given):
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("out of memory")
        return plain(*given)

    monkeypatch.setattr(VisionTask, "training_losses", losses)
    changes = {"methods": ["full"], "budgets": ["2 epochs"], "seeds": 1, "checkpoint": EVERY_STEP}
    assert [row["status"] for row in run(tmp_path, **changes)] == [FAILED]
    with watched() as steps:
        assert [row["status"] for row in run(tmp_path, **changes)] == [DONE]
    assert len(steps) == 20 - 9


def test_cells_that_are_shorter_than_the_interval_write_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "write", lambda *_: pytest.fail("a checkpoint was written"))
    assert {row["status"] for row in run(tmp_path, **CHANGES)} == {DONE}


class TestSettings:
    def test_how_often_changes_no_cell(self, tmp_path):
        def keys(**changes):
            grid = read_grid(grid_file(tmp_path, **changes))
            return [cell.key({"pool": "p"}, "1") for setting in settings(grid) for cell in cells(grid, setting)]

        assert keys() == keys(checkpoint=EVERY_STEP) == keys(checkpoint={"every_seconds": 5})
        assert read_grid(grid_file(tmp_path)).checkpoint == CheckpointConfig()

    @pytest.mark.parametrize(
        ("checkpoint", "match"),
        [({"every_second": 1}, "every_second"), ({"every_steps": 0}, "every_steps = 0"), ("often", "checkpoint")],
    )
    def test_what_cannot_be_used_is_refused_by_name(self, tmp_path, checkpoint, match):
        with pytest.raises(ConfigError, match=match):
            read_grid(grid_file(tmp_path, checkpoint=checkpoint))
