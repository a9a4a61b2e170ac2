"""What a decoder-only transformer is made of, read from a model."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import nn

from cads.accounting.architectures import Architecture, from_config
from cads.accounting.closed_form import Checkpointing, Frozen, Full, Lora, Trainable, lora_parameters, transformer_flops
from cads.errors import ConfigError


def trainable_size(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(prod(p.shape) for p in model.parameters() if p.requires_grad)


class Transformer(NamedTuple):
    """A transformer as it will be trained: its architecture, what is trained, and how it is executed."""

    architecture: Architecture
    trainable: Trainable
    checkpointing: Checkpointing | None
    fused: bool

    def flops(self, length: int, head_positions: int | None = None) -> tuple[int, int]:
        """Of forward, and of forward and backward, of one sequence; its head computes on all positions by default."""
        return transformer_flops(
            self.architecture,
            length,
            trainable=self.trainable,
            checkpointing=self.checkpointing,
            head_positions=head_positions,
            fused_attention=self.fused,
        )


def read_transformer(model: nn.Module) -> Transformer | None:
    """What a transformers or PEFT model is, or None for other models.

    Raises:
        ConfigError: if no closed form is known for it, or for the choice of what is trained.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return None
    architecture = from_config(config)
    trained, adapters = trainable_size(model), getattr(model, "peft_config", None)
    trainable: Trainable = Full() if trained else Frozen()
    expected = trained and sum(architecture.n_parameters.values())
    if adapters:
        adapter = next(iter(adapters.values()))
        targets = adapter.target_modules
        names: Any = targets if isinstance(targets, str) else tuple(sorted(targets))
        trainable = Lora(adapter.r, names, tuple(adapter.modules_to_save or ()))
        expected = lora_parameters(architecture, trainable)
    if trained != expected:
        raise ConfigError(
            f"{trained:,} parameters are trained where a {architecture.family} with {trainable} trains {expected:,}"
        )
    on_meta = next(model.parameters()).device.type == "meta"
    # On the meta device attention is decomposed, and nothing is recomputed.
    return Transformer(
        architecture, trainable, _checkpointing(model), config._attn_implementation == "sdpa" and not on_meta
    )


def _checkpointing(model: nn.Module) -> Checkpointing | None:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            chosen = getattr(module, "_gradient_checkpointing_func", None)
            reentrant = getattr(chosen, "keywords", {}).get("use_reentrant", False)
            return "reentrant" if reentrant else "non-reentrant"
    return None
