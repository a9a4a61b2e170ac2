"""The language task: next-token prediction on the answers of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import scoring_batches
from cads.errors import ConfigError
from cads.scoring.pool_scores import evaluating
from cads.task import Metrics, StepwiseEvaluation, Task
from cads.tasks.language import evaluation
from cads.tasks.language.bag_of_tokens import N_BUCKETS, sharing_flops, token_shares
from cads.tasks.language.costs import LanguageCosts
from cads.tasks.language.models import LanguageModels
from cads.tasks.language.output_head import answer_logits, last_hidden
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.tokens import IGNORED, pack, tokens_of

if TYPE_CHECKING:
    from cads.recipe import TrainConfig

MASKED = ("cpu", "meta")
"""Devices whose batches have an attention mask: there it costs no wait, and results stay as they were."""
COMPARED = 32
"""Test examples whose losses are compared under a merged model and under the trained one."""


class LanguageTask(Task):
    """Next-token prediction on the answers of examples.

    The loss of an example is the mean over its answer tokens. With `weighting: token` a training step minimises the
    mean over all answer tokens of its batch instead (`training_losses`). That is the mean over examples of
    n_i / mean(n) times their loss, for n_i answer tokens of example i. Scores of examples stay means (`losses`).

    Args:
        pools: pool, target and test set of `Tokens`.
        models: makes the models.
        tokenizer: of the pools.
        settings: of weighting, packing and evaluation.
        recipe: how the final model is trained.
        counts: examples cut and left out of each source, for the selector's model too, as JSON values.

    Raises:
        ConfigError: if the recipe does not go with packing, or its precision not with the type of the weights.
    """

    averaged = ("loss",)
    pretrained = True
    n_descriptors, bags = N_BUCKETS, True

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
        self.base_model = models.name
        self.name = f"language/{Path(models.name).name}"
        self.mergeable = models.peft is not None
        self.descriptor_flops = sharing_flops(tokens_of(self.pool))
        if settings.trainer_compatible:
            for pool in (self.pool, self.target):
                pool.examples = replace(tokens_of(pool), joint=True)
        if settings.packing and recipe.accumulate > 1:
            raise ConfigError(
                f"accumulate = {recipe.accumulate}: packed batches are not cut into pieces; lower batch_size"
            )
        if models.dtype == "float16" and models.peft is None:
            raise ConfigError(
                f"dtype = 'float16' with precision = {recipe.precision!r}: in float16, gradients become zero unless "
                "the loss is scaled, and a scaled loss needs weights in float32; set dtype: float32, or dtype: "
                "bfloat16 and precision: no"
            )

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the data and of the weights that the models start from."""
        identity = super().identity | {"model": self.models.digest}
        if self.proxy is None:
            return identity
        # A user's own proxy task may have no "model" in its identity.
        return identity | {"selector model": self.proxy.identity.get("model", self.proxy.name)}

    @property
    def pad(self) -> int:
        """The token id of padding."""
        return tokens_of(self.pool).pad

    @property
    def full_logits(self) -> bool:
        """Whether the logits of all positions are computed."""
        return bool(self.settings.trainer_compatible)

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer: the tokenizer's end token, and special tokens that end one in the pool."""
        end_tokens = tokens_of(self.pool).last_answers & set(self.tokenizer.all_special_ids)
        end = self.tokenizer.eos_token_id
        return sorted(end_tokens | ({end} if end is not None else set()))

    @property
    def max_length(self) -> int:
        """Tokens at which examples are cut."""
        return tokens_of(self.pool).max_length

    @property
    def longest_example(self) -> tuple[int, int]:
        """T and A of the longest example of all pools, padding included."""
        pools = [tokens_of(p) for p in (self.pool, self.target, self.test)]
        longest_pool = max(pools, key=lambda x: int(x.lengths().max()))
        example = longest_pool.take(np.array([longest_pool.lengths().argmax()]))
        inputs = replace(example, packed=False).batch(np.arange(1)).inputs
        return inputs["input_ids"].shape[1], inputs["answers"].shape[1]

    @cached_property
    def costs(self) -> LanguageCosts:
        """What one example costs, by its length and number of answers."""
        return LanguageCosts(self, self.accounting)

    def model(self, seed: int) -> nn.Module:
        """A fresh model on the CPU; with adapters, its base is shared by all models of this task."""
        return self.models.build(seed)

    def token_losses(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods of the answer tokens in nats (float32), and a mask of the real ones; (B, A) each."""
        inputs, positions = self.model_inputs(model, batch)
        logits = answer_logits(model, inputs, positions, full=self.full_logits)
        return answer_losses(logits, batch.labels.gather(1, batch.inputs["answers"]))

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The mean loss of each example over its answer tokens, in nats, shape (B,)."""
        return mean_answer_losses(*self.token_losses(model, batch))

    def training_losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Losses whose mean a training step minimises, shape (B,); weighted by answer tokens if `weighting: token`."""
        losses = self.losses(model, batch)
        return losses * batch.inputs["weight"] if self.settings.weighting == "token" else losses

    def model_inputs(self, model: Callable[..., Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, and the flattened positions that predict the answers, shape (B, A)."""
        inputs = batch.inputs
        if "row" in inputs:
            packed = pack(inputs, getattr(torch, self.settings.dtype))
            return packed.inputs, packed.answer_positions
        rows, length = inputs["input_ids"].shape
        columns = (inputs["answers"] - 1).clamp(min=0)
        positions = columns + length * torch.arange(rows, device=columns.device)[:, None]
        if columns.device.type in MASKED or self.models.needs_mask:
            return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, positions
        # Padding comes last, and causal attention reads nothing behind a token. Without a mask flash attention applies,
        # and transformers lets the host wait once to look for packed rows, and not twice to look for padding.
        return {"input_ids": inputs["input_ids"]}, positions

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the last hidden states over an example's tokens, float32, shape (B, D)."""
        present = batch.inputs["attention_mask"]
        hidden = last_hidden(model, batch.inputs["input_ids"], present).float()
        return (hidden * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True)

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """Loss (nats, mean of the examples' means), loss per answer token, and perplexity of the answer tokens."""
        sums, counts = self._answer_losses(model, pool), tokens_of(pool).answers
        token_loss = float(sums.sum() / counts.sum())
        return {
            "loss": float((sums / counts).mean()),
            "token_loss": token_loss,
            "perplexity": float(np.exp(min(token_loss, 700.0))),
        }

    def metrics_by_example(self, model: nn.Module, pool: Pool) -> dict[str, np.ndarray]:
        """The mean loss over the answer tokens of each example, nats."""
        return {"loss": self._answer_losses(model, pool) / tokens_of(pool).answers}

    def _answer_losses(self, model: nn.Module, pool: Pool) -> np.ndarray:
        """Sum of the losses of the answer tokens of each example, nats, shape (N,)."""
        device, sums = next(model.parameters()).device, np.zeros(len(pool))
        with evaluating(model):
            for rows in scoring_batches(pool):
                losses, _ = self.token_losses(model, pool.batch(rows).to(device))
                sums[rows] = losses.cpu().double().sum(dim=1).numpy()
        return sums

    def texts(self, pool: Pool) -> list[str]:
        """The first message of the user, the prompt, or the text itself."""
        texts: list[str] = tokens_of(pool).texts.to_pylist()
        return texts

    def loss_groups(self, pool: Pool) -> np.ndarray:
        """Buckets of the number of answer tokens, whose edges are the quartiles of the target's."""
        edges = np.unique(np.quantile(tokens_of(self.target).answers, (0.25, 0.5, 0.75)))
        return np.searchsorted(edges, tokens_of(pool).answers)

    def descriptors(self, pool: Pool, positions: np.ndarray) -> np.ndarray:
        """The tokens of texts; see `token_shares`."""
        return token_shares(tokens_of(pool), positions)

    def subtasks(self, pool: Pool) -> np.ndarray | None:
        """Codes of the subtask column, or None without one."""
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

    def check_merge(self, merge: bool) -> None:
        """Refuse to merge where there are no adapters, or adapters that cannot be merged."""
        super().check_merge(merge)
        if merge:
            self.models.check_mergeable()

    def save(self, model: nn.Module, folder: Path, *, merge: bool = False) -> None:
        """Write the adapter or the whole model, and the tokenizer.

        With `merge`, losses of test examples under the written model are compared with those under the trained one;
        see `LanguageModels.save_merged`.
        """
        self.check_merge(merge)
        if merge:
            self.models.save_merged(model, folder, self.tokenizer, self._compared_losses)
        else:
            self.models.save(model, folder, self.tokenizer)

    def load(self, folder: Path) -> nn.Module:
        """The trained model that `save` wrote."""
        return self.models.load(folder)

    def _compared_losses(self, model: nn.Module) -> np.ndarray:
        """The losses of the first test examples, nats, by which a written model is compared with the trained one."""
        examples = self.test.subset(np.arange(min(COMPARED, len(self.test))), self.test.name)
        return self.metrics_by_example(model, examples)["loss"]

    def check_evaluation(self, name: str) -> None:
        """Refuse all evaluations but `choices`, `exact_match` and `lm_eval:TASKS`, and these if they cannot run."""
        evaluation.check_evaluation(self, name)

    def evaluate(self, model: nn.Module, name: str) -> Metrics:
        """One of the further evaluations: `choices`, `exact_match` or `lm_eval:TASKS`."""
        return evaluation.evaluate(self, model, name)

    def stepwise_evaluation(self, model: nn.Module, name: str) -> StepwiseEvaluation | None:
        """The steps of `choices` or `exact_match`."""
        return evaluation.stepwise_evaluation(self, model, name)

    def evaluation_settings(self, name: str) -> dict[str, Any]:
        """The settings and the contents of files that an evaluation reads."""
        return evaluation.evaluation_settings(self, name)


def answer_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of answer tokens in nats, float32, and which of them are real; shape (B, A) each.

    Args:
        logits: that predict them, shape (B, A, V). labels: the tokens, `IGNORED` where there is none, shape (B, A).
    """
    # Classes stay last: transposed logits would be copied forward and backward, at four times the time.
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels), labels != IGNORED


def mean_answer_losses(losses: Tensor, mask: Tensor) -> Tensor:
    """The mean loss of each example over its answer tokens, shape (B,), of what `answer_losses` gives."""
    return losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
