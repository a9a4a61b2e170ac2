"""The precision of forward passes, and weights and inputs that do not go with it or with a device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cads.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type in which autocast multiplies, by precision of `TrainConfig`."""


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[Any]:
    """Forward passes on `device` in the precision of a recipe, as in training; "no" changes nothing."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=AUTOCAST[precision])


def check_types(
    model: nn.Module, inputs: Mapping[str, Tensor], *, precision: str, device: torch.device, name: str
) -> None:
    """Refuse weights and inputs that a device or a precision cannot train, before anything is computed.

    Args:
        inputs: of a batch, by name.
        precision: of the recipe.
        device: where the model trains.
        name: of the task, for messages.

    Raises:
        ConfigError: if trained weights are float16, or weights or inputs are float64 on MPS.
    """
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        reason = (
            "scales the loss, which needs trained weights in float32"
            if precision == "fp16"
            else "does not scale the loss, without which gradients in float16 become zero"
        )
        raise ConfigError(
            f"precision = {precision!r} {reason}, and {len(half)} weights of {name}, such as {half[0]}, are float16: "
            "load the model in float32 (dtype: float32)"
        )
    if device.type == "mps":
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **inputs}
        double = [n for n, x in tensors.items() if x.dtype in (torch.float64, torch.complex128)]
        if double:
            raise ConfigError(
                f"{len(double)} weights or inputs of {name}, such as {double[0]}, are float64, which {device.type} "
                "cannot compute with: convert them to float32, or train on the CPU (ACCELERATE_USE_CPU=true)"
            )
