"""Replicas: trained side by side as they would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.training.learners import can_stack
from cads.training.trainer import Trainer
from tests.support.fitted import assert_close, fit, fit_replicas, step_cost, streams_of


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("dropout", "accumulate"), [(0.0, 1), (0.0, 3), (0.3, 3)])
def test_batched_and_looped_replicas_agree(features, count, optimizer, dropout, accumulate):
    fits, ledgers = [], []
    for mode in ("batched", "loop"):
        recipe = {"batch_size": 16, "optimizer": optimizer, "learning_rate": 0.01, "clip_norm": 0.3}
        task = features(dropout=dropout, replicas=mode, accumulate=accumulate, **recipe)
        ledgers.append(Ledger())
        fits.append(fit_replicas(task, 30, streams_of(task, count), ledger=ledgers[-1]))
    batched, looped = fits
    assert batched.losses.shape == looped.losses.shape == (30, count)
    np.testing.assert_allclose(batched.losses, looped.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(batched.flops, looped.flops)
    for pair in zip(batched.models, looped.models, strict=True):
        assert_close(*pair, 1e-4)
    assert ledgers[0].total().flops == pytest.approx(ledgers[1].total().flops)
    assert ledgers[0].total().usages == ledgers[1].total().usages == 30 * 16 * count


def test_images_train_batched_as_they_do_one_by_one(images):
    fits = [fit_replicas(task, 30, streams_of(task, 3)) for task in (images(replicas=w) for w in ("batched", "loop"))]
    np.testing.assert_allclose(fits[0].losses, fits[1].losses, rtol=0, atol=1e-5)


def test_joint_replicas_agree(features):
    losses = []
    for mode in ("batched", "loop"):
        task = features(batch_size=12, replicas=mode, accumulate=2)
        draws = BatchStream(task.pool, streams_of(task, 3), 12, target=task.target, target_fraction=0.25, seed=5)
        trainer, models = Trainer(task, Ledger()), [task.model(k) for k in range(3)]
        flops = 20 * step_cost(task)
        losses.append(trainer.fit_replicas(models, draws, flops, seed=0, phase=SELECT, stage="s").losses)
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


def test_a_batched_replica_is_what_the_model_would_be_alone(features):
    task = features(batch_size=16)
    streams = streams_of(task, 3)
    done = fit_replicas(task, 25, streams)
    for k, stream in enumerate(streams):
        alone = fit(task, 25 * step_cost(task) * 1.001, draws=BatchStream(task.pool, [stream], 16))
        assert_close(done.models[k], alone.models[0], 1e-5)


def test_replicas_of_unequal_examples_may_take_unequal_numbers_of_steps(sentences):
    task = sentences(batch_size=2)
    lengths = task.pool.examples.lengths
    ledger = Ledger()
    streams = [ShuffledStream(np.flatnonzero(lengths == n), 0) for n in (3, 8)]
    done = fit_replicas(task, 20, streams, ledger=ledger)
    assert np.isfinite(done.losses).all()
    assert not done.diverged.any()
    assert len(done.losses) == len(done.flops)
    assert done.flops[-1] <= 20 * step_cost(task) * 1.001
    assert ledger.total().flops <= 2 * 20 * step_cost(task) * 1.001


def test_only_dense_models_without_state_are_stacked(features, images, sentences):
    assert can_stack(features(dropout=0.5).model(0))
    assert can_stack(images().model(0))
    assert not can_stack(images(model="cnn").model(0))
    assert not can_stack(sentences().model(0))
    assert not can_stack(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("scale", torch.ones(3))

    assert not can_stack(Scaled())


def test_convolutions_train_one_by_one_and_agree_when_batched(images):
    losses = []
    for mode in ("auto", "batched"):
        task = images(model="cnn", replicas=mode, batch_size=8)
        losses.append(fit_replicas(task, 6, streams_of(task, 2)).losses)
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


class Scaled(nn.Module):
    """One number that multiplies."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x


def test_a_parameter_of_one_number_is_batched_and_clipped(features):
    fits = []
    for mode in ("batched", "loop"):
        task = features(batch_size=8, replicas=mode, clip_norm=0.1)
        build = task._build
        task._build = lambda build=build: nn.Sequential(Scaled(), build())
        fits.append(fit_replicas(task, 8, streams_of(task, 3)))
    np.testing.assert_allclose(fits[0].losses, fits[1].losses, rtol=0, atol=1e-5)


def test_a_model_with_buffers_cannot_be_batched(features):
    task = features(replicas="batched")
    build = task._build
    task._build = lambda: nn.Sequential(nn.BatchNorm1d(6), build())
    with pytest.raises(ConfigError, match="buffers"):
        fit_replicas(task, 3, streams_of(task, 2))
