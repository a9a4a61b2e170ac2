"""The recipe of a training run: the same for the final model and for every inner run of a selector."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cads.errors import ConfigError

ONE_BY_ONE = {
    ("non_finite", "skip"): "batched ones share each update",
    ("precision", "fp16"): "batched ones share the scale of the loss",
    ("sharding", "full"): "sharded ones train one by one",
}
"""Settings with which replicas cannot be batched, and why."""


@dataclass
class TrainConfig:
    """How a model is trained: the same recipe for the final model and for every inner run of a selector."""

    batch_size: int = 32
    """Examples a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled for AdamW, L2 for SGD."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate over the budget, after the warm-up; cosine and linear end at 0."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises linearly."""
    clip_norm: float | None = 1.0
    """Largest gradient norm, or null."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision ("no" is float32)."""
    accumulate: int = 1
    """Pieces into which a batch is split to save memory (gradient accumulation)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or gradient is NaN or infinite: the run stops before the update, or leaves the batch
    out, pays for it and counts it (replicas then train one by one)."""
    workers: int = 0
    """Processes that load data."""
    replicas: Literal["auto", "batched", "loop"] = "auto"
    """How the inner runs of a selector train: as one batched model where it is dense, or one by one, as with fp16."""
    sharding: Literal["none", "full"] = "none"
    """Whether several processes divide parameters, gradients and optimizer state of a model while it trains, for models
    whose training does not fit into one; inner runs then train one after another. When it is trained each holds it
    whole. One process is the same without."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(get_args(hint))}")
        for name in ("batch_size", "accumulate", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}: it must be positive")
        for name in ("weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be >= 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup = {self.warmup}: a share of the budget, at least 0 and below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm = {self.clip_norm}: it must be positive, or null for no clipping")
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate = {self.accumulate} splits a batch of only {self.batch_size} examples")
        for (name, value), why in ONE_BY_ONE.items():
            if self.replicas == "batched" and getattr(self, name) == value:
                raise ConfigError(f"{name} = {value!r} needs replicas = 'auto' or 'loop': {why}")
        if self.sharding == "full" and self.precision == "fp16":
            raise ConfigError("sharding = 'full' needs precision = 'no' or 'bf16': fp16 scales the loss")

    def result_fields(self) -> dict[str, Any]:
        """The fields on which a result depends by more than rounding, as JSON values.

        Results are known by a hash of them. `workers`, on which nothing depends, is among them with its default.
        """
        fields = {**asdict(self), "workers": TrainConfig.workers}
        return {name: value for name, value in fields.items() if name != "sharding"}

    def rate(self, progress: float) -> float:
        """The learning rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        after = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
        return self.learning_rate * (1 - min(1.0, after)) if self.schedule == "linear" else self.learning_rate
