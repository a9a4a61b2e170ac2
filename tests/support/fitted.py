"""Fits that the tests of the trainer make, and what they compare."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch

from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.streams import ShuffledStream, WeightedStream
from cads.data.training_batches import BatchStream
from cads.monitor import Monitor
from cads.training.trainer import Trainer


class Course(Monitor):
    """Remembers what the progress bar is told."""

    def __init__(self):
        super().__init__()
        self.points = []

    @contextmanager
    def progress(self, stage, flops, spent=0.0):
        yield lambda spent, loss, rate: self.points.append((spent / flops, loss, rate))


def whole_pool(task, seed=0):
    return BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), seed)], task.recipe.batch_size)


def step_cost(task, positions=None):
    positions = np.arange(task.recipe.batch_size) if positions is None else positions
    return task.costs.usage(task.pool.batch(positions)) + task.costs.optimizer_step


def fit(task, flops, *, draws=None, seed=0, model=None, ledger=None, monitor=None):
    trainer = Trainer(task, Ledger() if ledger is None else ledger, monitor)
    draws = whole_pool(task) if draws is None else draws
    return trainer.fit(model or task.model(seed), draws, flops, seed=seed, phase=TRAIN, stage="final model")


def fit_replicas(task, steps, streams, *, ledger=None, seed=0):
    draws = BatchStream(task.pool, streams, task.recipe.batch_size)
    models = [task.model(seed) for _ in streams]
    trainer = Trainer(task, Ledger() if ledger is None else ledger)
    flops = steps * step_cost(task) * 1.001
    return trainer.fit_replicas(models, draws, flops, seed=seed, phase=SELECT, stage="short runs")


def streams_of(task, count):
    """Different parts of the pool, and one drawn with weights."""
    n = len(task.pool)
    parts = [ShuffledStream(np.arange(k, n, k + 1), k) for k in range(count - 1)]
    return [*parts, WeightedStream(np.arange(1.0, n + 1), 7)]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(first, second, tolerance):
    for a, b in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def identical(first, second):
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def poisoned(task, value=np.inf, rows=slice(0, 20)):
    task.pool.examples.rows[rows] = value
    return task


def sloped(task):
    """The root of zero is finite, its slope is not."""
    plain = task.losses
    task.losses = lambda model, batch: plain(model, batch) + (0 * next(model.parameters()).sum()).sqrt()
    return task
