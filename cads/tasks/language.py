"""The language task: a causal language model, trained whole or by adapters, on answers in text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.errors import ConfigError, DataError
from cads.scoring import evaluating, scoring_batches
from cads.task import Batch, Metrics, Pool, Task
from cads.tasks.language_costs import LanguageCosts
from cads.tasks.language_data import TextSource
from cads.tasks.language_models import Dtype, LanguageModels, answer_logits, embedding_rows, last_hidden, load_tokenizer
from cads.tasks.language_pools import Split, divide, encode_pools
from cads.tasks.language_tokens import IGNORED, Tokens, pack

if TYPE_CHECKING:
    from cads.trainer import TrainConfig

Weighting = Literal["example", "token"]
ADDED = ("selector_pad_token", "selector_peft")
"""Fields that are named among those a result depends on only where they are set: older results stay what they are."""


@dataclass
class LanguageSettings:
    """Fields of a language task, and the checks that need no data."""

    model: str = ""
    """Name on the hub, or folder. A folder with a config and no weights begins with random ones, by seed."""
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
    """Leave out examples that have no answer token, for the model or for the selector's, instead of refusing them;
    `data.json` in the folder of a run counts them."""
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
    """Most tokens that `--eval exact_match` generates."""
    data_seed: int = 0
    """Of what goes into target, test and pool."""
    token_cache: str | None = None
    """Folder in which tokens are kept and read memory-mapped, for data sets that are larger than memory, and for starts
    that need not tokenise again; null: tokens are made anew and held in memory."""

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
        if self.packing and str(self.attn_implementation).startswith("flash"):
            raise ConfigError(f"packing needs a mask, and {self.attn_implementation} takes none: use sdpa or eager")

    def decisive(self) -> dict[str, Any]:
        """The fields on which a result depends, as JSON values: not where tokens are kept."""
        unset = [name for name in ADDED if getattr(self, name) is None]
        return {name: value for name, value in asdict(self).items() if name not in ("token_cache", *unset)}


@dataclass
class LanguageConfig(LanguageSettings):
    """Fine-tuning a causal language model on text: which model, which data, and what is learned from it."""

    prefix: ClassVar[str] = ""
    """What the names of fields begin with where they are set for this model."""

    def build(self, recipe: TrainConfig) -> LanguageTask:
        """Load tokenizer and data; weights are loaded when the first model is made.

        Raises:
            ConfigError: if model, tokenizer and settings do not fit each other.
            DataError: if data is missing, damaged, too small, or has nothing to learn from.
        """
        return self._built(recipe, LanguageTask)

    def sketch(self, recipe: TrainConfig) -> LanguageTask:
        """The task with its examples and without weights; see `cads.tasks.language_sketch`."""
        from cads.tasks.language_sketch import SketchedLanguageTask

        return self._built(recipe, SketchedLanguageTask)

    def split(self) -> Split:
        """The rows of pool, target and test set."""
        sizes = (self.n_pool, self.n_target, self.n_test)
        return divide(self.pool, self.target, self.test, sizes, self.data_seed)

    def selector(self) -> LanguageConfig:
        """The same settings for the selector's model; see `SelectorConfig`."""
        return SelectorConfig.of(self)

    def load_tokenizer(self, spare_pad: str | None = None) -> Any:
        """The tokenizer of the model.

        Args:
            spare_pad: the token to pad with where neither tokenizer nor settings name one, if it is one.

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
        """The models, none of them loaded yet."""
        return LanguageModels(
            self.model,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            attention=self.attn_implementation,
            checkpointing=self.gradient_checkpointing,
            peft=self.peft,
            peft_field=f"{self.prefix}peft",
        )

    def longest(self, models: LanguageModels) -> int:
        """Tokens at which examples are cut.

        Raises:
            ConfigError: if it is beyond the model's context, or there is neither limit.
        """
        context = models.context
        if self.max_tokens is None and context is None:
            raise ConfigError(f"max_tokens is missing, and the config of {self.model} names no context: set it")
        if self.max_tokens is not None and context is not None and self.max_tokens > context:
            raise ConfigError(f"max_tokens = {self.max_tokens}: the context of {self.model} has {context} positions")
        return int(self.max_tokens or context or 0)

    def _built(self, recipe: TrainConfig, kind: type[LanguageTask]) -> LanguageTask:
        split = self.split()
        if self.selector_model is None:
            return self._task(split, recipe, kind)
        # Selectors need the same examples of both: what one of the two leaves out is left out by the other.
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
        pools, counts = encode_pools(split, tokenizer, self, self.longest(models))
        return kind(pools, models, tokenizer, settings=self, recipe=recipe, counts=counts)


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


class LanguageTask(Task):
    """Next-token prediction on the answers of examples.

    The loss of an example is the mean over its answer tokens. With `weighting: token` a training step minimises
    the mean over the answer tokens of its batch instead, which is the mean over examples of n_i / mean(n) times
    their loss (`training_losses`); scores of examples stay means (`losses`).

    Args:
        pools: pool, target and test set of `Tokens`.
        models: makes the models.
        tokenizer: of the pools.
        settings: of weighting, packing and evaluation.
        recipe: how the final model is trained.
        counts: what was cut and left out of each source, and by the selector's model, as JSON values.

    Raises:
        ConfigError: if packing does not go with recipe or model.
    """

    averaged = ("loss",)
    pretrained = True

    def __init__(
        self,
        pools: Sequence[Pool],
        models: LanguageModels,
        tokenizer: Any,
        *,
        settings: LanguageSettings,
        recipe: TrainConfig,
        counts: Mapping[str, Any],
    ) -> None:
        self.counts = counts
        self.pool, self.target, self.test = pools
        self.models, self.tokenizer, self.settings, self.recipe = models, tokenizer, settings, recipe
        self.name = f"language/{Path(models.name).name}"
        self.mergeable = models.peft is not None
        if settings.packing and recipe.accumulate > 1:
            raise ConfigError(
                f"accumulate = {recipe.accumulate}: packed batches are not cut into pieces; lower batch_size"
            )

    @property
    def identity(self) -> dict[str, str]:
        """What data it is, and the weights that its models begin with."""
        found = super().identity | {"model": self.models.digest}
        if self.proxy is None:
            return found
        # A proxy of one's own may have no weights to tell.
        return found | {"selector model": self.proxy.identity.get("model", self.proxy.name)}

    @property
    def pad(self) -> int:
        """The token id of padding."""
        return tokens_of(self.pool).pad

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer: the tokenizer's end token, and the special tokens that end one in the pool."""
        found = tokens_of(self.pool).last_answers & set(self.tokenizer.all_special_ids)
        end = self.tokenizer.eos_token_id
        return sorted(found | ({end} if end is not None else set()))

    @property
    def longest(self) -> int:
        """Positions that no example exceeds."""
        return tokens_of(self.pool).longest

    @property
    def longest_example(self) -> tuple[int, int]:
        """T and A of the longest example of all pools, as batches fill it up."""
        pools = [tokens_of(p) for p in (self.pool, self.target, self.test)]
        longest = max(pools, key=lambda x: int(x.lengths().max()))
        alone = longest.take(np.array([longest.lengths().argmax()]))
        inputs = replace(alone, packed=False).batch(np.arange(1)).inputs
        return inputs["input_ids"].shape[1], inputs["answers"].shape[1]

    @cached_property
    def costs(self) -> LanguageCosts:
        """What one example costs, by its length and number of answers."""
        return LanguageCosts(self, self.accounting)

    def model(self, seed: int) -> nn.Module:
        """A fresh model on the CPU; with adapters, its base is shared by all models of this task."""
        return self.models.build(seed)

    def token_losses(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods of the answer tokens in nats (float32), and where they count; (B, A) each."""
        inputs, places = self.model_inputs(model, batch)
        logits = answer_logits(model, inputs, places)
        wanted = batch.labels.gather(1, batch.inputs["answers"])
        # With the classes last: transposed logits would be copied, forward and backward, at four times the time.
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(wanted), wanted != IGNORED

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The mean loss of each example over its answer tokens, in nats, shape (B,)."""
        losses, counted = self.token_losses(model, batch)
        return losses.sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def training_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """What a training step takes the mean of, shape (B,): by `weighting`, of examples or of answer tokens."""
        losses = self.losses(model, batch)
        return losses * batch.inputs["weight"] if self.settings.weighting == "token" else losses

    def model_inputs(self, model: Callable[..., Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What the model reads, and where in it the answers are predicted (flattened positions, shape (B, A))."""
        inputs = batch.inputs
        if "row" in inputs:
            packed = pack(inputs, getattr(torch, self.settings.dtype))
            return packed.inputs, packed.places
        rows, length = inputs["input_ids"].shape
        before = (inputs["answers"] - 1).clamp(min=0)
        places = before + length * torch.arange(rows, device=before.device)[:, None]
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, places

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the last hidden states over an example's tokens, float32, shape (B, D)."""
        present = batch.inputs["attention_mask"]
        hidden = last_hidden(model, batch.inputs["input_ids"], present).float()
        return (hidden * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True)

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Loss (nats, mean of the examples' means), loss a token, and perplexity on answer tokens."""
        sums, counts = self._answer_losses(model, pool), tokens_of(pool).answers
        token_loss = float(sums.sum() / counts.sum())
        return {
            "loss": float((sums / counts).mean()),
            "token_loss": token_loss,
            "perplexity": float(np.exp(min(token_loss, 700.0))),
        }

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """The loss: mean over the answer tokens of each example, nats."""
        return {"loss": self._answer_losses(model, pool) / tokens_of(pool).answers}

    def _answer_losses(self, model: nn.Module, pool: Pool) -> np.ndarray:
        """Sum over the answer tokens of each example, nats, shape (N,)."""
        device, sums = next(model.parameters()).device, np.zeros(len(pool))
        with evaluating(model):
            for rows in scoring_batches(pool):
                losses, _ = self.token_losses(model, pool.batch(rows).to(device))
                sums[rows] = losses.double().sum(dim=1).cpu().numpy()
        return sums

    def texts(self, pool: Pool) -> list[str]:
        """The first message of the user, the prompt, or the text itself."""
        texts: list[str] = tokens_of(pool).texts.to_pylist()
        return texts

    def subtasks(self, pool: Pool) -> np.ndarray | None:
        """What the subtask column says, or None without one."""
        return tokens_of(pool).subtasks

    def nominal(self, model: nn.Module, batch: Batch) -> tuple[float, float]:
        """Parameters without adapters, and tokens without padding."""
        return float(self.models.base_size), float(batch.inputs["attention_mask"].sum())

    def describe(self, pool: Pool, positions: np.ndarray) -> list[str]:
        """The examples at `positions` as text, answers included."""
        tokens = tokens_of(pool)
        spans = [tokens.ids[tokens.offsets[p] : tokens.offsets[p + 1]] for p in positions]
        texts: list[str] = self.tokenizer.batch_decode(spans)
        return texts

    def save(self, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
        """Write the adapter, or the whole model, with the tokenizer; see `LanguageModels.save`."""
        self.models.save(model, folder, self.tokenizer, merge=merge)

    def check_evaluation(self, name: str) -> None:
        """Refuse all but `choices`, `exact_match` and `lm_eval:TASKS`, and these if they lack something."""
        from cads.tasks.language_evaluation import check_evaluation

        check_evaluation(self, name)

    def evaluate(self, model: nn.Module, name: str) -> Metrics:
        """One of the further evaluations: `choices`, `exact_match` or `lm_eval:TASKS`."""
        from cads.tasks.language_evaluation import evaluate

        return evaluate(self, model, name)


def tokens_of(pool: Pool) -> Tokens:
    """The payload of a pool of token sequences.

    Raises:
        DataError: if it holds something else.
    """
    if not isinstance(pool.examples, Tokens):
        raise DataError(f"the {pool.name} holds {type(pool.examples).__name__}: a language task needs Tokens")
    return pool.examples
