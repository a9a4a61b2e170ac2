"""What is chosen by the device: workers, TF32, and what a plan says of it."""

from __future__ import annotations

import os

import pytest
import torch

from cads.recipe import TrainConfig
from cads.training import device_settings as module
from cads.training.device_settings import device_settings, exact_products, loading_workers, prepare_device


@pytest.fixture
def ampere(monkeypatch):
    """A GPU with TF32, as PyTorch reports one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")


@pytest.fixture
def precision():
    """Products are as precise afterwards as before."""
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("asked", "kind", "cores", "workers"),
    [
        (None, "cpu", 64, 0),
        (None, "cuda", 64, 4),
        (None, "cuda", 4, 2),
        (None, "mps", 1, 0),
        (3, "cpu", 2, 3),
        (0, "cuda", 64, 0),
    ],
)
def test_workers_follow_the_device_unless_they_are_asked_for(monkeypatch, asked, kind, cores, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert loading_workers(TrainConfig(workers=asked), kind) == workers
    assert TrainConfig(workers=asked).result_fields() == TrainConfig().result_fields()


def test_a_cpu_computes_as_before(precision):
    prepare_device("cpu")
    assert torch.get_float32_matmul_precision() == precision
    assert str(device_settings(TrainConfig(), "cpu")) == "CPU: float32, fused optimizer, no workers, not compiled"


def test_a_gpu_rounds_to_tf32_but_where_products_are_compared(ampere, precision):
    prepare_device("cuda")
    assert torch.get_float32_matmul_precision() == "high"
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("precision_of", "said"), [("no", "TF32"), ("bf16", "bf16")])
def test_a_plan_names_the_gpu_and_what_it_does(ampere, monkeypatch, precision_of, said):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    text = str(device_settings(TrainConfig(precision=precision_of), "cuda"))
    assert text == f"NVIDIA H200: {said}, fused optimizer, 4 workers, pinned batches, not compiled"


def test_short_runs_start_no_workers(features, monkeypatch):
    """Starting them takes longer than such a run."""
    from tests.support.fitted import fit

    started = []
    plain = module.loading_workers

    def loading(recipe, kind):
        return plain(recipe, "cuda")

    def load_steps(stream, start, workers, *, pin):
        started.append(workers)
        step = start
        while True:
            yield stream.step(step)
            step += 1

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("cads.training.loop.loading_workers", loading)
    monkeypatch.setattr("cads.training.loop.load_steps", load_steps)
    task = features(batch_size=4, hidden=2, n=40)
    step = 4 * task.costs.per_usage(task.pool, 4)
    for steps in (5, 250):
        fit(task, (steps + 0.5) * step)
    assert started == [0, 4]
