"""A language task for `cads plan`, of which only shapes are known: a model's config, and lengths and sizes of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.accounting.architectures import READERS, from_config, head_kind, read_config
from cads.accounting.closed_form import AllWeights, Checkpointing, Lora, Trainable, check_shape
from cads.accounting.measured import build_transformer
from cads.accounting.nominal import ccds_parameters
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.task import Metrics, Task
from cads.tasks.shape_only import Field, ShapeOnly, shape_only_pool

if TYPE_CHECKING:
    from cads.recipe import TrainConfig

ENCODED_TOKENS = 256
"""Most tokens of a text that the sentence encoder reads (CCDS)."""


@dataclass
class LanguageShapes:
    """A language model and the sizes of its data, without weights or data."""

    model: str = ""
    """JSON file of the transformers config of the model that is trained."""
    lora_rank: int | None = 128
    """Rank of the adapters; null: full fine-tuning."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Linears that have adapters."""
    checkpointing: Checkpointing | None = None
    """Recompute layers in the backward pass: reentrant, non-reentrant, or null."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    tokens: int = 2048
    """Positions of an example, padding included: what is computed."""
    n_pool: int = 270_679
    """Examples of the pool."""
    n_target: int = 285
    """Examples of the target."""
    n_test: int = 14_042
    """Examples of the test set."""
    sources: dict[str, int] = field(default_factory=dict)
    """Size of each source; they must add up to the pool. Empty: no sources."""
    pool_tokens: float | None = None
    """Tokens of the pool without padding, D of `paper` accounting; null: with padding."""
    paper_context: int | None = None
    """Positions to which `paper` accounting lets each token attend, on top of 6N; null: 6N alone."""
    selector_model: str | None = None
    """JSON file of the config of the model that scores examples; null: the trained one."""
    embedding_model: str | None = None
    """JSON file of the config of a sentence encoder; null: none."""

    def __post_init__(self) -> None:
        for name in ("tokens", "n_pool", "n_target", "n_test"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least 1")
        for name in ("lora_rank", "pool_tokens", "paper_context"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} = {value}: it must be positive, or null")
        if self.dtype not in get_args(Literal["float32", "bfloat16"]):
            raise ConfigError(f"dtype = {self.dtype!r}: choose float32 or bfloat16")
        if self.sources and sum(self.sources.values()) != self.n_pool:
            raise ConfigError(
                f"sources have {sum(self.sources.values())} examples in all, and n_pool = {self.n_pool}: "
                "they must be equal"
            )

    def build(self, recipe: TrainConfig) -> NoReturn:
        """Refused: there is no data.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("kind = 'lm-shapes' has shapes and no data: it is for `cads plan` alone")

    def meta(self, recipe: TrainConfig) -> ShapeOnlyLanguageTask:
        """The task, on the meta device.

        Raises:
            ConfigError: if the model's config cannot be read, or does not run with these lengths.
        """
        return ShapeOnlyLanguageTask(self, recipe)


class ShapeOnlyLanguageTask(Task):
    """Next-token prediction on examples that are all of one length, on the meta device.

    Args:
        settings: model and sizes.
        recipe: how the model is trained.
        accounting: how FLOPs are counted.

    Raises:
        ConfigError: if the model's config cannot be read, or does not run with examples of this length.
    """

    def __init__(self, settings: LanguageShapes, recipe: TrainConfig, accounting: str = "measured") -> None:
        if not settings.model:
            raise ConfigError("model is missing: name the JSON file of a transformers config (--task.model)")
        self.settings, self.recipe, self.accounting = settings, recipe, accounting
        self.name = Path(settings.model).stem
        self.config = read_config(settings.model)
        if self.config.model_type in READERS:  # the meta device lets an index beyond a table pass
            check_shape(from_config(self.config), 1, settings.tokens, None)
        self.pool = self._pool("pool", settings.n_pool, settings.sources)
        self.target = self._pool("target", settings.n_target)
        self.test = self._pool("test", settings.n_test)

    def to_time(self) -> None:
        """None: there are no examples."""
        return None

    @property
    def trainable(self) -> Trainable:
        """The weights that are trained: all of them, or adapters."""
        rank, targets = self.settings.lora_rank, tuple(self.settings.lora_targets)
        return AllWeights() if rank is None else Lora(rank, targets)

    def model(self, seed: int) -> nn.Module:
        """The model on the meta device, the same for each seed."""
        self.config.dtype = getattr(torch, self.settings.dtype)
        try:
            with torch.device("meta"):
                return build_transformer(
                    self.config, self.trainable, self.settings.checkpointing, head_kind(self.config)
                )
        except (ValueError, KeyError) as error:
            raise ConfigError(f"model {self.settings.model} cannot be made: {error}") from error

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the next tokens, nats, shape (B,)."""
        output = model(**batch.inputs)[0]
        if head_kind(self.config) == "none":
            return output.mean(dim=(1, 2))
        logits = output[:, :-1].transpose(1, 2)
        return functional.cross_entropy(logits, batch.labels[:, 1:], reduction="none").mean(dim=1)

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Refused: there is no data to measure on.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.name} has no data: it is for `cads plan` alone")

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """N without adapters, with CCDS's attention if `paper_context` is given; D without padding."""
        if self.settings.paper_context is None:
            n = float(_size(model))
        else:
            n = ccds_parameters(from_config(self.config), self.settings.paper_context)
        tokens = self.settings.pool_tokens
        return n, float(batch.tokens) if tokens is None else tokens / len(self.pool) * len(batch)

    @property
    def size(self) -> int:
        """Parameters of the model, without adapters."""
        return _size(self.costs.model)

    @cached_property
    def scorer(self) -> ShapeOnlyLanguageTask:
        """The model that scores examples, with its own adapters."""
        if self.settings.selector_model is None:
            return self
        settings = replace(self.settings, model=self.settings.selector_model)
        return ShapeOnlyLanguageTask(settings, self.recipe, self.accounting)

    @cached_property
    def encoder(self) -> ShapeOnlyLanguageTask:
        """The sentence encoder.

        Raises:
            ConfigError: if there is none.
        """
        if self.settings.embedding_model is None:
            raise ConfigError("embedding_model is missing: name the config of a sentence encoder")
        settings = replace(
            self.settings,
            model=self.settings.embedding_model,
            lora_rank=None,
            checkpointing=None,
            tokens=min(self.settings.tokens, ENCODED_TOKENS),
        )
        return ShapeOnlyLanguageTask(settings, self.recipe, self.accounting)

    def _pool(self, name: str, n: int, sources: dict[str, int] | None = None) -> Pool:
        length = self.settings.tokens
        # To build a mask, a transformer would read data, and meta tensors have none: so a mask is given.
        mask = Field((1, length, length), torch.bool)
        inputs = {"input_ids": Field((length,)), "attention_mask": mask}
        return shape_only_pool(name, ShapeOnly(n, inputs, Field((length,)), length), sources)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
