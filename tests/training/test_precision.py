"""Weights and inputs that a precision or a device cannot compute with are refused, with the remedy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.training.precision import autocast, check_types
from cads.training.trainer import Trainer
from tests.support.language_tasks import LORA

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def model(dtype, *, frozen=None):
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    if frozen is not None:
        network[0].to(frozen).requires_grad_(False)
    return network


def refused(model, precision, device, inputs=()):
    try:
        check_types(model, dict(inputs), precision=precision, device=device, name="tiny")
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trained_float16_weights_are_refused(precision, device):
    said = refused(model(torch.float16), precision, device)
    assert said is not None
    assert f"precision = {precision!r}" in said
    assert "0.weight" in said
    assert "dtype: float32" in said
    assert refused(model(torch.float32), precision, device) is None
    assert refused(model(torch.bfloat16), precision, device) is None
    # A frozen base has no gradient that could become zero.
    assert refused(model(torch.float32, frozen=torch.float16), precision, device) is None


def test_float64_is_refused_on_mps_alone():
    buffered = model(torch.float32)
    buffered.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    for network, inputs, name in (
        (model(torch.float64), {}, "0.weight"),
        (model(torch.float32, frozen=torch.float64), {}, "0.weight"),
        (buffered, {}, "scale"),
        (model(torch.float32), {"x": torch.ones(1, 3, dtype=torch.float64)}, "x"),
    ):
        said = refused(network, "no", MPS, inputs)
        assert said is not None
        assert name in said
        assert "float32" in said
        assert "ACCELERATE_USE_CPU" in said
        for device in (CPU, CUDA):
            assert refused(network, "no", device, inputs) is None
    assert refused(model(torch.float32), "no", MPS, {"x": torch.ones(1, 3)}) is None


def test_it_is_refused_before_a_flop_is_spent(features, monkeypatch):
    task, ledger = features(batch_size=8), Ledger()
    trainer = Trainer(task, ledger)
    trainer.accelerator = SimpleNamespace(device=MPS, scaler=None)
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(50), 0)], 8)
    with pytest.raises(ConfigError, match="float64"):
        trainer.fit(task.model(0).double(), draws, 1e6, seed=0, phase=SELECT, stage="s")
    monkeypatch.setattr(task.pool.examples, "rows", task.pool.examples.rows.astype(np.float64))
    with pytest.raises(ConfigError, match="such as x, are float64"):
        trainer.fit(task.model(0), draws, 1e6, seed=0, phase=SELECT, stage="s")
    assert not ledger.entries


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_language_model_in_float16_is_refused_when_its_task_is_made(build, precision):
    recipe = TrainConfig(batch_size=8, precision=precision)
    with pytest.raises(ConfigError, match=r"dtype = 'float16'.*dtype: float32"):
        build(recipe=recipe, dtype="float16")
    adapted = build(recipe=recipe, dtype="float16", peft=LORA)
    assert {p.dtype for p in adapted.model(0).parameters() if p.requires_grad} == {torch.float32}


def test_autocast_is_that_of_the_recipe():
    a = torch.ones(2, 2)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, "cpu"):
            assert (a @ a).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast("no", "cpu"):
        assert (a @ a).dtype == torch.bfloat16
