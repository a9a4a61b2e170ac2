"""Fresh models from a module, or from a function that makes one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cads.accounting.hollow import NO_COPY
from cads.data.hashing import add_tensors
from cads.errors import ConfigError


class FreshModels:
    """Makes models: the same seed gives the same weights.

    Args:
        model: a module, from a copy of whose weights every model starts, whatever the seed; or a function (or class)
            without arguments that makes a new module, whose weights follow from torch's global generator.

    Attributes:
        digest: of the weights of the model of seed 0.
        dtype: of its first weights that are no whole numbers.

    Raises:
        ConfigError: if it makes no module, or not the same one for the same seed.
    """

    def __init__(self, model: nn.Module | Callable[[], nn.Module]) -> None:
        self._given = _copied(model) if isinstance(model, nn.Module) else None
        self._make = None if isinstance(model, nn.Module) else model
        if self._make is not None and not callable(self._make):
            raise ConfigError(f"model = {model!r:.60}: give a torch.nn.Module, or a function that makes one")
        first = self.build(0)
        self.digest = _digest(first)
        if self._make is not None:
            second = self.build(0)
            if second is first:
                raise ConfigError(
                    "model gives the same module each time, which training changes: make a new one in it, or give the "
                    "module itself, from whose weights every model starts"
                )
            if _digest(second) != self.digest:
                raise ConfigError(
                    "model gives other weights each time: draw them from torch's global generator (torch.manual_seed), "
                    "which is seeded before it is called, or give a module"
                )
        floating = (p.dtype for p in first.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.get_default_dtype())

    def build(self, seed: int) -> nn.Module:
        """A fresh model on the CPU."""
        if self._given is not None:
            return copy.deepcopy(self._given)
        assert self._make is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            made = self._make()
        if not isinstance(made, nn.Module):
            raise ConfigError(f"model gives {type(made).__name__}: it must make a torch.nn.Module")
        return _checked(made).cpu()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(_checked(model)).cpu()
    except NO_COPY as error:
        raise ConfigError(
            f"the model cannot be copied ({error}): give a function that makes one, such as lambda: "
            f"{type(model).__name__}(...)"
        ) from error


def _checked(model: nn.Module) -> nn.Module:
    if any(is_lazy(x) for x in (*model.parameters(), *model.buffers())):
        raise ConfigError("the model has lazy layers, without weights yet: call it once, or give their sizes")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"the model, a {type(model).__name__}, has no parameters: there is nothing to train")
    return model


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, model.state_dict())
    return digest.hexdigest()
