"""Weights of a file in a network: safetensors, or a state dict of PyTorch that is read without running code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cads.errors import DataError
from cads.runtime.checkpoint import content_digest

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints hold the weights."""
PREFIXES = ("", "module.", "model.", "1.")
"""What the names of weights may begin with: in parallel training, other trainers, and networks for grey images."""
SHOWN = 4
"""Names in a message."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    Attributes:
        path: of the file.
    """

    path: Path

    @property
    def digest(self) -> str:
        """Hash of its contents.

        Raises:
            DataError: if it cannot be read.
        """
        try:
            return content_digest(self.path)
        except OSError as error:
            raise DataError(f"the weights in {self.path} cannot be read: {error.strerror}") from error

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights whose names and shapes fit; what starts fresh, and what is not used, is said once.

        Raises:
            DataError: if the file cannot be read, or nothing fits.
        """
        load_fitting(model, self._tensors(), str(self.path))

    def _tensors(self) -> dict[str, Tensor]:
        try:
            status = self.path.stat()
            return _read(self.path, status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise DataError(f"the weights in {self.path} cannot be read: {error.strerror or error}") from error


def load_fitting(model: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    """Copy the weights whose names and shapes fit; what starts fresh, and what is not used, is said once.

    Args:
        state: weights by name. label: of where they are from, in messages.

    Raises:
        DataError: if nothing fits.
    """
    wanted = model.state_dict()
    best = max((_fitting(state, wanted, theirs, own) for theirs in PREFIXES for own in PREFIXES), key=len)
    if state and not any(wanted[name].is_floating_point() for name in best):
        raise DataError(f"no weights in {label} fit the network: it has {_few(state)}, and the network {_few(wanted)}")
    model.load_state_dict(best, strict=False)
    fresh = [name for name in wanted if name not in best]
    if fresh:
        _say(f"{label}: {len(best)} of {len(wanted)} tensors are used; fresh: {_few(fresh)}")
    if len(best) < len(state):
        _say(f"{label}: {len(state) - len(best)} tensors do not fit the network, and are not used")


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> dict[str, Tensor]:
    """The tensors of a file, by name. The time of its last change and its size tell versions of it apart."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"the weights in {path} cannot be read ({error}): give safetensors, or a state dict that torch.save wrote; "
            "files that hold code are not read"
        ) from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {str(k): x for k, x in loaded.items() if isinstance(x, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise DataError(f"{path} holds {type(loaded).__name__} and no weights by name: give a state dict")
    return tensors


def _fitting(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file_prefix: str, own_prefix: str
) -> dict[str, Tensor]:
    """The weights that fit, by their names in the network, if each side's names begin with a prefix."""
    fitting = {}
    for name, x in state.items():
        own = own_prefix + name.removeprefix(file_prefix)
        if name.startswith(file_prefix) and own in wanted and wanted[own].shape == x.shape:
            fitting[own] = x
    return fitting


@lru_cache(maxsize=256)
def _say(text: str) -> None:
    log.warning("%s", text)


def _few(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
