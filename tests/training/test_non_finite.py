"""Losses that are not finite: a run stops or skips, pays for it, and goes on the same after it was killed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, NonFiniteError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.runtime.journal import Journal
from cads.runtime.journal_store import FINISHED
from cads.search.inner_runs import InnerLoop
from cads.training.loop import MAX_SKIPPED
from cads.training.trainer import Trainer
from tests.support.killed_runs import EVERY_STEP, IDENTITY, resumed, same_fit, step_flops, trained


class TestFailures:
    def poisoned(self, features, **recipe):
        task = features(batch_size=8, sources=0, **recipe)
        task.pool.examples.rows[5::40] = np.inf
        return task

    def work(self, task, steps=30):
        ledger = Ledger()
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(1, 200), 0)], 8)
        fit = Trainer(task, ledger).fit(
            task.model(0), draws, (steps + 0.5) * step_flops(task), seed=0, phase=TRAIN, stage="s"
        )
        return fit, ledger

    def test_a_failure_is_the_same_and_keeps_the_last_good_state(self, features, tmp_path):
        task = self.poisoned(features)

        def failing():
            with pytest.raises(NonFiniteError) as caught:
                self.work(task)
            return str(caught.value), caught.value.step, caught.value.ids

        plain = failing()
        folder = tmp_path / "journal"
        with Journal(folder, IDENTITY, EVERY_STEP).open():
            assert failing() == plain
        journal = Journal(folder, IDENTITY, EVERY_STEP)
        ((_, _, tensors),) = journal.store.checkpoints.read(FINISHED)
        state = tensors.load("0/")
        assert all(x.isfinite().all() for n, x in state.items() if n.startswith(("weights", "optimizer")))
        assert any(n.endswith("exp_avg_sq") for n in state) or plain[1] == 0
        with journal.open():
            assert failing() == plain

    def test_a_bad_batch_is_skipped_paid_for_and_counted(self, features, tmp_path):
        task = self.poisoned(features, non_finite="skip")
        fit, ledger = self.work(task)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(1, 200), 0)], 8)
        bad = [not np.isfinite(draws.step(t)[0].inputs["x"].numpy()).all() for t in range(30)]
        assert 0 < sum(bad) < 30
        assert fit.skipped == sum(bad)
        assert np.isnan(fit.losses[:, 0]).tolist() == bad
        assert len(fit.losses) == 30
        assert ledger.total().flops == pytest.approx(30 * step_flops(task))
        assert np.isfinite(fit.training_loss).all()
        assert all(p.isfinite().all() for p in fit.models[0].parameters())
        same_fit((fit, ledger), resumed(tmp_path, lambda: self.work(task), kills=(6, 9)))

    @pytest.mark.parametrize("normalised", [False, True])
    def test_a_skipped_batch_moves_nothing(self, features, normalised):
        """Weights and running means are those of training on the good batches alone."""
        task = features(batch_size=8, sources=0, non_finite="skip", schedule="constant", warmup=0.0)
        if normalised:
            build = task._build
            task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 0)], 8)
        plain = draws.step

        def spoilt(step):
            pieces = plain(step)
            if step != 2:
                return pieces
            return [p.map(lambda x: x * np.nan if x.is_floating_point() else x) for p in pieces]

        def without(step):
            return plain(step + (step >= 2))

        models = []
        for batches, steps in ((spoilt, 7), (without, 6)):
            draws.step = batches
            trainer = Trainer(task, Ledger())
            flops = (steps + 0.5) * step_flops(task)
            models.append(trainer.fit(task.model(0), draws, flops, seed=0, phase=TRAIN, stage="s").models[0])
        for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert torch.equal(one, other), name
            assert one.isfinite().all()

    def test_nothing_but_bad_batches_is_given_up(self, features):
        task = features(batch_size=8, sources=0, non_finite="skip")
        task.pool.examples.rows[:] = np.nan
        with pytest.raises(NonFiniteError, match=f"after {MAX_SKIPPED} batches skipped in a row") as caught:
            self.work(task)
        assert caught.value.step == MAX_SKIPPED

    def test_skipping_with_loss_scaling(self, features, tmp_path):
        task = self.poisoned(features, non_finite="skip")
        same_fit(trained(task, scaler=1024.0), resumed(tmp_path, lambda: trained(task, scaler=1024.0)))

    def test_batched_replicas_cannot_skip(self):
        with pytest.raises(ConfigError, match="replicas = 'auto' or 'loop'"):
            TrainConfig(non_finite="skip", replicas="batched")
        with pytest.raises(ConfigError, match="non_finite = 'ignore'"):
            TrainConfig(non_finite="ignore")

    @pytest.mark.parametrize("mode", ["batched", "loop"])
    def test_a_diverged_replica_is_never_averaged_in(self, features, tmp_path, mode):
        task = features(batch_size=8, replicas=mode)
        task.pool.examples.rows[:20] = np.inf
        streams = [
            ShuffledStream(np.arange(20, 200), 0),
            ShuffledStream(np.arange(40), 0),
            ShuffledStream(np.arange(30, 200), 0),
        ]

        def work():
            inner = InnerLoop(task, Ledger(), Monitor())
            return inner.run(streams, 12 * step_flops(task), seed=0, stage="short runs"), inner.ledger

        runs, ledger = work()
        assert np.isnan(runs.objective).tolist() == [False, True, False]
        assert np.isnan(runs.final_train_loss).tolist() == [False, True, False]
        again, other = resumed(tmp_path, work)
        np.testing.assert_array_equal(runs.objective, again.objective)
        np.testing.assert_array_equal(runs.final_train_loss, again.final_train_loss)
        assert ledger.to_json(seconds=False) == other.to_json(seconds=False)
