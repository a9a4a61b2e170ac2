"""Runs that are killed and gone on with, and the fits by which they are told from one that was not."""

from __future__ import annotations

import os
import signal

import numpy as np
import torch

from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.runtime import journal as journal_module
from cads.runtime.checkpoint import CheckpointConfig
from cads.runtime.journal import Journal
from cads.training.trainer import Trainer

EVERY_STEP = CheckpointConfig(every_seconds=None, every_steps=1)
IDENTITY = {"seed": 0}


def killed(work, steps: int) -> bool:
    """Do `work` in a child process that is killed (SIGKILL) after `steps` steps; returns whether it ended before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            remaining = iter(range(steps))
            step = journal_module._Underway.step

            def mortal(self, state):
                step(self, state)
                if next(remaining, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            journal_module._Underway.step = mortal
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return not os.WIFSIGNALED(status)


def resumed(tmp_path, work, every=EVERY_STEP, kills=(0, 3, 5)):
    """What `work` returns after it was killed some times in one journal, and gone on with."""

    def journaled():
        with Journal(tmp_path / "journal", IDENTITY, every).open():
            return work()

    for steps in kills:
        killed(journaled, steps)
    return journaled()


def step_flops(task):
    return task.costs.usage(task.pool.batch(np.arange(task.recipe.batch_size))) + task.costs.optimizer_step


def trained(task, *, replicas=1, steps=12, scaler=None):
    """Fit of a fresh trainer, and its ledger."""
    ledger = Ledger()
    trainer = Trainer(task, ledger)
    if scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scaler, growth_interval=3)
    streams = [ShuffledStream(np.arange(k, len(task.pool), k + 1), k) for k in range(replicas)]
    draws = BatchStream(task.pool, streams, task.recipe.batch_size, target=task.target, target_fraction=0.25)
    models = [task.model(0) for _ in streams]
    flops = (steps + 0.5) * step_flops(task)
    if replicas == 1:
        fit = trainer.fit(models[0], draws, flops, seed=1, phase=TRAIN, stage="final model")
    else:
        fit = trainer.fit_replicas(models, draws, flops, seed=1, phase=SELECT, stage="short runs")
    return fit, ledger


def same_fit(one, other):
    (fit, ledger), (again, other_ledger) = one, other
    np.testing.assert_array_equal(fit.losses, again.losses)
    np.testing.assert_array_equal(fit.flops, again.flops)
    np.testing.assert_array_equal(fit.diverged, again.diverged)
    assert fit.skipped == again.skipped
    assert ledger.to_json(seconds=False) == other_ledger.to_json(seconds=False)
    for model, twin in zip(fit.models, again.models, strict=True):
        assert model.training == twin.training
        for (name, x), (_, y) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
            assert torch.equal(x, y), name
