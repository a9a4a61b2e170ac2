"""Costs of the selectors of CCDS, by stage: BM25, embedding, perplexity and LESS.

Source: Yin and Rush, "Compute-Constrained Data Selection" (CCDS), ICLR 2025, arXiv 2410.16208; LESS: Xia et al.
2024, arXiv 2402.04333. Under `paper` accounting the figures are CCDS's own (`cads.accounting.nominal`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import SELECT, PlannedLedger
from cads.accounting.nominal import selection_flops
from cads.accounting.operations import (
    adam_direction_flops,
    bm25_flops,
    normalisation_flops,
    projection_flops,
    similarity_flops,
)
from cads.accounting.transformer import trainable_size
from cads.errors import ConfigError
from cads.task import Task
from cads.tasks.language.shapes import ShapeOnlyLanguageTask

WARM_UP, CHECKPOINTS = 0.05, 4
"""LESS warms up on this share of the pool, with one pass for each of its checkpoints."""
PROJECTED = 8192
"""LESS projects gradients to this dimension."""
FINE_TUNING_PASSES = 4
"""Passes over the target that fine-tune the scorer of perplexity."""


@dataclass(frozen=True)
class CcdsCost(ABC):
    """A published method.

    Attributes:
        needed_ratio: size ratio of trained model to scorer from which on the method is compute-optimal somewhere
            (CCDS, section 6), or None if it is not known.
    """

    name = ""
    needed_ratio: float | None = None

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """The cost of selection from the whole pool, by stage.

        Raises:
            ConfigError: if the task has no texts, or the method does not support its accounting.
        """
        if not isinstance(task, ShapeOnlyLanguageTask):
            raise ConfigError(f"method {self.name!r} scores texts, and {task.name} has none")
        check_step(task, budget.flops(task))
        ledger = PlannedLedger()
        if task.accounting == "paper":
            scorer, batch = task.scorer, task.pool.batch(np.zeros(1, dtype=np.int64))
            n, d = scorer.nominal(scorer.costs.model, batch)
            ledger.charge(SELECT, "as published", selection_flops(self.name, n, d * len(task.pool)))
        else:
            self._charge(task, ledger)
        return ledger

    @abstractmethod
    def _charge(self, task: ShapeOnlyLanguageTask, ledger: PlannedLedger) -> None:
        """Charge every stage at the task's costs."""


@dataclass(frozen=True)
class CcdsBm25(CcdsCost):
    """Words that pool and target share: at most one posting for each token, and one match of it for each query."""

    name = "bm25"

    def _charge(self, task: ShapeOnlyLanguageTask, ledger: PlannedLedger) -> None:
        if task.accounting == "measured":
            raise ConfigError("method 'bm25' has no tensors to measure: its accounting is analytic or paper")
        postings = task.settings.pool_tokens or task.settings.tokens * len(task.pool)
        ledger.charge(SELECT, "index and scores", bm25_flops(postings, postings * len(task.target)))


@dataclass(frozen=True)
class CcdsEmbedding(CcdsCost):
    """Similarity of sentence embeddings."""

    name = "embedding"

    def _charge(self, task: ShapeOnlyLanguageTask, ledger: PlannedLedger) -> None:
        encoder, pool, target = task.encoder, task.pool, task.target
        texts, width = len(pool) + len(target), encoder.config.hidden_size
        encoded = encoder.costs.forward_pool(encoder.pool) + encoder.costs.forward_pool(encoder.target)
        ledger.charge(SELECT, "embeddings", encoded)
        compared = normalisation_flops(texts, width) + similarity_flops(len(target), len(pool), width)
        ledger.charge(SELECT, "similarities", compared)
        ledger.scored.append(encoder)


@dataclass(frozen=True)
class CcdsPerplexity(CcdsCost):
    """The loss of every example under a scorer that is fine-tuned on the target."""

    name = "ppl"
    needed_ratio: float | None = 5.0

    def _charge(self, task: ShapeOnlyLanguageTask, ledger: PlannedLedger) -> None:
        scorer = task.scorer
        usage = scorer.costs.per_usage(scorer.target, task.recipe.batch_size)
        ledger.charge(SELECT, "fine-tuning", FINE_TUNING_PASSES * usage * len(scorer.target))
        ledger.charge(SELECT, "scores", scorer.costs.forward_pool(scorer.pool))
        ledger.trained.append((scorer, 1))


@dataclass(frozen=True)
class CcdsLess(CcdsCost):
    """Influence by gradients: projected per-example gradients of several checkpoints, compared with the target's."""

    name = "less"
    needed_ratio: float | None = 10.0

    def _charge(self, task: ShapeOnlyLanguageTask, ledger: PlannedLedger) -> None:
        scorer, n, m = task.scorer, len(task.pool), len(task.target)
        costs, size = scorer.costs, trainable_size(scorer.costs.model)
        warm_up = WARM_UP * n * CHECKPOINTS * costs.per_usage(scorer.pool, task.recipe.batch_size)
        gradient = costs.usage(scorer.pool.batch(np.zeros(1, dtype=np.int64)))
        projected = projection_flops(n + m, size, PROJECTED) + adam_direction_flops(n, size)
        compared = normalisation_flops(n + m, PROJECTED) + similarity_flops(m, n, PROJECTED)
        ledger.charge(SELECT, "warm-up", warm_up)
        ledger.charge(SELECT, "gradients", CHECKPOINTS * (n + m) * gradient)
        ledger.charge(SELECT, "projections", CHECKPOINTS * projected)
        ledger.charge(SELECT, "similarities", CHECKPOINTS * compared)
        ledger.trained.append((scorer, 1))


PUBLISHED: dict[str, CcdsCost] = {x.name: x for x in (CcdsBm25(), CcdsEmbedding(), CcdsPerplexity(), CcdsLess())}
