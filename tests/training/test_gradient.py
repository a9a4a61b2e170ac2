"""A step waits for its device once, and its losses are the sums that they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cads.accounting.ledger import TRAIN, Ledger
from cads.runtime.processes import active_group
from cads.training.gradient import accumulate, read_together
from cads.training.learners import SingleLearner, StackedReplicas
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from tests.support.fitted import fit_replicas, step_cost, streams_of, whole_pool

TRANSFERS = ("cpu", "item", "tolist")
"""Methods of tensors that wait for a device."""


@pytest.fixture
def transfers(monkeypatch):
    """Counts the transfers of tensors that have come through a model: they are float."""
    counted = []
    for name in TRANSFERS:
        plain = getattr(torch.Tensor, name)

        def spy(x, *args, _plain=plain, _name=name, **options):
            if x.is_floating_point():
                counted.append(_name)
            return _plain(x, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return counted


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_waits_for_its_device_once(features, transfers, accumulate, clip_norm, keep):
    task = features(batch_size=8, accumulate=accumulate, clip_norm=clip_norm)
    counts = []
    for steps in (6, 12):
        flops, model = (steps + 0.5) * step_cost(task), task.model(0)
        del transfers[:]
        fit = Trainer(task, Ledger()).fit(
            model, whole_pool(task), flops, seed=0, phase=TRAIN, stage="s", segment=RunSegment(keep=keep)
        )
        assert len(fit.losses) == steps
        assert transfers.count("item") == transfers.count("tolist") <= 1
        counts.append(transfers.count("cpu"))
    # What is copied once, such as the state that is kept at the end, is in both.
    assert counts[1] - counts[0] <= 6
    if not keep:
        assert counts[1] <= 12


def test_batched_replicas_wait_once_too(features, transfers):
    task = features(batch_size=8, replicas="batched", accumulate=2)
    streams = streams_of(task, 3)
    del transfers[:]
    steps = len(fit_replicas(task, 10, streams).losses)
    # At the end the weights are stored, four tensors.
    assert transfers.count("cpu") <= steps + 4
    assert "item" not in transfers


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("replicas", [1, 2])
def test_losses_are_summed_in_double_precision(features, pieces, replicas):
    task = features(batch_size=12)
    models = [task.model(k) for k in range(replicas)]
    learner = SingleLearner(task, models[0]) if replicas == 1 else StackedReplicas(task, models)
    batch = task.pool.batch(np.arange(12 * replicas))
    parts = batch.split(pieces, replicas)
    norms = torch.arange(replicas, dtype=torch.float32)
    ((actual, norm),) = read_together([(accumulate(Accelerator(), learner, parts, replicas, active_group(), 7), norms)])
    expected, losses_seen = np.zeros(replicas), []
    for part in parts:
        with torch.no_grad():
            losses = learner(part)
        expected += (losses.sum(dim=1) / 12).double().numpy()
        losses_seen += losses[0].double().tolist()
    assert actual.loss.tolist() == expected.tolist()
    assert actual.example_losses.tolist() == losses_seen[:7]
    assert actual.positions.tolist() == list(range(7))
    assert norm.tolist() == norms.tolist()
    assert actual.loss.dtype == norm.dtype == np.float64


@pytest.mark.parametrize("n_pieces", [1, 3])
def test_weighed_examples_give_the_gradient_of_the_weighted_mean(features, n_pieces):
    """sum_i w_i l_i / sum_i w_i with w_i = sigmoid(log_odds_i - l_i) held fixed, by autograd."""
    task = features(batch_size=8)
    log_odds = torch.tensor([np.inf, 2.0, 0.0, -1.0, 5.0, np.inf, 1.0, 0.5])
    batch = replace(task.pool.batch(np.arange(8)), log_odds=log_odds)
    model, reference = task.model(0), task.model(0)
    losses = task.losses(reference, batch)
    weights = torch.sigmoid(log_odds - losses.detach())
    assert weights[0] == weights[5] == 1
    ((weights * losses).sum() / weights.sum()).backward()
    accelerator, pieces = Accelerator(), batch.split(n_pieces)
    step_losses = accumulate(accelerator, SingleLearner(task, model), pieces, 1, active_group(), 8)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    ((actual, _),) = read_together([(step_losses, torch.zeros(1))])
    np.testing.assert_allclose(actual.example_losses, losses.detach().numpy(), rtol=1e-5)
