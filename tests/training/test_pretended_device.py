"""Training, scoring and selection on a pretended device: nothing mixes devices, and a step waits for it once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cads
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.registry import SELECTORS
from cads.training.trainer import Trainer
from tests.support.language_tasks import LORA
from tests.support.pretended_device import pretended_device


@pytest.fixture
def device():
    with pretended_device() as pretended:
        yield pretended


def trained(task, steps, seed=0):
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], task.recipe.batch_size)
    step = task.costs.per_usage(task.pool, task.recipe.batch_size) * task.recipe.batch_size
    return Trainer(task, Ledger()).fit(
        task.model(seed), draws, (steps + 0.5) * step, seed=seed, phase=TRAIN, stage="model"
    )


class TestTheStandIn:
    def test_it_refuses_what_mixes_devices(self, device):
        layer = nn.Linear(3, 4).to("cuda")
        assert {p.device.type for p in layer.parameters()} == {"cuda"}
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(2, 3))
        assert layer(torch.ones(2, 3).to("cuda")).device.type == "cuda"
        assert layer(torch.ones(2, 3, device="cuda")).cpu().device.type == "cpu"

    def test_it_refuses_views_of_it_as_arrays(self, device):
        x = torch.arange(6, device="cuda").view(2, 3)[1]
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.cpu().numpy().tolist() == [3, 4, 5]

    def test_it_counts_what_makes_the_host_wait(self, device):
        x = torch.ones(3, device="cuda")
        (x * 2).sum()
        assert not device.waits
        assert float(x.sum()) == 3.0
        assert x.cpu() is not x
        assert x[x > 0].device.type == "cuda"
        assert device.waits == {"item": 1, "copy to the host": 1, "index": 1}

    def test_gradients_and_moments_are_there(self, device):
        layer = nn.Linear(3, 4).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(torch.ones(2, 3, device="cuda")).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        assert layer.weight.grad.device.type == "cuda"
        assert {x.device.type for x in optimizer.state[layer.weight].values()} == {"cuda"}
        assert not device.waits

    def test_copies_are_where_they_were_taken_from(self, device):
        import copy

        layer = nn.BatchNorm1d(3).to("cuda")
        assert {x.device.type for x in copy.deepcopy(layer).state_dict().values()} == {"cuda"}
        layer.cpu()
        assert {x.device.type for x in layer.state_dict().values()} == {"cpu"}
