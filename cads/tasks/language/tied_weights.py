"""Parameters that several modules share: parted before adapters are trained, shared again where still equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Slot = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters."""


def untie(model: nn.Module) -> list[list[Slot]]:
    """Give each module of `model` parameters of its own; returns the places of each parameter that was shared."""
    slots: dict[int, list[Slot]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), []).append((module, name))
    shared = [places for places in slots.values() if len(places) > 1]
    for places in shared:
        for module, name in places[1:]:
            x = getattr(module, name)
            setattr(module, name, nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad))
    return shared


def tie_equal(shared: list[list[Slot]], model: nn.Module) -> None:
    """Share again, within `model`, the parameters that `untie` gave copies, if they are still equal."""
    present = {id(module) for module in model.modules()}
    for places in shared:
        # A module whose weights an adapter has replaced is no longer there.
        (first, first_name), *others = [(m, name) for m, name in places if id(m) in present] or [(model, "")]
        for module, name in others:
            x = getattr(first, first_name)
            if x.device.type != "meta" and torch.equal(x, getattr(module, name)):
                setattr(module, name, x)


def embeddings_tied(model: Any) -> bool:
    """Whether the output head of `model` has the weights of its embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight
