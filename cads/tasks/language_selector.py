"""The settings of the selector's model: those of the trained one, but for what another model has of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cads.tasks.language import LanguageConfig
from cads.tasks.language_models import LanguageModels


@dataclass
class SelectorConfig(LanguageConfig):
    """The settings of a model that works for selectors in place of the trained one."""

    prefix: ClassVar[str] = "selector_"

    spare_pad: str | None = None
    """The trained model's pad_token: what fills batches up if nothing else is named for it, where it is a token."""

    @classmethod
    def of(cls, trained: LanguageConfig) -> SelectorConfig:
        """For the `selector_model` of `trained`."""
        own = {
            "model": str(trained.selector_model),
            "tokenizer": trained.selector_tokenizer,
            "pad_token": trained.selector_pad_token,
            "peft": trained.peft if trained.selector_peft is None else trained.selector_peft or None,
        }
        unset = dict.fromkeys(("selector_model", "selector_tokenizer", "selector_pad_token", "selector_peft"))
        return cls(**{**vars(trained), **own, **unset}, spare_pad=trained.pad_token)

    def load_tokenizer(self, spare_pad: str | None = None) -> Any:
        """See `LanguageConfig`."""
        return super().load_tokenizer(spare_pad or self.spare_pad)

    def longest(self, models: LanguageModels) -> int:
        """Tokens at which examples are cut: no more than this model can read.

        Raises: as `LanguageConfig`.
        """
        if self.max_tokens is None or models.context is None:
            return super().longest(models)
        return min(self.max_tokens, models.context)
