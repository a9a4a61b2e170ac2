"""What the last linear layer of a model reads: a vector for each example, in which examples are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cads.errors import ConfigError


def last_layer_inputs(model: nn.Module, run: Callable[[], Any], name: str) -> Tensor:
    """The inputs of the last linear layer while `run` calls the model on a batch, shape (B, D).

    Args:
        name: of the task, for the message.

    Raises:
        ConfigError: if the model has no linear layer, or does not use it.
    """
    layer = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    read: list[Tensor] = []
    if layer is not None:
        hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            run()
        finally:
            hook.remove()
    if not read:
        raise ConfigError(f"the model of {name} has no linear layer, so no features: name a backbone")
    return read[-1].flatten(1)
