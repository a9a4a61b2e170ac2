"""A training run in segments: a stored state goes on as if the run had never stopped."""

import numpy as np
import pytest
import torch

from cads.accounting.ledger import TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer


def assert_same_weights(one, other):
    for (name, x), (_, y) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def step_flops(task):
    return task.costs.usage(task.pool.batch(np.arange(task.recipe.batch_size))) + task.costs.optimizer_step


class TestARunInParts:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("at", [1, 7, 19])
    def test_two_parts_equal_one(self, features, optimizer, at):
        task = features(dropout=0.3, batch_size=8, optimizer=optimizer, accumulate=2, learning_rate=0.02)
        build = task._build
        task._build = lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(6), build())
        step, steps = step_flops(task), 20

        def run(flops, segment, ledger):
            draws = BatchStream(
                task.pool, [ShuffledStream(np.arange(200), 3)], 8, target=task.target, target_fraction=0.25
            )
            trainer = Trainer(task, ledger)
            return trainer.fit(task.model(0), draws, flops, seed=1, phase=TRAIN, stage="model", segment=segment)

        ledgers = Ledger(), Ledger()
        uninterrupted = run(steps * step, RunSegment(), ledgers[0])
        first = run(at * step, RunSegment(horizon=steps * step, keep=True), ledgers[1])
        assert len(first.losses) == at
        last = run(steps * step, RunSegment(start=first.state), ledgers[1])
        np.testing.assert_array_equal(last.losses, uninterrupted.losses)
        np.testing.assert_array_equal(last.flops, uninterrupted.flops)
        assert_same_weights(last.models[0], uninterrupted.models[0])
        assert ledgers[0].to_json(seconds=False) == ledgers[1].to_json(seconds=False)
        assert last.flops_per_second * last.seconds == pytest.approx((steps - at) * step)

    def test_what_was_spent_before_counts_against_the_ledger_once(self, features):
        task = features(batch_size=8)
        ledger = Ledger(limit=20 * step_flops(task))
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 3)], 8)

        def run(flops, segment):
            fit = Trainer(task, ledger).fit(
                task.model(0), draws, flops, seed=1, phase=TRAIN, stage="m", segment=segment
            )
            return len(fit.losses), fit.state

        _, state = run(8 * step_flops(task), RunSegment(keep=True))
        assert run(1e18, RunSegment(start=state))[0] == 20
        assert ledger.total(TRAIN).flops == ledger.limit

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_the_losses_of_examples_are_theirs(self, sentences, accumulate):
        """With a model that does not move they are those of the model it began with, and of no target example."""
        task = sentences(batch_size=8, accumulate=accumulate, learning_rate=1e-30, weight_decay=0.0)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(150), 3)], 8, target=task.target, target_fraction=0.25)
        trainer, model = Trainer(task, Ledger()), task.model(0)
        flops = 12 * 8 * task.costs.per_usage(task.pool, 8)
        fit = trainer.fit(model, draws, flops, seed=1, phase=TRAIN, stage="m", segment=RunSegment(keep=True))
        seen = np.unique(np.concatenate([draws.streams[0].take(6 * s, 6) for s in range(len(fit.losses))]))
        assert 0 < len(seen) < 150
        expected = np.full(150, np.nan)
        for i in seen:
            with torch.no_grad():
                expected[i] = task.losses(task.model(0), task.pool.batch(np.array([i]))).item()
        np.testing.assert_allclose(fit.example_losses, expected, rtol=1e-5)

    def test_the_latest_loss_is_kept(self, features):
        task = features(batch_size=200, learning_rate=0.1)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(200), 3)], 200)
        latest = []
        for steps in (1, 2):
            model = task.model(0)
            flops = (steps + 0.5) * step_flops(task)
            fit = Trainer(task, Ledger()).fit(
                model, draws, flops, seed=1, phase=TRAIN, stage="m", segment=RunSegment(horizon=1e9, keep=True)
            )
            latest.append(fit.example_losses)
        assert latest[1].mean() == pytest.approx(fit.losses[1, 0], rel=1e-5)
        assert latest[0].mean() == pytest.approx(fit.losses[0, 0], rel=1e-5)
