"""Several processes select and train together, and end with what one process would have: gloo on CPUs."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import NonFiniteError
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.runtime.journal import Journal
from cads.runtime.processes import world_group
from cads.search.inner_runs import InnerLoop
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from tests.support.forked_processes import (
    PATIENCE,
    after_steps,
    before_steps,
    chosen,
    ended,
    entries,
    killed,
    mortal,
    same,
    spread,
    started,
    weights,
)
from tests.support.killed_runs import EVERY_STEP

SELECTORS = {
    "full": {},
    "loss": {"fraction": 0.3},
    "less": {"warmup_share": 0.2, "checkpoints": 1, "fraction": 0.3},
    "search": {},
}


@pytest.mark.parametrize(("size", "methods"), [(2, list(SELECTORS)), (4, ["loss", "search"])])
@pytest.mark.slow
def test_selectors_choose_what_one_process_chooses(features, tmp_path, size, methods):
    """Selected ids are the same, probabilities to `TOLERANCE`, and ledgers to the last FLOP."""
    task, budget = features(batch_size=6, n=80, sources=3, learning_rate=0.01), Budget.parse("5 epochs")

    def select(method, **options):
        selector = build_selector(method, options)
        return chosen(selector.select(task, budget, seed=0, ledger=Ledger(), monitor=Monitor()))

    def work():
        return {method: select(method, **SELECTORS[method]) for method in methods}

    same(spread(size, work, tmp_path), work())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_cads_rides_on_divided_training(features, tmp_path, size):
    """The losses by which it selects are those of the training steps, wherever they were taken."""
    task, budget = features(batch_size=6, n=80, learning_rate=0.01), Budget.parse("30 epochs")

    def work():
        selector = build_selector("cads")
        selection = selector.select(task, budget, seed=0, ledger=Ledger(), monitor=Monitor())
        assert selection.trained is not None
        return chosen(selection)

    same(spread(size, work, tmp_path), work())


class TestTraining:
    @pytest.mark.parametrize(("size", "recipe"), [(2, {"batch_size": 5, "accumulate": 2}), (4, {"batch_size": 3})])
    def test_a_batch_is_divided_whatever_its_size(self, images, sentences, tmp_path, size, recipe):
        """Uneven shares, shares without an example, pieces of target and pool, losses of examples."""
        tasks = [images(model="cnn", **recipe), sentences(**recipe)]

        def train(task):
            ledger = Ledger()
            target = {"target": task.target, "target_fraction": 0.4, "seed": 3}
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(50), 0)], task.recipe.batch_size, **target)
            usage = task.costs.per_usage(task.pool, task.recipe.batch_size)
            fit = Trainer(task, ledger).fit(
                task.model(0), draws, 60 * usage, seed=1, phase=TRAIN, stage="x", segment=RunSegment(keep=True)
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
            draws = BatchStream(task.pool, [ShuffledStream(np.zeros(1, dtype=int), 0)], 8)
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
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(50), 0)], 8)
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
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(50), 0)], 8)
            fit = Trainer(task, Ledger()).fit(task.model(0), draws, 1e5, seed=1, phase=TRAIN, stage="x")
            return fit.models[0].unused.tolist()

        assert spread(2, work, tmp_path) == [[1.0, 1.0]] * 2

    @pytest.mark.parametrize("policy", ["stop", "skip"])
    def test_a_loss_that_is_not_finite_in_one_process_is_so_in_all(self, features, tmp_path, policy):
        task = features(batch_size=4, non_finite=policy)
        task.pool.examples.rows[7] = np.nan

        def work():
            draws = BatchStream(task.pool, [ShuffledStream(np.arange(12), 0)], 4)
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
            inner = InnerLoop(task, ledger, Monitor())
            streams = [ShuffledStream(np.arange(k, 100, count), k) for k in range(count)]
            runs = inner.run(streams, 40 * usage, seed=0, stage="short runs", keep=count)
            models = [weights(m) for m in runs.models]
            found = [runs.objective.tolist(), runs.losses.tolist(), runs.flops.tolist(), runs.final_train_loss.tolist()]
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
            streams = [ShuffledStream(np.arange(k, 100 - 20 * k), k) for k in range(3)]
            runs = InnerLoop(task, ledger, Monitor()).run(streams, 1e4, seed=0, stage="short runs", keep=3)
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
            streams = [ShuffledStream(np.arange(20, 60), 0), ShuffledStream(np.arange(12), 1)]
            runs = InnerLoop(task, ledger, Monitor()).run(streams, 160 * usage, seed=0, stage="short runs")
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

    @pytest.mark.slow
    def test_the_first_shows_what_others_trained_and_time_is_counted_once(self, features, tmp_path):
        task = features(batch_size=4, replicas="loop")

        def work():
            ledger, shown, began = Ledger(), [], time.perf_counter()
            monitor = Monitor()
            monitor.scalar = lambda tag, value, step: shown.append([tag, value])
            streams = [ShuffledStream(np.arange(k, 100, 3), k) for k in range(3)]
            InnerLoop(task, ledger, monitor).run(streams, 2e5, seed=0, stage="short runs")
            return [shown, ledger.total().seconds <= time.perf_counter() - began]

        (first, second), one = spread(2, work, tmp_path), json.loads(json.dumps(work()))
        assert sorted(first[0]) == sorted(one[0])
        assert [first[1], second[1]] == [True, True]

    def test_one_that_diverges_is_marked(self, features, tmp_path):
        for way in ("batched", "loop"):
            task = features(batch_size=4, replicas=way, learning_rate=1e36, optimizer="sgd", clip_norm=None)

            def work(task=task):
                streams = [ShuffledStream(np.arange(20), k) for k in range(3)]
                runs = InnerLoop(task, Ledger(), Monitor()).run(streams, 1e5, seed=0, stage="short runs")
                return np.isnan(runs.objective).tolist()

            assert spread(2, work, tmp_path) == [work()] * 2


class TestTheEnd:
    """Nobody waits for ever."""

    def task(self, features):
        return features(batch_size=4)

    def train(self, task, steps=10_000, after=None):
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(50), 0)], 4)
        flops = steps * 4 * task.costs.per_usage(task.pool, 4)
        if after is not None:
            after_steps(after)
        return Trainer(task, Ledger()).fit(task.model(0), draws, flops, seed=1, phase=TRAIN, stage="x")

    def test_one_that_raises_ends_the_others(self, features, tmp_path):
        task = self.task(features)

        def odd(step):
            if step == 5 and not world_group().first:
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
            if step == 5 and not world_group().first:
                os.kill(os.getpid(), signal.SIGKILL)

        ended(started(2, lambda: self.train(task, after=killed), tmp_path), PATIENCE / 2)
        assert json.loads((tmp_path / "0.json").read_text())["error"][0] == "ProcessError"

    @pytest.mark.slow
    def test_one_that_hangs_is_waited_for_until_the_time_out(self, features, tmp_path):
        task = self.task(features)

        def sleeps(step):
            if step == 5 and not world_group().first:
                time.sleep(8)

        pids = started(2, lambda: self.train(task, after=sleeps), tmp_path, seconds=2)
        ended(pids, 30)
        kind, message = json.loads((tmp_path / "0.json").read_text())["error"]
        assert kind == "ProcessError"
        assert "for 2 s (CADS_PROCESS_TIMEOUT)" in message

    def replicas(self, features):
        """Two replicas, one a process."""
        task = features(batch_size=4, replicas="loop")
        streams = [ShuffledStream(np.arange(50), k) for k in range(2)]
        return InnerLoop(task, Ledger(), Monitor()).run(streams, 1e9, seed=0, stage="short runs")

    def test_a_checkpoint_that_the_first_cannot_write_is_an_error_of_all(self, features, tmp_path):
        """Also where all are about to stop."""

        def work():
            with Journal(tmp_path / "journal", {}).open() as journal:

                def odd(kind, state):
                    raise ZeroDivisionError("odd")

                def stop(kind):
                    if not world_group().first:
                        journal.interrupts.pending = signal.SIGTERM

                journal.store.checkpoints.write = odd
                before_steps(stop)
                return self.replicas(features)

        first, second = spread(2, work, tmp_path, seconds=20)
        assert first == ("ZeroDivisionError", "odd")
        assert second == ("RemoteError", "process 0: ZeroDivisionError: odd")
