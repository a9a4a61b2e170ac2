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
"""Settings with which replicas cannot be batched, and the reason."""


@dataclass
class TrainConfig:
    """How a model is trained. The final model and every inner run of a selector share one recipe."""

    batch_size: int = 32
    """Examples a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled for AdamW, L2 for SGD."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate over the budget, after the warm-up; cosine and linear end at 0."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises linearly."""
    clip_norm: float | None = 1.0
    """Maximum gradient norm, or null for no clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision ("no" is float32)."""
    accumulate: int = 1
    """Micro-batches into which a batch is split to save memory (gradient accumulation)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens if a loss or gradient is NaN or infinite. "stop" ends the run before the update. "skip" leaves out
    the update, but charges and counts the batch; replicas then train one by one."""
    workers: int | None = None
    """Worker processes that load data, or threads where the batches follow from the course of the training (`cads`);
    0 loads in the training process. Null: 0 on a CPU, and on other devices half of the cores, at most 4, for runs of
    more than 200 steps. No result depends on it."""
    replicas: Literal["auto", "batched", "loop"] = "auto"
    """How the inner runs of a selector train: as one batched model, or one by one. "auto" batches dense models and
    trains others, and all models in fp16, one by one."""
    sharding: Literal["none", "full"] = "none"
    """Whether several processes shard parameters, gradients and optimizer state of a model while it trains, for models
    whose training does not fit into one process. Inner runs then train one after another. After training each process
    holds the full model. With one process this setting changes nothing."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(get_args(hint))}")
        for name in ("batch_size", "accumulate", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}: it must be positive")
        for name, value in (("weight_decay", self.weight_decay), ("workers", self.workers or 0)):
            if not value >= 0:
                raise ConfigError(f"{name} = {value}: it must be >= 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup = {self.warmup}: a share of the budget, at least 0 and below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm = {self.clip_norm}: it must be positive, or null for no clipping")
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate = {self.accumulate} splits a batch of only {self.batch_size} examples")
        for (name, value), reason in ONE_BY_ONE.items():
            if self.replicas == "batched" and getattr(self, name) == value:
                raise ConfigError(f"{name} = {value!r} needs replicas = 'auto' or 'loop': {reason}")
        if self.sharding == "full" and self.precision == "fp16":
            raise ConfigError("sharding = 'full' needs precision = 'no' or 'bf16': fp16 scales the loss")

    def result_fields(self) -> dict[str, Any]:
        """The fields on which a result depends by more than rounding, as JSON values.

        Results are identified by a hash of these fields. No result depends on `workers`: it is included as 0.
        """
        fields = {**asdict(self), "workers": 0}
        return {name: value for name, value in fields.items() if name != "sharding"}

    def rate(self, progress: float) -> float:
        """The learning rate once a share `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * self.decay((progress - self.warmup) / (1 - self.warmup))

    def decay(self, progress: float) -> float:
        """The share of the peak learning rate once a share `progress` of the decay is over."""
        progress = min(1.0, progress)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.schedule == "linear" else 1.0
