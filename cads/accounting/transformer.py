"""The architecture and training of a transformer, read from a model: what its closed form needs."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import nn

from cads.accounting.architectures import Architecture, from_config
from cads.accounting.closed_form import (
    AllWeights,
    Checkpointing,
    Frozen,
    Lora,
    Trainable,
    lora_parameters,
    transformer_flops,
)
from cads.errors import ConfigError


def trainable_size(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(prod(p.shape) for p in model.parameters() if p.requires_grad)


class Transformer(NamedTuple):
    """A transformer as it is trained: its architecture, its trainable weights, and how it is executed.

    Attributes:
        architecture: its linears and sizes.
        trainable: what is trained.
        checkpointing: how layers are recomputed in the backward pass; None for no recomputation.
        fused: whether attention runs in a fused kernel.
    """

    architecture: Architecture
    trainable: Trainable
    checkpointing: Checkpointing | None
    fused: bool

    def flops(self, length: int, head_positions: int | None = None) -> tuple[int, int]:
        """FLOPs of forward, and of forward and backward, of one sequence; by default the head reads all positions."""
        return transformer_flops(
            self.architecture,
            length,
            trainable=self.trainable,
            checkpointing=self.checkpointing,
            head_positions=head_positions,
            fused_attention=self.fused,
        )


def read_transformer(model: nn.Module) -> Transformer | None:
    """Read a transformers or PEFT model; None for other models.

    Raises:
        ConfigError: if the model, or the choice of trained parameters, has no closed form.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return None
    architecture = from_config(config)
    n_trained, adapters = trainable_size(model), getattr(model, "peft_config", None)
    trainable: Trainable = AllWeights() if n_trained else Frozen()
    expected = n_trained and sum(architecture.n_parameters.values())
    if adapters:
        adapter = next(iter(adapters.values()))
        modules = adapter.target_modules
        targets: Any = modules if isinstance(modules, str) else tuple(sorted(modules))
        trainable = Lora(adapter.r, targets, tuple(adapter.modules_to_save or ()))
        expected = lora_parameters(architecture, trainable)
    if n_trained != expected:
        raise ConfigError(
            f"{n_trained:,} parameters are trained where a {architecture.family} with {trainable} trains {expected:,}"
        )
    on_meta = next(model.parameters()).device.type == "meta"
    # On the meta device attention runs as separate products, which recompute no scores.
    return Transformer(
        architecture, trainable, _checkpointing(model), config._attn_implementation == "sdpa" and not on_meta
    )


def _checkpointing(model: nn.Module) -> Checkpointing | None:
    """The kind of gradient checkpointing that is enabled in the model, if any."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
            return "reentrant" if reentrant else "non-reentrant"
    return None
