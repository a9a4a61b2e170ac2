"""LESS: train on the examples whose gradients, as Adam would take them, point where the target's point.

Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np

from baselines.gradients.adam_direction import AdamDirection, Recipe
from baselines.gradients.feature_store import FeatureStore
from baselines.gradients.features import (
    POOL,
    PROJECTIONS,
    SIMILARITIES,
    TARGET,
    GradientFeatureConfig,
    GradientFeatures,
    Layers,
    unpacked,
)
from baselines.gradients.per_example import last_layer
from baselines.gradients.projection import Dimension, check_dimension, make_projection
from baselines.gradients.warmup import STAGE, need_adam, planned_flops, schedule, warm_up
from baselines.kernels.autocast import Precision
from baselines.similarity.queries import subtask_weights
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.operations import normalisation_flops, similarity_flops
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.pool_scores import planned_flops as planned_scoring
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import proxy_of
from cads.task import Task

BATCH_TOKENS = 1024
"""Padded tokens in one forward and backward pass."""


@dataclass
class Less(Ranker):
    """LESS: `S = sum_i w_i cos(T_i, Gamma_i)` over checkpoints i of a short warm-up, w_i the mean learning rates.

    T_i are projected gradients of the target, Gamma_i projected Adam directions of the pool; the mean is taken within
    each subtask of the target, then the best subtask counts.
    """

    warmup_share: float = 0.05
    """Share of the pool that the warm-up trains on, at random."""
    checkpoints: int = 4
    """Epochs of the warm-up, each of which leaves a checkpoint."""
    recipe: Recipe = "corrected"
    """corrected: Adam's next step; paper: without bias correction, as released; sgd: plain gradients."""
    dimension: Dimension = "auto"
    """Of the projection; auto: 8192, or none where the gradient has no more entries; null: no projection."""
    layers: Layers = "all"
    """Whose gradients: all trainable layers, or the last one."""
    precision: Precision = "no"
    """Of the passes that gradients are taken in: no (float32) or bf16."""
    batch_tokens: int = BATCH_TOKENS
    """Padded tokens in one pass; examples without a length come in batches of at most 1024."""
    features: str | None = None
    """Folder in which the features of the pool are kept for the next ranking; null: they are not kept."""

    method: ClassVar[str] = "less"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.warmup_share <= 1:
            raise ConfigError(f"warmup_share = {self.warmup_share}: a share of the pool, above 0 and at most 1")
        for name in ("checkpoints", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least 1")
        choices = {"recipe": get_args(Recipe), "layers": get_args(Layers), "precision": get_args(Precision)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(known)}")
        if isinstance(self.dimension, str) and self.dimension != "auto":
            raise ConfigError(f"dimension = {self.dimension!r}: a number, 'auto', or null for no projection")
        FeatureStore(self.features)

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Warm up, take gradients of target and pool at each checkpoint, compare; see `cads.scoring.ranker.Ranker`.

        Raises:
            ConfigError: if the recipe needs Adam and the task has none, or the projection is no projection.
            DataError: if the gradient of an example is not finite.
        """
        scorer = proxy_of(task)
        self._sizes(scorer)
        queries = subtask_weights(scorer)
        plan = schedule(scorer, self.warmup_share, self.checkpoints)
        found = warm_up(scorer, plan, seed=seed, ledger=ledger, monitor=monitor)
        features = GradientFeatures(self.feature_config(), scorer, scorer.model(seed), seed, ledger)
        features.check(found[0])
        rates = np.array([c.rate for c in found])
        weights = rates / rates.sum()
        scores = np.zeros((len(scorer.pool), len(queries)))
        for i, (checkpoint, weight) in enumerate(zip(found, weights, strict=True)):
            features.load(checkpoint)
            scores += weight * features.similarities(queries, f"{i + 1} of {len(found)}")
        notes = {"checkpoint_weights": weights.tolist(), "subtasks": len(queries)}
        return self.ranking(task, scores.max(axis=1), seed=seed, ledger=ledger, pool=scorer.pool, **notes)

    def rank_plan(self, task: Task) -> PlannedLedger:
        """See `cads.scoring.ranker.Ranker`; as if the target had one subtask."""
        scorer = proxy_of(task)
        sizes = self._sizes(scorer)
        size, project = sum(sizes.values()), make_projection(sizes, self.dimension, 0)
        directions = AdamDirection(self.recipe, {}, {}, 0)
        n, m, k = len(scorer.pool), len(scorer.target), self.checkpoints
        plan, ledger = schedule(scorer, self.warmup_share, k), PlannedLedger()
        batch_size = scorer.recipe.batch_size
        usages = k * plan.steps * batch_size
        tokens = scorer.costs.tokens_per_example(scorer.pool)
        ledger.charge(SELECT, STAGE, planned_flops(scorer, plan), usages=usages, tokens=round(usages * tokens))
        price = self.feature_config().price(scorer)
        for stage, part, extra in ((TARGET, unpacked(scorer.target), 1 + min(2, m)), (POOL, unpacked(scorer.pool), 0)):
            flops = planned_scoring(price, part, tokens=self.batch_tokens)
            usages = k * len(part) + extra
            tokens = round(usages * scorer.costs.tokens_per_example(part))
            ledger.charge(SELECT, stage, flops * usages / len(part), usages=usages, tokens=tokens)
        projected = project.flops(m + n) + directions.flops(n, size)
        if projected:
            ledger.charge(SELECT, PROJECTIONS, k * projected)
        compared = normalisation_flops(m + n, project.dimension) + similarity_flops(1, m + n, project.dimension)
        ledger.charge(SELECT, SIMILARITIES, k * compared)
        ledger.trained.append((scorer, 1))
        return ledger

    def feature_config(self) -> GradientFeatureConfig:
        """How the features are made that it compares."""
        return GradientFeatureConfig(
            self.recipe, self.layers, self.precision, self.dimension, self.batch_tokens, self.features
        )

    def _sizes(self, task: Task) -> dict[str, int]:
        """Entries of the parameters whose gradients are taken.

        Raises:
            ConfigError: if the options do not apply to this task.
        """
        if self.recipe != "sgd":
            need_adam(task)
        model = task.costs.model
        names = last_layer(model) if self.layers == "last" else None
        sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
        if not sizes:
            raise ConfigError(f"the model of {task.name} has no trainable parameter to take gradients of")
        if isinstance(self.dimension, int):
            check_dimension(self.dimension, sum(sizes.values()))
        return sizes
