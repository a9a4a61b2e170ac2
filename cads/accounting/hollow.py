"""Models without the memory of their weights, which compute as many FLOPs as those with weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        copied = copy.deepcopy(model, {**shells, **computed_tensors(model)})
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


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of the tensors of `model` that are computed from others, such as transposed ones of tied adapters.

    As the memo of `deepcopy`, which copies no such tensor by itself.
    """
    held = (x for module in model.modules() for x in _tensors_in(vars(module)))
    return {id(x): x.detach().clone() for x in held if not x.is_leaf}


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
