"""The stand-in for a GPU refuses what a GPU refuses, and counts what makes the host wait."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from tests.support.pretended_device import pretended_device


@pytest.fixture
def device():
    with pretended_device() as pretended:
        yield pretended


def test_it_refuses_what_mixes_devices(device):
    layer = nn.Linear(3, 4).to("cuda")
    assert {p.device.type for p in layer.parameters()} == {"cuda"}
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.ones(2, 3))
    assert layer(torch.ones(2, 3).to("cuda")).device.type == "cuda"
    assert layer(torch.ones(2, 3, device="cuda")).cpu().device.type == "cpu"


def test_it_refuses_views_of_it_as_arrays(device):
    x = torch.arange(6, device="cuda").view(2, 3)[1]
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.cpu().numpy().tolist() == [3, 4, 5]


def test_it_counts_what_makes_the_host_wait(device):
    x = torch.ones(3, device="cuda")
    (x * 2).sum()
    assert not device.waits
    assert float(x.sum()) == 3.0
    assert x.cpu() is not x
    assert x[x > 0].device.type == "cuda"
    assert device.waits == {"item": 1, "copy to the host": 1, "index": 1}


def test_gradients_and_moments_are_there(device):
    layer = nn.Linear(3, 4).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 3, device="cuda")).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert layer.weight.grad.device.type == "cuda"
    assert {x.device.type for x in optimizer.state[layer.weight].values()} == {"cuda"}
    assert not device.waits


def test_copies_are_where_they_were_taken_from(device):
    layer = nn.BatchNorm1d(3).to("cuda")
    assert {x.device.type for x in copy.deepcopy(layer).state_dict().values()} == {"cuda"}
    layer.cpu()
    assert {x.device.type for x in layer.state_dict().values()} == {"cpu"}


def test_what_is_alive_is_counted(device):
    gc.collect()
    before = device.allocated
    x = torch.zeros(1000, device="cuda")
    y = x.view(10, 100)
    assert device.allocated == before + 4000
    del x
    assert device.allocated == before + 4000
    del y
    assert device.allocated == before
