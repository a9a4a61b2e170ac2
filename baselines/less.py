"""LESS: train on the examples whose Adam directions are most similar to the gradients of the target.

Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from baselines.gradients.warmup import Schedule, need_adam, schedule, warm_up
from baselines.kernels.autocast import Precision
from baselines.similarity.pool_losses import check_batch_tokens
from baselines.similarity.queries import subtask_weights
from cads.accounting.ledger import Ledger
from cads.accounting.operations import normalisation_flops, similarity_flops
from cads.data.token_batches import default_tokens
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.pool_scores import planned_flops
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.scoring.stages import Priced, RankingStage
from cads.task import Task

BATCH_TOKENS = 1024
"""Padded tokens in one forward and backward pass on a CPU."""


@dataclass
class Less(Ranker):
    """LESS: `S = sum_i w_i cos(T_i, Gamma_i)` over checkpoints i of a short warm-up, w_i the mean learning rates.

    T_i are projected gradients of the target, Gamma_i projected Adam directions of the pool. Similarities are averaged
    within each subtask of the target; the score is the best of these means.
    """

    warmup_share: float = 0.05
    """Share of the pool, drawn at random, that the warm-up trains on."""
    checkpoints: int = 4
    """Epochs of the warm-up; each ends with a checkpoint."""
    recipe: Recipe = "corrected"
    """corrected: Adam's next step; paper: without bias correction, as released; sgd: plain gradients."""
    dimension: Dimension = "auto"
    """Dimension of the projection; auto: 8192, or none if the gradient has no more entries; null: no projection."""
    layers: Layers = "all"
    """Layers whose gradients are used: all trainable layers, or the last one."""
    precision: Precision = "no"
    """Precision of the forward and backward passes: no (float32) or bf16."""
    batch_tokens: int | None = None
    """Padded tokens in one pass; null: as many as suit the device, 1024 on a CPU."""
    features: str | None = None
    """Folder that stores the features of the pool for later rankings; null: they are not stored."""

    method: ClassVar[str] = "less"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.warmup_share <= 1:
            raise ConfigError(f"warmup_share = {self.warmup_share}: a share of the pool, above 0 and at most 1")
        if self.checkpoints < 1:
            raise ConfigError(f"checkpoints = {self.checkpoints}: it must be at least 1")
        check_batch_tokens(self.batch_tokens)
        choices = {"recipe": get_args(Recipe), "layers": get_args(Layers), "precision": get_args(Precision)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(allowed)}")
        if isinstance(self.dimension, str) and self.dimension != "auto":
            raise ConfigError(f"dimension = {self.dimension!r}: a number, 'auto', or null for no projection")
        FeatureStore(self.features)

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Warm up, take gradients of target and pool at each checkpoint, compare; see `cads.scoring.ranker.Ranker`.

        Raises:
            ConfigError: if the recipe needs Adam and the task has none, or `dimension` is out of range.
            DataError: if the gradient of an example is not finite.
        """
        scorer = self.scorer_of(task)
        self.sizes(scorer)
        queries = subtask_weights(scorer)
        checkpoints = warm_up(scorer, self._warm_up(scorer), seed=seed, ledger=ledger, monitor=monitor)
        features = GradientFeatures(self.feature_config(), scorer, scorer.model(seed), seed, ledger)
        features.check(checkpoints[0])
        rates = np.array([c.rate for c in checkpoints])
        weights = rates / rates.sum()
        scores = np.zeros((len(scorer.pool), len(queries)))
        for i, (checkpoint, weight) in enumerate(zip(checkpoints, weights, strict=True)):
            features.load(checkpoint)
            scores += weight * features.similarities(queries, f"{i + 1} of {len(checkpoints)}")
        notes = {"checkpoint_weights": weights.tolist(), "subtasks": len(queries)}
        return self.ranking(task, scores.max(axis=1), seed=seed, ledger=ledger, pool=scorer.pool, **notes)

    def stages(self, scorer: Task) -> Sequence[RankingStage]:
        """Gradients and similarities of all checkpoints, priced as if the target had one subtask.

        `rank` charges for them batch by batch. See `cads.scoring.ranker.Ranker`.
        """
        sizes = self.sizes(scorer)
        n_entries, projection = sum(sizes.values()), make_projection(sizes, self.dimension, 0)
        directions = AdamDirection(self.recipe, {}, {}, 0)
        n, m, k = len(scorer.pool), len(scorer.target), self.checkpoints
        stages: list[RankingStage] = [self._warm_up(scorer)]
        batch_price = self.feature_config().price(scorer)
        for name, examples, check_usages in (
            (TARGET, unpacked(scorer.target), 1 + min(2, m)),
            (POOL, unpacked(scorer.pool), 0),
        ):
            flops = planned_flops(batch_price, examples, tokens=self._tokens)
            usages = k * len(examples) + check_usages
            tokens = round(usages * scorer.costs.tokens_per_example(examples))
            stages.append(Priced(name, flops * usages / len(examples), usages, tokens))
        projection_flops = projection.flops(m + n) + directions.flops(n, n_entries)
        if projection_flops:
            stages.append(Priced(PROJECTIONS, k * projection_flops))
        comparison_flops = normalisation_flops(m + n, projection.dimension) + similarity_flops(
            1, m + n, projection.dimension
        )
        return [*stages, Priced(SIMILARITIES, k * comparison_flops)]

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.gradients import ShardedGradients

        if self.features is not None:
            raise not_sharded(self.method, "the features of shards are not stored; leave out the option features")
        return ShardedGradients(self, asdict(self))

    def feature_config(self) -> GradientFeatureConfig:
        """The options that determine the features."""
        return GradientFeatureConfig(
            self.recipe, self.layers, self.precision, self.dimension, self._tokens, self.features
        )

    @property
    def _tokens(self) -> int:
        return default_tokens(BATCH_TOKENS) if self.batch_tokens is None else self.batch_tokens

    def _warm_up(self, scorer: Task) -> Schedule:
        return schedule(scorer, self.warmup_share, self.checkpoints)

    def sizes(self, task: Task) -> dict[str, int]:
        """Number of entries of each parameter whose gradients are taken, by name.

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
