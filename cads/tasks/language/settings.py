"""Settings of the language task: a causal language model, trained whole or by adapters, on the answers in text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from cads.errors import ConfigError
from cads.tasks.language.models import Dtype
from cads.tasks.language.rows import TextSource

Weighting = Literal["example", "token"]
ADDED = ("selector_pad_token", "selector_peft", "trainer_compatible")
"""Fields that `result_fields` lists only where they are set, so that older results keep their fields."""


@dataclass
class LanguageSettings:
    """Fields of a language task, and the checks that need no data."""

    evaluation_fields: ClassVar[tuple[str, ...]] = ("choices", "answer_pattern", "max_new_tokens")
    """Fields on which further evaluations depend, and neither selection nor training."""

    model: str = ""
    """Name on the hub, or folder. A folder with a config and no weights gives random weights, by seed."""
    tokenizer: str | None = None
    """Name or folder; null: that of the model."""
    selector_model: str | None = None
    """A smaller model on which selectors work, at its own cost; null: the trained one."""
    selector_tokenizer: str | None = None
    """Tokenizer of the selector's model; null: the one that comes with it."""
    selector_pad_token: str | None = None
    """As pad_token, for the selector's tokenizer; null: pad_token, if it is one of its tokens."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    pad_token: str | None = None
    """The token to fill batches up with, for tokenizers that name none; it is masked."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ...; null: what transformers chooses."""
    trainer_compatible: bool | None = None
    """Compute what other trainers compute: the logits of all positions, and a step of pool and target as one batch, not
    the logits of answers alone and two batches. It costs more, and makes a run equal to one in another trainer."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass, to save memory."""
    peft: dict[str, Any] | None = None
    """Adapters: the type and options of any PEFT configuration, such as {type: lora, r: 8}; null: train all weights."""
    selector_peft: dict[str, Any] | None = None
    """Adapters of the selector's model; null: as peft; {}: all its weights are trained."""
    pool: list[TextSource] = field(default_factory=list)
    """The candidates. Several entries are the sources; one entry has those of its source column, if any."""
    target: list[TextSource] = field(default_factory=list)
    """What selection optimises for; empty: drawn from the pool."""
    test: list[TextSource] = field(default_factory=list)
    """Held out; empty: drawn from the target's data, or from the pool's if there is none."""
    n_pool: int | None = None
    """Examples of the pool; null: all that are left."""
    n_target: int | None = None
    """Examples of the target; null: all that are given, or a tenth of the pool."""
    n_test: int | None = None
    """Examples of the test set; null: all that are given, or half the target's data, or a fifth of the pool."""
    max_tokens: int | None = None
    """Tokens at which an example is cut; null: the context of the model. The selector's model cuts at its own context
    if that is shorter."""
    drop: bool = False
    """Leave out examples that cannot be used, or have no answer token for the model or for the selector's, instead of
    refusing them; `data.json` in the folder of a run counts them."""
    chat: bool | None = None
    """Write prompt and response by the chat template; null: if there is one."""
    separator: str = "\n"
    """Between prompt and response, where they are not written as a chat."""
    weighting: Weighting = "example"
    """A training step minimises the mean over examples of their mean loss a token, or the mean over answer tokens."""
    packing: bool = False
    """The examples of a batch share rows of max_tokens positions; none sees another."""
    choices: str | None = None
    """JSON lines with prompt, choices and answer (0, 1, ...), for `--eval choices`."""
    answer_pattern: str | None = None
    """Regular expression whose last match (its last group) is what `--eval exact_match` compares; null: all text."""
    max_new_tokens: int = 256
    """Most tokens that `--eval exact_match` generates for an example."""
    data_seed: int = 0
    """Seed of the division into target, test set and pool."""
    token_cache: str | None = None
    """Folder in which tokens are stored and read memory-mapped, for data sets larger than memory, and to tokenise only
    once; null: tokens are made at every start and held in memory."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is missing: name one on the hub, or a folder (--task.model)")
        if not self.pool:
            raise ConfigError("pool is missing: give at least one file or data set (task.pool)")
        for name, hint in (("weighting", Weighting), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(hint):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(get_args(hint))}")
        for name in ("n_pool", "n_target", "n_test", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(f"max_tokens = {self.max_tokens}: one token asks, one answers: it must be at least 2")
        if self.token_cache == "":
            raise ConfigError("token_cache is empty: name a folder, or null")
        if self.data_seed < 0:
            raise ConfigError(f"data_seed = {self.data_seed}: it must be >= 0")
        if self.packing and self.trainer_compatible:
            raise ConfigError("trainer_compatible: other trainers do not know packed rows; leave packing out")
        if self.packing and str(self.attn_implementation).startswith("flash"):
            raise ConfigError(f"packing needs a mask, and {self.attn_implementation} takes none: use sdpa or eager")

    def result_fields(self) -> dict[str, Any]:
        """The fields on which a result depends, as JSON values; `token_cache` is not one of them."""
        unset = [name for name in ADDED if getattr(self, name) is None]
        return {name: value for name, value in asdict(self).items() if name not in ("token_cache", *unset)}
