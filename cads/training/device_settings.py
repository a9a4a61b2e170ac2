"""What training does otherwise on another device than a CPU; a plan says it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cads.data.token_batches import device_type
from cads.recipe import TrainConfig

MOST_WORKERS = 4
"""Worker processes that are chosen at most; `TrainConfig.workers` can ask for more."""
SHORT_RUN = 200
"""Steps up to which a run loads its own batches unless workers are asked for: starting them takes longer."""
TF32, FLOAT32 = "high", "highest"
"""Precisions of float32 products, in PyTorch's words."""
TF32_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with TF32 (Ampere)."""


@dataclass(frozen=True)
class DeviceSettings:
    """How a recipe trains on one kind of device.

    Attributes:
        device: its type. name: in words, such as "NVIDIA H200".
        tf32: whether float32 products round their factors to TF32, with 10 bits of mantissa for 23.
        fused: whether the optimizer updates all weights in one kernel.
        pinned: whether batches are copied from page-locked memory while the device computes.
        workers: that load batches; 0 loads in the training process.
        precision: of the recipe.
    """

    device: str
    name: str
    tf32: bool
    fused: bool
    pinned: bool
    workers: int
    precision: str

    def __str__(self) -> str:
        products = {"no": "TF32" if self.tf32 else "float32"}.get(self.precision, self.precision)
        parts = [
            products,
            f"{'' if self.fused else 'un'}fused optimizer",
            f"{self.workers} workers" if self.workers else "no workers",
            *(["pinned batches"] if self.pinned else []),
            "not compiled",
        ]
        return f"{self.name}: {', '.join(parts)}"


def device_settings(recipe: TrainConfig, kind: str | None = None) -> DeviceSettings:
    """What `recipe` does on a device of this type; None: that on which this process trains."""
    kind = device_type() if kind is None else kind
    return DeviceSettings(
        device=kind,
        name=_name(kind),
        tf32=_tf32(kind),
        fused=recipe.optimizer == "adamw" or recipe.precision != "fp16",
        pinned=kind == "cuda",
        workers=loading_workers(recipe, kind),
        precision=recipe.precision,
    )


def loading_workers(recipe: TrainConfig, kind: str) -> int:
    """Workers that load batches: as the recipe says, or by the device. A CPU computes in the time that they would."""
    if recipe.workers is not None:
        return recipe.workers
    return 0 if kind == "cpu" else min(MOST_WORKERS, (os.cpu_count() or 1) // 2)


def prepare_device(kind: str) -> None:
    """Let float32 products of this process round to TF32 where the device has it; on a CPU nothing changes."""
    if _tf32(kind):
        torch.set_float32_matmul_precision(TF32)


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products are exact to float32 while the block runs, on every device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(FLOAT32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32(kind: str) -> bool:
    return kind == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= TF32_CAPABILITY


def _name(kind: str) -> str:
    if kind == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return {"cpu": "CPU"}.get(kind, kind)
