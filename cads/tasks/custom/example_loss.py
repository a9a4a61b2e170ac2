"""A user's loss, as one number for each example of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.errors import ConfigError

Loss = Callable[[Any, Tensor], Tensor]
"""(output of the model, labels) -> one number for each example, shape (B,) or (B, ...)."""
REMEDY = (
    "give a loss that keeps the examples apart, such as nn.MSELoss(reduction='none'), or any function of the output "
    "and the labels that returns one number for each example"
)


class ExampleLoss:
    """The loss of each example, shape (B,). Of several numbers an example, such as several outputs, it is the mean.

    Args:
        loss: an `nn.Module` or a function.

    Raises:
        ConfigError: if it says that it reduces a batch to one number.
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise ConfigError(f"loss = {loss!r:.60} cannot be called: {REMEDY}")
        reduction = getattr(loss, "reduction", "none")
        if reduction != "none":
            raise ConfigError(f"{name_of(loss)} has reduction = {reduction!r}: {REMEDY}")
        self._loss = copy.deepcopy(loss).cpu() if isinstance(loss, nn.Module) else loss
        self._on_device: dict[torch.device, Loss] = {}

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        """The losses of a batch, nats or any other unit, shape (B,)."""
        losses = self._on(labels.device)(output, labels)
        return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses

    @property
    def name(self) -> str:
        """What it is called, with the settings of a module."""
        return repr(self._loss) if isinstance(self._loss, nn.Module) else name_of(self._loss)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether it is the plain cross entropy of classes, whose unit is nats."""
        if isinstance(self._loss, nn.CrossEntropyLoss):
            return not self._loss.label_smoothing and self._loss.weight is None
        if not isinstance(self._loss, partial) or self._loss.func is not functional.cross_entropy:
            return False
        return self._loss.keywords == {"reduction": "none"}

    def check(self, output: Any, labels: Tensor, other_output: Any, other_labels: Tensor) -> None:
        """Refuse a loss that does not give one number for each example.

        Args:
            output, labels: of a batch. other_output, other_labels: of a batch of another size.

        Raises:
            ConfigError: with the remedy.
        """
        losses = self._checked(output, labels)
        others = self._checked(other_output, other_labels)
        if losses.shape[1:] != others.shape[1:]:
            raise ConfigError(
                f"{self.name} gives losses of shape {tuple(losses.shape)} for {len(labels)} examples, which compares "
                f"each example with all others: the output of the model has shape {_shape(output)} and the labels "
                f"{_shape(labels)}. Give both the same shape, such as labels of shape (N, 1), or squeeze the output"
            )

    def _checked(self, output: Any, labels: Tensor) -> Tensor:
        try:
            losses = self._on(labels.device)(output, labels)
        except Exception as error:  # The loss is the user's own code.
            raise ConfigError(
                f"{self.name} cannot be computed from an output of {_shape(output)} and labels of {_shape(labels)}, "
                f"{labels.dtype}: {error}"
            ) from error
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"{self.name} gives {kind}, and not a tensor of numbers: {REMEDY}")
        if losses.dim() == 0 or len(losses) != len(labels):
            raise ConfigError(
                f"{self.name} gives a loss of shape {tuple(losses.shape)} for {len(labels)} examples: {REMEDY}"
            )
        return losses

    def _on(self, device: torch.device) -> Loss:
        """The loss with its own tensors, such as weights of classes, on `device`."""
        if not isinstance(self._loss, nn.Module):
            return self._loss
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = copy.deepcopy(self._loss).to(device)
        return self._on_device[device]


def name_of(function: Any) -> str:
    """The name of a function, of a part of one, or of the class of another callable."""
    if isinstance(function, partial):
        return f"{name_of(function.func)} with {function.keywords}"
    return str(getattr(function, "__qualname__", type(function).__name__))


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shape(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_shape, value))}]"
    return type(value).__name__
