"""Several processes divide the work, and end with what one process would have: gloo on CPUs, forked from this one."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from cads import journal as journal_module
from cads import outcome, processes
from cads.budget import SELECT, TRAIN, Budget, Ledger
from cads.checkpoint import CheckpointConfig, State
from cads.cli import main
from cads.draws import Draws, Epochs
from cads.errors import CadsError, ConfigError, DataError, NonFiniteError
from cads.inner import Inner
from cads.journal import Journal, in_shards
from cads.monitor import Monitor
from cads.processes import RemoteError, everyone
from cads.registry import build_selector
from cads.rounds import Progress, divide
from cads.score_files import read_groups, stream_scores
from cads.selection import Selection
from cads.trainer import Leg, Trainer

PATIENCE = 300
"""Seconds after which a test says that processes hang."""
TOLERANCE = 1e-4
"""How far probabilities and weights may be from those of one process: sums of gradients are rounded otherwise."""
EVERY_STEP = CheckpointConfig(every_seconds=None, every_steps=1)
README = Path(__file__).resolve().parents[1] / "README.md"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _join(rank, size, port, seconds):
    """Make this forked process one of several."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in said.items()})
    os.environ[processes.TIMEOUT_VARIABLE] = str(seconds)
    AcceleratorState._reset_state(reset_partial_state=True)
    everyone.cache_clear()
    assert everyone().size == size


def started(size, work, folder, seconds=PATIENCE):
    """Begin `work()` in each of `size` processes; returns their process ids."""
    port, pids = _free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        said = {}
        try:
            _join(rank, size, port, seconds)
            said = {"result": work()}
        except BaseException as error:
            said = {"error": [type(error).__name__, str(error)]}
        finally:
            _leave(folder / f"{rank}.json", said)
    return pids


def _leave(file, said):
    """End this process; it must never come back to the tests."""
    try:
        file.write_text(json.dumps(said))
    finally:
        os._exit(0)


def ended(pids, seconds=PATIENCE):
    """Wait until all have ended; those that hang are killed, and the test fails."""
    until = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < until:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left, f"{len(left)} processes hang"


def spread(size, work, folder, seconds=PATIENCE):
    """What `work()` returns (JSON) in each of `size` processes, or the kind and message of its error."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    ended(started(size, work, folder, seconds))
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return [s.get("result", tuple(s.get("error", ()))) for s in said]


def entries(ledger):
    return ledger.to_json(seconds=False)


def chosen(selection):
    return {
        "selected": selection.selected.tolist(),
        "probability": selection.probability.tolist(),
        "score": selection.score.tolist(),
        "ledger": entries(selection.ledger),
    }


def weights(model):
    return np.concatenate([x.detach().numpy().ravel() for x in model.state_dict().values()]).tolist()


def same(found, one, tolerance=TOLERANCE):
    """All processes have found the same bits; those are the ones of a single process within the tolerance."""
    assert all(x == found[0] for x in found)
    _close(found[0], one, tolerance)


def _close(x, y, tolerance):
    if isinstance(x, dict):
        assert set(x) == set(y)
        for name in x:
            _close(x[name], y[name], 0 if name == "ledger" else tolerance)
    elif isinstance(x, list) and x and isinstance(x[0], float):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    else:
        assert x == y


SELECTORS = {
    "full": {},
    "loss": {"fraction": 0.3},
    "less": {"warmup_share": 0.2, "checkpoints": 1, "fraction": 0.3},
    "cads-s": {},
    "cads-e": {},
}


@pytest.mark.parametrize(("size", "methods"), [(2, list(SELECTORS)), (4, ["loss", "cads-s"])])
def test_selectors_choose_what_one_process_chooses(features, tmp_path, size, methods):
    """Selected ids are the same, probabilities to `TOLERANCE`, and ledgers to the last FLOP."""
    task, budget = features(batch_size=6, n=80, sources=3, learning_rate=0.01), Budget.parse("5 epochs")

    def select(method, **options):
        selector = build_selector(method, options)
        return chosen(selector.select(task, budget, seed=0, ledger=Ledger(), monitor=Monitor()))

    def work():
        return {method: select(method, **SELECTORS[method]) for method in methods}

    same(spread(size, work, tmp_path), work())


def test_one_run_rides_on_divided_training(features, tmp_path):
    """The losses by which it selects are those of the training steps, wherever they were taken."""
    task, budget = features(batch_size=6, n=80, learning_rate=0.01), Budget.parse("30 epochs")

    def work():
        selector = build_selector("cads-e", {"one_run": True})
        selection = selector.select(task, budget, seed=0, ledger=Ledger(), monitor=Monitor())
        assert selection.start is not None
        return chosen(selection)

    same(spread(2, work, tmp_path), work())


class TestTraining:
    @pytest.mark.parametrize(("size", "recipe"), [(2, {"batch_size": 5, "accumulate": 2}), (4, {"batch_size": 3})])
    def test_a_batch_is_divided_whatever_its_size(self, images, sentences, tmp_path, size, recipe):
        """Uneven shares, shares without an example, pieces of target and pool, losses of examples."""
        tasks = [images(model="cnn", **recipe), sentences(**recipe)]

        def train(task):
            ledger = Ledger()
            target = {"target": task.target, "target_fraction": 0.4, "seed": 3}
            draws = Draws(task.pool, [Epochs(np.arange(50), 0)], task.recipe.batch_size, **target)
            usage = task.costs.per_usage(task.pool, task.recipe.batch_size)
            fit = Trainer(task, ledger).fit(
                task.model(0), draws, 60 * usage, seed=1, phase=TRAIN, stage="x", leg=Leg(keep=True)
            )
            known = np.nan_to_num(fit.example_losses, nan=-1.0).tolist()
            return {"w": weights(fit.models[0]), "l": fit.losses[:, 0].tolist(), "e": known, "ledger": entries(ledger)}

        def work():
            return [train(task) for task in tasks]

        found, one = spread(size, work, tmp_path), work()
        for i in range(len(tasks)):
            same([f[i] for f in found], one[i])

    def test_dropout_differs_between_processes_and_comes_again(self, features, tmp_path):
        task = features(dropout=0.5, batch_size=8)

        def work():
            draws = Draws(task.pool, [Epochs(np.zeros(1, dtype=int), 0)], 8)
            fit = Trainer(task, Ledger()).fit(task.model(0), draws, 1e5, seed=1, phase=TRAIN, stage="x")
            return fit.losses[:, 0].tolist()

        first, again = spread(2, work, tmp_path), spread(2, work, tmp_path)
        assert first[0] == first[1] == again[0]
        # Every example is the same: were the masks those of one process, so would be its losses.
        assert abs(first[0][0] - work()[0]) > 1e-3

    def test_what_batch_normalisation_mixes_is_not_divided(self, features, tmp_path):
        task = features(batch_size=8)
        build = task._build
        task._build = lambda: nn.Sequential(nn.BatchNorm1d(6), build())

        def work():
            draws = Draws(task.pool, [Epochs(np.arange(50), 0)], 8)
            fit = Trainer(task, Ledger()).fit(task.model(0), draws, 1e5, seed=1, phase=TRAIN, stage="x")
            return {"w": weights(fit.models[0])}

        same(spread(2, work, tmp_path), work())

    def test_parameters_without_a_gradient_stay_as_they_are(self, features, tmp_path):
        task = features(batch_size=8)
        build = task._build

        def unused():
            model = build()
            model.register_parameter("unused", nn.Parameter(torch.ones(2)))
            return model

        task._build = unused

        def work():
            draws = Draws(task.pool, [Epochs(np.arange(50), 0)], 8)
            fit = Trainer(task, Ledger()).fit(task.model(0), draws, 1e5, seed=1, phase=TRAIN, stage="x")
            return fit.models[0].unused.tolist()

        assert spread(2, work, tmp_path) == [[1.0, 1.0]] * 2

    @pytest.mark.parametrize("policy", ["stop", "skip"])
    def test_a_loss_that_is_not_finite_in_one_process_is_so_in_all(self, features, tmp_path, policy):
        task = features(batch_size=4, non_finite=policy)
        task.pool.examples.rows[7] = np.nan

        def work():
            draws = Draws(task.pool, [Epochs(np.arange(12), 0)], 4)
            ledger = Ledger()
            trainer = Trainer(task, ledger)
            try:
                fit = trainer.fit(task.model(0), draws, 5e3, seed=1, phase=TRAIN, stage="x")
            except NonFiniteError as error:
                return [str(error), error.step, error.ids, entries(ledger)]
            return [fit.skipped, weights(fit.models[0]), entries(ledger)]

        try:
            task.pool.examples.rows.flags.writeable = True
            found, one = spread(2, work, tmp_path), work()
        finally:
            task.pool.examples.rows[7] = 0.0
        assert found[0] == found[1]
        assert found[0][0] == one[0]
        assert found[0][-1] == one[-1]


class TestReplicas:
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    @pytest.mark.parametrize("way", ["batched", "loop"])
    def test_a_replica_trains_as_it_would_alone(self, features, tmp_path, count, way):
        """On one process each: bits do not change, whether there are more or fewer of them than processes."""
        task = features(dropout=0.3, batch_size=4, replicas=way)
        usage = task.costs.per_usage(task.pool, 4)

        def work():
            ledger = Ledger()
            inner = Inner(task, ledger, Monitor())
            streams = [Epochs(np.arange(k, 100, count), k) for k in range(count)]
            runs = inner.run(streams, 40 * usage, seed=0, stage="short runs")
            models = [weights(m) for m in runs.models]
            found = [runs.objective.tolist(), runs.losses.tolist(), runs.flops.tolist(), runs.reached.tolist()]
            return [*found, models, entries(ledger)]

        found, one = spread(2, work, tmp_path), work()
        assert found[0] == found[1]
        if way == "loop":
            assert found[0] == one
        else:
            # Matrix products of fewer replicas at once may be rounded otherwise.
            for mine, its in zip(found[0][:-1], one[:-1], strict=True):
                np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)
            assert found[0][-1] == one[-1]

    @pytest.mark.parametrize("way", ["batched", "loop"])
    def test_replicas_whose_examples_differ_in_cost(self, sentences, tmp_path, way):
        """One by one they take other numbers of steps; batched ones are padded together, and would not be in chunks."""
        task = sentences(batch_size=2, replicas=way)

        def work():
            ledger = Ledger()
            streams = [Epochs(np.arange(k, 100 - 20 * k), k) for k in range(3)]
            runs = Inner(task, ledger, Monitor()).run(streams, 1e4, seed=0, stage="short runs")
            return [runs.objective.tolist(), runs.losses.tolist(), [weights(m) for m in runs.models], entries(ledger)]

        assert spread(2, work, tmp_path) == [json.loads(json.dumps(work()))] * 2

    def test_one_that_failed_is_not_paid_for_again(self, features, tmp_path):
        """Its step that failed is in the checkpoint that is written while the other goes on."""
        task, journal, said = features(batch_size=4, replicas="loop"), tmp_path / "journal", tmp_path / "said"
        task.pool.examples.rows.flags.writeable = True
        task.pool.examples.rows[7] = np.nan
        usage = task.costs.per_usage(task.pool, 4)

        def run():
            ledger = Ledger()
            streams = [Epochs(np.arange(20, 60), 0), Epochs(np.arange(12), 1)]
            runs = Inner(task, ledger, Monitor()).run(streams, 160 * usage, seed=0, stage="short runs")
            return [runs.objective.tolist()[:1], entries(ledger)]

        def work(steps=None):
            if steps is not None:
                mortal(steps)
            with Journal(journal, {}, EVERY_STEP).open():
                return run()

        try:
            one = run()
            killed(2, lambda: work(steps=20), said)
            assert spread(2, work, said) == [one] * 2
        finally:
            task.pool.examples.rows[7] = 0.0

    def test_the_first_shows_what_others_trained_and_time_is_counted_once(self, features, tmp_path):
        task = features(batch_size=4, replicas="loop")

        def work():
            ledger, shown, began = Ledger(), [], time.perf_counter()
            monitor = Monitor()
            monitor.scalar = lambda tag, value, step: shown.append([tag, value])
            streams = [Epochs(np.arange(k, 100, 3), k) for k in range(3)]
            Inner(task, ledger, monitor).run(streams, 2e5, seed=0, stage="short runs")
            return [shown, ledger.total().seconds <= time.perf_counter() - began]

        (first, second), one = spread(2, work, tmp_path), json.loads(json.dumps(work()))
        assert sorted(first[0]) == sorted(one[0])
        assert [first[1], second[1]] == [True, True]

    def test_one_that_diverges_is_marked(self, features, tmp_path):
        for way in ("batched", "loop"):
            task = features(batch_size=4, replicas=way, learning_rate=1e36, optimizer="sgd", clip_norm=None)

            def work(task=task):
                streams = [Epochs(np.arange(20), k) for k in range(3)]
                runs = Inner(task, Ledger(), Monitor()).run(streams, 1e5, seed=0, stage="short runs")
                return np.isnan(runs.objective).tolist()

            assert spread(2, work, tmp_path) == [work()] * 2


class TestShards:
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 19])
    def test_they_come_in_order_and_charge_in_order(self, tmp_path, count):
        def work():
            ledger = Ledger()

            def shard(i):
                # Sums of these depend on their order.
                ledger.charge(SELECT, "scoring", 0.1 * 3**i, tokens=i)
                return np.arange(i + 1) * 1.5

            found = in_shards("scoring", ["x"], ledger, count, shard)
            return [found.tolist(), entries(ledger)]

        assert spread(2, work, tmp_path) == [work()] * 2

    def test_the_error_of_one_is_that_of_all(self, tmp_path):
        def work(error):
            def shard(i):
                if i == 3:
                    raise error
                return np.zeros(1)

            try:
                divide(Ledger(), range(5), shard)
            except CadsError as found:
                return [type(found).__name__, str(found)]

        (first, second) = spread(2, lambda: work(DataError("example 'x' is odd")), tmp_path)
        assert first == second == ["DataError", "example 'x' is odd"]

        def strange():
            return work(ZeroDivisionError("y"))

        first, second = spread(2, strange, tmp_path)
        assert first == ["RemoteError", "process 1: ZeroDivisionError: y"]
        assert second[0] == "ZeroDivisionError"
        assert issubclass(RemoteError, CadsError)


class TestExchange:
    def test_states_arrive_as_they_were_sent(self, tmp_path):
        def work():
            rank = everyone().rank
            kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
            sent = State(
                {"rank": rank, "nested": [1.5, None, {"a": float("inf")}]},
                {str(k): torch.arange(rank, rank + 6).to(k).view(2, 3) for k in kinds}
                | {"scalar": torch.tensor(rank), "empty": torch.zeros(0, 3)},
            )
            parts = everyone().gather(lambda: sent)
            first = everyone().from_first(lambda: sent)
            return [[p.digest for p in parts], first.digest, sent.digest]

        a, b = spread(2, work, tmp_path)
        assert a[0] == b[0] == [a[2], b[2]]
        assert a[1] == b[1] == a[2]

    def test_what_cannot_be_sent_is_an_error_of_all(self, tmp_path):
        first, second = spread(2, lambda: everyone().gather(self.odd), tmp_path)
        assert second[0] == "TypeError"
        assert first[0] == "RemoteError"
        assert "process 1: TypeError" in first[1]

    def odd(self):
        return State({} if everyone().first else {"odd": object()})

    def test_others_that_are_not_there_are_missed_in_a_sentence(self, tmp_path):
        alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}

        def work():
            os.environ.update({**alone, "LOCAL_RANK": "1", processes.TIMEOUT_VARIABLE: "1"})
            AcceleratorState._reset_state(reset_partial_state=True)
            everyone.cache_clear()
            try:
                everyone()
            except CadsError as error:
                (tmp_path / "said").write_text(f"{type(error).__name__}: {error}")

        ended([_alone(work)])
        said = (tmp_path / "said").read_text()
        assert said.startswith("ProcessError: this process does not find the 1 others within 1 s (RANK=1, WORLD_SIZE=2")

    def test_processes_that_are_not_given_the_same_are_refused(self, tmp_path):
        found = spread(2, lambda: everyone().check_alike("the data", everyone().rank), tmp_path)
        assert [f[0] for f in found] == ["ProcessError"] * 2
        assert "the data differs between processes" in found[0][1]

    @pytest.mark.parametrize("text", ["soon", "-1", "nan", "0"])
    def test_a_time_out_that_is_none_is_refused(self, monkeypatch, text):
        monkeypatch.setenv(processes.TIMEOUT_VARIABLE, text)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="must be a positive number of seconds"):
            everyone.__wrapped__()

    def test_divided_weights_are_refused(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ConfigError, match="FSDP"):
            everyone.__wrapped__()


class TestTheEnd:
    """Nobody waits for ever."""

    def task(self, features):
        return features(batch_size=4)

    def train(self, task, steps=10_000, after=None):
        draws = Draws(task.pool, [Epochs(np.arange(50), 0)], 4)
        flops = steps * 4 * task.costs.per_usage(task.pool, 4)
        if after is not None:
            after_steps(after)
        return Trainer(task, Ledger()).fit(task.model(0), draws, flops, seed=1, phase=TRAIN, stage="x")

    def test_one_that_raises_ends_the_others(self, features, tmp_path):
        task = self.task(features)

        def odd(step):
            if step == 5 and not everyone().first:
                raise MemoryError("no room")

        began = time.monotonic()
        first, second = spread(2, lambda: self.train(task, after=odd), tmp_path)
        assert time.monotonic() - began < PATIENCE / 2
        assert second == ("MemoryError", "no room")
        assert first[0] == "ProcessError"
        assert "process 0 of 2 has lost the others" in first[1]

    def test_one_that_is_killed_ends_the_others(self, features, tmp_path):
        task = self.task(features)

        def killed(step):
            if step == 5 and not everyone().first:
                os.kill(os.getpid(), signal.SIGKILL)

        ended(started(2, lambda: self.train(task, after=killed), tmp_path), PATIENCE / 2)
        assert json.loads((tmp_path / "0.json").read_text())["error"][0] == "ProcessError"

    def test_one_that_hangs_is_waited_for_until_the_time_out(self, features, tmp_path):
        task = self.task(features)

        def sleeps(step):
            if step == 5 and not everyone().first:
                time.sleep(8)

        pids = started(2, lambda: self.train(task, after=sleeps), tmp_path, seconds=2)
        ended(pids, 30)
        kind, message = json.loads((tmp_path / "0.json").read_text())["error"]
        assert kind == "ProcessError"
        assert "for 2 s (CADS_PROCESS_TIMEOUT)" in message

    def replicas(self, features):
        """Two replicas, one a process."""
        task = features(batch_size=4, replicas="loop")
        streams = [Epochs(np.arange(50), k) for k in range(2)]
        return Inner(task, Ledger(), Monitor()).run(streams, 1e9, seed=0, stage="short runs")

    def test_a_checkpoint_that_the_first_cannot_write_is_an_error_of_all(self, features, tmp_path):
        """Also where all are about to stop."""

        def work():
            with Journal(tmp_path / "journal", {}).open() as journal:

                def odd(kind, state):
                    raise ZeroDivisionError("odd")

                def stop(kind):
                    if not everyone().first:
                        journal.interrupts.pending = signal.SIGTERM

                journal.store.checkpoints.write = odd
                before_steps(stop)
                return self.replicas(features)

        first, second = spread(2, work, tmp_path, seconds=20)
        assert first == ("ZeroDivisionError", "odd")
        assert second == ("RemoteError", "process 0: ZeroDivisionError: odd")


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

    if not everyone().first:
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
                if len(taken) == at and not everyone().first:
                    os.kill(os.getpid(), number)

            before_steps(stop)
            return [self.run(tmp_path, "select", "--out", out), len(taken), taken[-1]]

        kind = "_Underway" if at == 5 else "Rounds"
        assert spread(2, work, said) == [[128 + number, at, kind]] * 2
        assert len(list(out.glob("checkpoints/select/*-underway"))) == 1
        assert not (out / ".lock").exists()
        assert self.run(tmp_path, "select", "--out", out) == 0

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
                if len(taken) == signalled and not everyone().first:
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

    def test_the_launcher_of_the_readme_starts_several_on_cpus(self, tmp_path):
        """Each divides the scores; were they alone, one would find the folder in use, or the work done."""
        (command,) = re.findall(r"^    accelerate launch (.*--out) \S+$", README.read_text(), re.MULTILINE)
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
        from cads.study import report

        made = report.Made(tmp_path / "report.html", tmp_path / "fits.json", tmp_path / "figures", ["so"])
        monkeypatch.setattr(report, "write_report", lambda *given: (tmp_path / "page").touch(exist_ok=False) or made)
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
        monkeypatch.setattr(outcome, "matmul_flops_per_second", lambda *given: 1.0)

        def work():
            chosen = build_selector("full", {}).select(task, Budget.parse("2 epochs"), seed=0, ledger=Ledger())
            found = outcome.train_on(task, chosen, Budget.parse("2 epochs"), seed=0)
            return found.fit.flops_per_second / found.utilisation

        assert spread(2, work, tmp_path) == pytest.approx([2.0, 2.0])
        assert work() == pytest.approx(1.0)

    def test_a_folder_in_use_is_refused_in_all(self, tmp_path, capfd):
        from cads.lock import RunLock

        out = tmp_path / "out"
        with RunLock(out):
            assert spread(2, lambda: self.run(tmp_path, "select", "--out", out), tmp_path / "said") == [1, 1]
        assert capfd.readouterr().err.count("is in use by process") == 1


def _scores(folder):
    from cads.study.results import read_runs

    rows = sorted(read_runs(folder), key=lambda row: row["cell"])
    kept = ("method", "status", "score", "selection_flops", "training_flops", "evaluation_flops", "n_selected")
    return [{name: row[name] for name in kept} for row in rows]


def _moved(work, folder):
    """What `work()` returns once `folder` is out of the way."""
    folder.rename(folder.with_name("moved"))
    return work()


def before_steps(do):
    """Call `do` with the kind of progress before each step of an operation, in this process."""
    for kind in (journal_module._Underway, journal_module.Rounds):

        def stepped(self, state, kind=kind, step=kind.step):
            do(kind)
            step(self, state)

        kind.step = stepped


def after_steps(do):
    """Call `do` with the number of each step of a run that no journal keeps, in this process."""
    numbers = itertools.count()
    Progress.step = lambda self, state: do(next(numbers))


def mortal(steps):
    """End this process by -9 before its next step after so many."""
    left = iter(range(steps))

    def die(kind):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    before_steps(die)


def killed(size, work, folder):
    """Run `work` in `size` processes that kill themselves."""
    folder.mkdir(exist_ok=True)
    ended(started(size, work, folder) if size > 1 else [_alone(work)])


def _alone(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid
