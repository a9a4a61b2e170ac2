"""Models without the memory of their weights, which compute as many FLOPs as those with weights."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

log = logging.getLogger(__name__)

NO_COPY = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)
"""What `copy.deepcopy` raises for models that hold what cannot be copied."""


def hollow(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU (or on the meta device) whose parameters are zeros that take no memory.

    It runs the same kernels on tensors of the same shapes and types, so that it costs as much. It shares nothing with
    `model`: weights that other models train are neither held by it nor moved to its device, nor is it to theirs.
    """
    shells: dict[int, object] = {id(p): _shell(p) for p in model.parameters() if type(p) is nn.Parameter}
    try:
        copied = copy.deepcopy(model, shells)
    except NO_COPY as error:
        log.warning("costs are counted on a model with weights in memory, as it cannot be copied: %s", error)
        return model
    on_meta = any(x.device.type == "meta" for x in (*model.parameters(), *model.buffers()))
    return copied if on_meta else copied.cpu()


def _shell(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and type, all of whose entries are one number in memory."""
    device = "meta" if parameter.device.type == "meta" else "cpu"
    zero = torch.zeros((), dtype=parameter.dtype, device=device)
    return nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
