"""Fine-tuning of a causal language model: from settings to a task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from cads.errors import ConfigError
from cads.tasks.language.loading import load_tokenizer
from cads.tasks.language.models import LanguageModels, embedding_rows
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.splits import Split, encode_pools, split_rows
from cads.tasks.language.task import LanguageTask

if TYPE_CHECKING:
    from cads.recipe import TrainConfig
    from cads.tasks.language.pool_parts import TextParts


@dataclass
class LanguageConfig(LanguageSettings):
    """Fine-tuning of a causal language model on text: model, data, and how the data is encoded and weighted."""

    prefix: ClassVar[str] = ""
    """Prefix of the fields that set this model, for messages."""

    def build(self, recipe: TrainConfig) -> LanguageTask:
        """Load tokenizer and data; weights are loaded when the first model is made.

        Raises:
            ConfigError: if model, tokenizer and settings do not fit each other.
            DataError: if data is missing, damaged, too small, or has no answers.
        """
        return self.build_split(self.split(), recipe)

    def build_split(self, split: Split, recipe: TrainConfig) -> LanguageTask:
        """The task on rows that are loaded already.

        Raises: as `build`.
        """
        return self._built(split, recipe, LanguageTask)

    def parts(self, recipe: TrainConfig) -> TextParts:
        """The pool file by file; see `cads.tasks.language.pool_parts`."""
        from cads.tasks.language.pool_parts import TextParts

        return TextParts(self, partial(self.build_split, recipe=recipe))

    def meta(self, recipe: TrainConfig) -> LanguageTask:
        """The task with its examples and without weights; see `cads.tasks.language.meta_task`."""
        from cads.tasks.language.meta_task import MetaLanguageTask

        return self._built(self.split(), recipe, MetaLanguageTask)

    def split(self) -> Split:
        """The rows of pool, target and test set."""
        sizes = (self.n_pool, self.n_target, self.n_test)
        return split_rows(self.pool, self.target, self.test, sizes, self.data_seed)

    def selector(self) -> LanguageConfig:
        """The same settings for the selector's model; see `SelectorConfig`."""
        return SelectorConfig.of(self)

    def load_tokenizer(self, spare_pad: str | None = None) -> Any:
        """The tokenizer of the model.

        Args:
            spare_pad: pad token if neither tokenizer nor settings name one; ignored if the tokenizer lacks it.

        Raises: as `load_tokenizer`.
        """
        return load_tokenizer(
            self.tokenizer or self.model,
            trust_remote_code=self.trust_remote_code,
            pad_token=self.pad_token,
            spare_pad=spare_pad,
            field=f"{self.prefix}pad_token",
        )

    def models(self) -> LanguageModels:
        """The models; no weights are loaded yet."""
        return LanguageModels(
            self.model,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            attention=self.attn_implementation,
            checkpointing=self.gradient_checkpointing,
            peft=self.peft,
            peft_field=f"{self.prefix}peft",
        )

    def max_length(self, models: LanguageModels) -> int:
        """Tokens at which examples are cut.

        Raises:
            ConfigError: if `max_tokens` is beyond the model's context, or there is neither of the two.
        """
        context = models.context
        if self.max_tokens is None and context is None:
            raise ConfigError(f"max_tokens is missing, and the config of {self.model} names no context: set it")
        if self.max_tokens is not None and context is not None and self.max_tokens > context:
            raise ConfigError(f"max_tokens = {self.max_tokens}: the context of {self.model} has {context} positions")
        return int(self.max_tokens or context or 0)

    def _built(self, split: Split, recipe: TrainConfig, kind: type[LanguageTask]) -> LanguageTask:
        if self.selector_model is None:
            return self._task(split, recipe, kind)
        # Selectors need the same examples in both tasks: what one of them leaves out is removed from the other.
        selector = self.selector()
        proxy = selector._task(split, recipe, kind)
        task = self._task(split.kept_by(proxy.pool, proxy.target), recipe, kind)
        if (len(task.pool), len(task.target)) != (len(proxy.pool), len(proxy.target)):
            proxy = selector._task(split.kept_by(task.pool, task.target), recipe, kind)
        task.proxy = proxy
        task.counts = {**task.counts, "selector": proxy.counts}
        return task

    def _task(self, split: Split, recipe: TrainConfig, kind: type[LanguageTask]) -> LanguageTask:
        models = self.models()
        tokenizer = self.load_tokenizer()
        rows = embedding_rows(models.config)
        if rows is not None and len(tokenizer) > rows:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and the embedding of "
                f"{self.model} {rows} rows: use the model's own tokenizer, or a model whose embedding was enlarged"
            )
        pools, counts = encode_pools(split, tokenizer, self, self.max_length(models))
        return kind(pools, models, tokenizer, settings=self, recipe=recipe, counts=counts)


@dataclass
class SelectorConfig(LanguageConfig):
    """The settings of the proxy: the model that selectors use in place of the trained one."""

    prefix: ClassVar[str] = "selector_"

    spare_pad: str | None = None
    """The trained model's pad_token: used if no other is named for this tokenizer, and if it is one of its tokens."""

    @classmethod
    def of(cls, trained: LanguageConfig) -> SelectorConfig:
        """The settings of the `selector_model` of `trained`."""
        overrides = {
            "model": str(trained.selector_model),
            "tokenizer": trained.selector_tokenizer,
            "pad_token": trained.selector_pad_token,
            "peft": trained.peft if trained.selector_peft is None else trained.selector_peft or None,
        }
        unset = dict.fromkeys(("selector_model", "selector_tokenizer", "selector_pad_token", "selector_peft"))
        return cls(**{**vars(trained), **overrides, **unset}, spare_pad=trained.pad_token)

    def load_tokenizer(self, spare_pad: str | None = None) -> Any:
        """See `LanguageConfig`."""
        return super().load_tokenizer(spare_pad or self.spare_pad)

    def max_length(self, models: LanguageModels) -> int:
        """Tokens at which examples are cut, at most the context of this model.

        Raises: as `LanguageConfig`.
        """
        if self.max_tokens is None or models.context is None:
            return super().max_length(models)
        return min(self.max_tokens, models.context)
