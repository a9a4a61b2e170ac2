"""The optimizer of a recipe, its learning rate, and what accelerate leaves in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cads.recipe import TrainConfig
from cads.training.learners import Learner

PATCHED_STEPS = ("_optimizer_original_step_method", "_optimizer_patched_step_method")
"""Attributes in which accelerate's wrapper of an optimizer keeps the methods that it exchanges."""


def build_optimizer(recipe: TrainConfig, model: nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer of a recipe for the trainable parameters of a model.

    Args:
        fused: whether SGD is fused; AdamW always is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    # If loss scaling skips the first step, fused SGD (PyTorch 2.14) continues with uninitialised momentum.
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True, fused=fused)


def unwrap(learner: Learner, optimizer: torch.optim.Optimizer, wrapped: Any) -> None:
    """Remove the methods that accelerate has put into a learner, its optimizer and the wrapper of that.

    They refer to their owners, so that weights and moments would stay in memory until a garbage collection.
    """
    for owner in (learner, optimizer, wrapped):
        for name in ("forward", "_original_forward", "step", *PATCHED_STEPS):
            vars(owner).pop(name, None)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
