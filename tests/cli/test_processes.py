"""Commands in several processes: each file is written once, and any number of processes goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.cli.main import main
from cads.registry import build_selector
from cads.runtime.processes import world_group
from cads.scoring.score_files import read_groups, stream_scores
from cads.selection import Selection
from cads.training import final as final_module
from tests.support.forked_processes import (
    PATIENCE,
    TOLERANCE,
    _close,
    _free_port,
    before_steps,
    chosen,
    entries,
    killed,
    mortal,
    spread,
)
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "processes.md"
CONFIG = """
task:
  {hidden: 8, n_pool: 120, n_target: 40, n_test: 40, sources: [{name: clean}, {name: noisy, label_noise: 0.9}]}
train: {batch_size: 8, learning_rate: 0.003}
budget: 6 epochs
progress: false
"""


def watch_writes(folder):
    """Any writing below `folder` in a process that is not the first ends it."""

    def audit(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and arguments:
            path = str(arguments[0])
            mode = arguments[2] if event == "open" and len(arguments) > 2 else os.O_WRONLY
            if path.startswith(str(folder)) and isinstance(mode, int) and mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise RuntimeError(f"{event} {arguments}")

    if not world_group().first:
        sys.addaudithook(audit)


class TestCommands:
    @pytest.fixture(autouse=True)
    def config(self, tmp_path):
        (tmp_path / "config.yaml").write_text(CONFIG)

    def run(self, folder, *argv, guard=None):
        if guard is not None:
            watch_writes(guard)
        return main([argv[0], str(folder / "config.yaml"), *map(str, argv[1:])])

    def test_select_and_train_write_once_and_go_on_with_other_numbers_of_processes(self, tmp_path):
        """Killed with -9 in two processes, gone on with in one, killed there, and gone on with in two."""
        whole, out, said = tmp_path / "whole", tmp_path / "out", tmp_path / "said"
        every = ("--checkpoint.every_steps", 4)
        assert self.run(tmp_path, "select", "--out", whole) == 0

        def work(steps=None):
            if steps is not None:
                mortal(steps)
            return self.run(tmp_path, "select", "--out", out, *every, guard=out)

        for size, steps in ((2, 12), (1, 10), (2, 9)):
            killed(size, lambda steps=steps: work(steps), said)
            assert list(out.glob("checkpoints/select/*/manifest.json"))
            assert not (out / "selection").exists()
        assert spread(2, work, said) == [0, 0]
        one, two = Selection.load(whole / "selection"), Selection.load(out / "selection")
        _close(chosen(two), chosen(one), TOLERANCE)
        assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "select.json", "selection", "tensorboard"]
        assert len(list((out / "tensorboard").rglob("events*"))) >= 1

        final = tmp_path / "train"

        def trained():
            return self.run(tmp_path, "train", "--selection", out / "selection", "--out", final, guard=final)

        assert spread(2, trained, said) == [0, 0]
        assert json.loads((final / "results.json").read_text())["steps"] > 10

    @pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 5), (signal.SIGINT, 14)])
    def test_a_signal_to_one_stops_all_at_the_same_step(self, tmp_path, number, at):
        """While they train one model together, and while they train replicas apart."""
        out, said = tmp_path / "out", tmp_path / "said"

        def work():
            taken = []

            def stop(kind):
                taken.append(kind.__name__)
                if len(taken) == at and not world_group().first:
                    os.kill(os.getpid(), number)

            before_steps(stop)
            return [self.run(tmp_path, "select", "--method", method, "--out", out), len(taken), taken[-1]]

        # `cads` trains the final model, in all processes; the trials of a search are divided among them.
        method = "cads" if at == 5 else "search"
        kind = "_Underway" if at == 5 else "Lockstep"
        assert spread(2, work, said) == [[128 + number, at, kind]] * 2
        assert len(list(out.glob("checkpoints/select/*-underway"))) == 1
        assert not (out / ".lock").exists()
        assert self.run(tmp_path, "select", "--method", method, "--out", out) == 0

    def test_compare_runs_each_cell_together(self, tmp_path):
        grid = tmp_path / "grid.yaml"
        grid.write_text(
            "task: {hidden: 8, n_pool: 100, n_target: 40, n_test: 40, sources: [{name: a}, {name: b}]}\n"
            "train: {batch_size: 8}\nbudgets: ['3 epochs']\nseeds: 1\nmethods: [full, loss, random]\n"
        )

        def work(out=tmp_path / "two", guard=True):
            if guard:
                watch_writes(out)
            return main(["compare", str(grid), "--out", str(out)])

        assert spread(2, work, tmp_path / "said") == [0, 0]
        assert work(tmp_path / "one", guard=False) == 0
        scores = [_scores(tmp_path / name) for name in ("one", "two")]
        assert scores[0] == scores[1]
        assert spread(2, work, tmp_path / "said") == [0, 0]

    def test_compare_goes_on_with_other_numbers_of_processes(self, tmp_path):
        """Two stop in a ranking by a signal to one of them, one goes on and is killed, and two end it."""
        grid, out, said = tmp_path / "grid.yaml", tmp_path / "out", tmp_path / "said"
        grid.write_text(
            "task: {hidden: 8, n_pool: 100, n_target: 40, n_test: 40, sources: [{name: a}, {name: b}]}\n"
            "train: {batch_size: 8}\nbudgets: ['8 epochs']\nseeds: 1\nmethods: [rho]\ncheckpoint: {every_steps: 1}\n"
        )

        def work(out=out, signalled=None, steps=None):
            taken = []

            def stop(_):
                taken.append(1)
                if len(taken) == signalled and not world_group().first:
                    os.kill(os.getpid(), signal.SIGTERM)

            if signalled is not None or steps is None:
                before_steps(stop)
            if steps is not None:
                mortal(steps)
            return [main(["compare", str(grid), "--out", str(out)]), len(taken)]

        (status, whole), _ = spread(2, lambda: work(tmp_path / "whole"), said)
        assert status == 0
        assert spread(2, lambda: work(signalled=8), said) == [[128 + signal.SIGTERM, 8]] * 2
        (place,) = (out / "checkpoints").iterdir()
        assert place.name.startswith("rho-0-")
        killed(1, lambda: work(steps=10), said)
        (first, left), (second, _) = spread(2, work, said)
        assert (first, second) == (0, 0)
        assert 0 < left < whole - 8
        assert _scores(out) == _scores(tmp_path / "whole")
        assert not (out / "checkpoints").exists()

    def test_the_launcher_of_the_page_starts_several_on_cpus(self, tmp_path):
        """Each divides the scores; were they alone, one would find the folder in use, or the work done."""
        (command,) = re.findall(r"^accelerate launch (.*--out) \S+$", PAGE.read_text(), re.MULTILINE)
        words = [str(tmp_path / "config.yaml") if w == "CONFIG" else w for w in command.split()]
        words[words.index("--num_processes") + 1] = "2"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", _free_port()]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, *words, str(tmp_path / "two"), "--method", "loss"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Selection: ") == 1
        assert "nothing to do" not in done.stdout
        assert self.run(tmp_path, "select", "--out", tmp_path / "one", "--method", "loss") == 0
        one, two = (chosen(Selection.load(tmp_path / name / "selection")) for name in ("one", "two"))
        _close(two, one, TOLERANCE)

    def test_a_report_is_written_once(self, tmp_path, monkeypatch):
        from cads.study.report import page

        made = page.ReportFiles(tmp_path / "report.html", tmp_path / "fits.json", tmp_path / "figures", ["so"])
        monkeypatch.setattr(page, "write_report", lambda *given: (tmp_path / "page").touch(exist_ok=False) or made)
        assert spread(2, lambda: main(["report", str(tmp_path)]), tmp_path / "said") == [0, 0]

    def test_rankings_and_streamed_scores_are_written_once(self, features, tmp_path):
        task = features(n=60)
        ranking, scores = tmp_path / "out" / "ranking", tmp_path / "out" / "scores.parquet"
        (tmp_path / "out").mkdir()

        def work():
            watch_writes(tmp_path / "out")
            ledger, found = Ledger(), []
            for _ in range(2):
                made = build_selector("loss", {}).rank_once(task, ranking, seed=0, ledger=ledger)
                found.append(made.score.tolist())
            price = task.costs.forward
            losses = partial(task.losses, task.model(0))
            stream_scores(task.pool, losses, price, scores, ledger=ledger, stage="scoring", shard=25)
            return [found, entries(ledger)]

        (first, second), one = spread(2, work, tmp_path / "said"), _moved(work, ranking)
        assert first == second == json.loads(json.dumps(one))
        assert sum(len(ids) for ids, _ in read_groups([scores])) == 60

    def test_utilisation_is_that_of_all(self, features, tmp_path, monkeypatch):
        task = features(n=60)
        monkeypatch.setattr(final_module, "matmul_flops_per_second", lambda *given: 1.0)

        def work():
            chosen = build_selector("full", {}).select(task, Budget.parse("2 epochs"), seed=0, ledger=Ledger())
            found = final_module.train(task, chosen, Budget.parse("2 epochs"), seed=0)
            return found.train_result.flops_per_second / found.utilisation

        assert spread(2, work, tmp_path) == pytest.approx([2.0, 2.0])
        assert work() == pytest.approx(1.0)

    def test_a_folder_in_use_is_refused_in_all(self, tmp_path, capfd):
        from cads.runtime.lock import RunLock

        out = tmp_path / "out"
        with RunLock(out):
            assert spread(2, lambda: self.run(tmp_path, "select", "--out", out), tmp_path / "said") == [1, 1]
        assert " ".join(capfd.readouterr().err.split()).count("is in use by process") == 1


def _scores(folder):
    from cads.study.tables import read_runs

    rows = sorted(read_runs(folder), key=lambda row: row["cell"])
    kept = ("method", "status", "score", "selection_flops", "training_flops", "evaluation_flops", "n_selected")
    return [{name: row[name] for name in kept} for row in rows]


def _moved(work, folder):
    """What `work()` returns once `folder` is out of the way."""
    folder.rename(folder.with_name("moved"))
    return work()
