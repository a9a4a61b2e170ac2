"""Inner runs: no more models in memory than are used, measured in the precision in which they train."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.streams import ShuffledStream
from cads.data.token_batches import scoring_batches
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.runtime.journal import Journal
from cads.search.inner_runs import InnerLoop
from tests.support.forked_processes import entries, killed, mortal, spread
from tests.support.killed_runs import EVERY_STEP


class Watched:
    """A task that knows which of its models are in memory; `most` of them at once, as each one is made."""

    def __init__(self, task):
        # Costs are counted before, on a model of their own.
        assert task.costs.per_usage(task.pool, task.recipe.batch_size) > 0
        self.task, self.made, self.most = copy.copy(task), [], 0
        self._model = task.model
        self.task.model = self.model

    def model(self, seed):
        made = self._model(seed)
        self.made.append(weakref.ref(made))
        self.most = max(self.most, self.alive)
        return made

    @property
    def alive(self):
        return sum(model() is not None for model in self.made)


@contextmanager
def no_collections():
    """Nothing is freed but what nothing refers to."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def streams_of(task, count):
    return [ShuffledStream(np.arange(k, len(task.pool), count), k) for k in range(count)]


class TestModelsInMemory:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize(("keep", "left"), [(None, 0), (0, 0), (1, 1), (2, 2)])
    def test_trials_that_train_one_by_one_are_in_memory_one_by_one(self, features, precision, keep, left):
        watched = Watched(features(batch_size=4, replicas="loop", precision=precision))
        inner = InnerLoop(watched.task, Ledger(), Monitor())
        flops = 40 * watched.task.costs.per_usage(watched.task.pool, 4)
        with no_collections():
            runs = inner.run(streams_of(watched.task, 5), flops, seed=0, stage="short runs", keep=keep)
            assert len(watched.made) == 5
            assert watched.most == max(1, min(5, left + 1))
            assert watched.alive == len(runs.models) == left
        assert np.isfinite(runs.objective).all()

    def test_batched_trials_are_gone_once_they_are_measured(self, features):
        watched = Watched(features(batch_size=4, replicas="batched"))
        flops = 40 * watched.task.costs.per_usage(watched.task.pool, 4)
        with no_collections():
            runs = InnerLoop(watched.task, Ledger(), Monitor()).run(
                streams_of(watched.task, 5), flops, seed=0, stage="short runs"
            )
            assert (watched.most, watched.alive, runs.models) == (5, 0, [])

    def test_a_single_run_is_made_for_its_model(self, features):
        watched = Watched(features(batch_size=4))
        flops = 40 * watched.task.costs.per_usage(watched.task.pool, 4)
        runs = InnerLoop(watched.task, Ledger(), Monitor()).run(streams_of(watched.task, 1), flops, seed=0, stage="u")
        assert [model() for model in watched.made] == runs.models

    def test_trials_that_diverge_leave_no_model(self, features):
        task = features(batch_size=4, replicas="loop", learning_rate=1e36, optimizer="sgd", clip_norm=None)
        watched = Watched(task)
        with no_collections():
            runs = InnerLoop(watched.task, Ledger(), Monitor()).run(
                streams_of(watched.task, 4), 1e5, seed=0, stage="short runs"
            )
            assert np.isnan(runs.objective).all()
            assert watched.most == 1
            assert not watched.alive

    @pytest.mark.parametrize("pretrained", [False, True])
    @pytest.mark.parametrize("method", ["search", "best-of", "best-source"])
    def test_a_search_holds_no_model_that_it_no_longer_uses(self, features, method, pretrained):
        task = copy.copy(features(batch_size=8, replicas="loop"))
        task.pretrained = pretrained
        watched = Watched(task)
        with no_collections():
            build_selector(method).select(watched.task, Budget(8, "epochs"), seed=0, ledger=Ledger())
            assert len(watched.made) > 2
            # The target model, whose losses are still read, beside the one that is trained.
            assert watched.most <= 2


def dropping(streams):
    return [stream.take(0, 5).tolist() for stream in streams]


def test_waves_equal_all_at_once(features):
    """One by one, each trial is the run that it is alone: same losses, same objective, to the bit."""
    task = features(batch_size=4, replicas="loop", dropout=0.3)
    flops, streams = 40 * task.costs.per_usage(task.pool, 4), streams_of(task, 3)
    ledger = Ledger()
    runs = InnerLoop(task, ledger, Monitor()).run(streams, flops, seed=0, stage="short runs")
    alone = [InnerLoop(task, Ledger(), Monitor()).run([s], flops, seed=0, stage="short runs") for s in streams]
    for k, one in enumerate(alone):
        assert runs.objective[k] == one.objective[0]
        assert (runs.losses[:, k] == one.losses[:, 0]).all()
        assert runs.final_train_loss[k] == one.final_train_loss[0]
    assert [stage for _, stage in ledger.entries] == ["short runs", "short runs, measuring"]
    assert dropping(streams) == dropping(streams_of(task, 3))


@pytest.mark.parametrize("diverges", [False, True])
def test_trials_one_by_one_go_on_with_other_numbers_of_processes(features, tmp_path, diverges):
    """Killed in one process, in two and in one, in training and after measuring, and ended in either."""
    task, said = features(batch_size=4, replicas="loop", dropout=0.3), tmp_path / "said"
    usage = task.costs.per_usage(task.pool, 4)
    rows = task.pool.examples.rows
    kept, rows.flags.writeable = rows[1].copy(), True

    def run():
        ledger = Ledger()
        runs = InnerLoop(task, ledger, Monitor()).run(streams_of(task, 5), 40 * usage, seed=0, stage="short runs")
        return [np.nan_to_num(runs.objective, nan=-1).tolist(), np.nan_to_num(runs.losses).tolist(), entries(ledger)]

    def work(folder, steps=None):
        if steps is not None:
            mortal(steps)
        with Journal(folder, {}, EVERY_STEP).open():
            return run()

    try:
        if diverges:
            rows[1] = np.nan
        whole = json.loads(json.dumps(run()))
        assert (-1 in whole[0]) == diverges
        for last in (1, 2):
            folder = tmp_path / f"journal-{last}"
            for size, steps in ((1, 13), (2, 9), (1, 4)):
                killed(size, lambda folder=folder, steps=steps: work(folder, steps), said)
            assert list(folder.glob("*"))
            assert spread(last, lambda folder=folder: work(folder), said) == [whole] * last
    finally:
        rows[1] = kept


class TestPrecision:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize("kind", ["features", "images", "sentences"])
    def test_scores_are_computed_as_in_training(self, request, kind, precision):
        task = request.getfixturevalue(kind)(precision=precision)
        inner, model = InnerLoop(task, Ledger(), Monitor()), task.model(0).eval()
        where = np.arange(len(task.pool))
        found = inner.losses(model, where, stage="R")
        expected = np.empty(len(where))
        for rows in scoring_batches(task.pool):
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                expected[rows] = task.losses(model, task.pool.batch(rows)).double().numpy()
        np.testing.assert_array_equal(found, expected)
        exact = InnerLoop(request.getfixturevalue(kind)(), Ledger(), Monitor()).losses(model, where, stage="R")
        assert (found == exact).all() == (precision == "no")
        assert found == pytest.approx(exact, rel=0.1, abs=0.05)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_objectives_are_measured_as_in_training(self, images, precision):
        task, plain = images(precision=precision), images()
        model = task.model(0)
        found = InnerLoop(task, Ledger(), Monitor(), "loss").evaluate(model, "measuring")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            expected = plain.objective(model, "loss")
        assert found.value == expected.value
        assert (found.value == plain.objective(model, "loss").value) == (precision == "no")
