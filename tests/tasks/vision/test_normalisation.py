"""Images are normalised by tensors that each device gets once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.func import grad, vmap


def plainly(task, model, batch):
    images = batch.inputs["images"].float()
    mean, std = (torch.tensor(x)[:, None, None] for x in (task.mean, task.std))
    return model((images - mean) / std)


@pytest.fixture
def made(monkeypatch):
    """The tensors that are made from numbers of the host."""
    counted, plain = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: counted.append(args) or plain(*args, **options))
    return counted


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_numbers_are_those_of_plain_normalisation(images, model):
    task = images(model=model)
    network, batch = task.model(0).eval(), task.pool.batch(np.arange(30))
    for _ in range(2):
        assert torch.equal(task.logits(network, batch), plainly(task, network, batch))


def test_each_device_gets_them_once(images, made):
    task = images()
    network, batch = task.model(0).eval(), task.pool.batch(np.arange(3))
    del made[:]
    for _ in range(4):
        task.logits(network, batch)
    assert len(made) == 2
    for _ in range(4):
        task.logits(task.model(0).to("meta"), batch.to("meta"))
    assert len(made) == 4


@pytest.mark.parametrize("first", ["inference", "vmap", "grad"])
def test_where_they_are_first_used_does_not_matter(images, first):
    task = images()
    network, batch = task.model(0).eval(), task.pool.batch(np.arange(4))
    expected = plainly(task, network, batch)
    if first == "inference":
        with torch.inference_mode():
            task.logits(network, batch)
    elif first == "vmap":
        vmap(lambda x: task.logits(network, batch.map(lambda _: x)))(batch.inputs["images"][None])
    else:
        grad(lambda w: task.logits(lambda x: (x * w).sum(), batch))(torch.ones(()))
    images_seen = batch.inputs["images"].float().requires_grad_()
    logits = task.logits(network, batch.map(lambda _: images_seen))
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert images_seen.grad is not None


def test_other_moments_are_seen(images):
    task = copy.copy(images())
    network, batch = task.model(0).eval(), task.pool.batch(np.arange(4))
    task.logits(network, batch)
    task.mean = tuple(x + 10 for x in task.mean)
    assert torch.equal(task.logits(network, batch), plainly(task, network, batch))
