"""Gradient features of the pool and of the target, checkpoint by checkpoint, and their similarities.

Features are computed, compared and freed shard by shard: those of the whole pool are never in memory at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from baselines.gradients.adam_direction import AdamDirection, Recipe
from baselines.gradients.feature_store import FeatureShard, FeatureStore
from baselines.gradients.per_example import PerExample, last_layer, only_last_layer, rows_of
from baselines.gradients.projection import Dimension, Projection, make_projection
from baselines.gradients.warmup import Checkpoint
from baselines.kernels.autocast import Precision
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.operations import normalisation_flops, similarity_flops
from cads.data.batch import Batch
from cads.data.hashing import add_tensors
from cads.data.pool import Pool
from cads.data.token_batches import scoring_batches
from cads.errors import DataError
from cads.runtime.checkpoint import State
from cads.runtime.journal import map_shards, replay_or_run
from cads.runtime.lockstep import StepReporter, map_in_turn
from cads.scoring.pool_scores import BatchPrice
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer

TARGET, POOL, PROJECTIONS, SIMILARITIES = "target gradients", "pool gradients", "projections", "similarities"
TARGET_BATCHES = 64
"""Target batches whose means are in memory at once."""
SHARD_EXAMPLES = 1024
"""Fewest examples of a shard, except the last one: 32 MB of features in 8,192 dimensions."""
COMPARED = 128
"""Examples whose features are widened to double precision at a time: 8 MB in 8,192 dimensions."""


Layers = Literal["all", "last"]


@dataclass(frozen=True)
class GradientFeatureConfig:
    """The options that determine gradient features; fields as in `baselines.less.Less`."""

    recipe: Recipe
    layers: Layers
    precision: Precision
    dimension: Dimension
    batch_tokens: int
    folder: str | None

    def price(self, task: Task) -> BatchPrice:
        """The cost of a batch's gradients: a usage, whose backward pass stops at the last layer if `layers = last`."""
        return (task if self.layers == "all" else only_last_layer(task)).costs.usage


class GradientFeatures:
    """Projected gradients of the examples of a task, checkpoint by checkpoint.

    Args:
        config: options that determine the features. task: its model computes the gradients. model: fresh weights, which
            `load` overwrites. seed: of the projection. ledger: charged for every pass.
    """

    def __init__(self, config: GradientFeatureConfig, task: Task, model: nn.Module, seed: int, ledger: Ledger) -> None:
        self._config, self._task, self._ledger = config, task, ledger
        self._model = model.to(Trainer(task, ledger).accelerator.device)
        self._device = next(model.parameters()).device
        names = last_layer(model) if config.layers == "last" else None
        self._gradients = PerExample(task, self._model, names, config.precision)
        self._size = sum(self._gradients.sizes.values())
        self._price = config.price(task)
        self._projection: Projection = make_projection(
            self._gradients.sizes, config.dimension, derive(seed, "projection"), self._device
        )
        self._projection.check()
        self._pool, self._target = unpacked(task.pool), unpacked(task.target)
        self._shards = FeatureStore(config.folder)
        self._frozen_digest = ""
        if config.folder is not None:
            digest = hashlib.sha256()
            add_tensors(digest, {n: p for n, p in model.named_parameters() if not p.requires_grad})
            self._frozen_digest = digest.hexdigest()
        self._checkpoint: Checkpoint | None = None
        self._direction: AdamDirection | None = None
        self._accumulators = self._projection.empty(0)

    def load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into the model.

        Raises:
            CheckpointError: if the checkpoint lacks moments of Adam that the recipe needs.
        """
        if self._config.recipe != "sgd":
            checkpoint.need_moments()
        checkpoint.load_into(self._model)
        first, second = (
            {name: moment.to(self._device) for name, moment in moments.items()}
            for moments in (checkpoint.first, checkpoint.second)
        )
        self._direction = AdamDirection(self._config.recipe, first, second, checkpoint.steps)
        self._checkpoint = checkpoint

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare the gradients of a target example with autograd's, and charge for it."""
        self.load(checkpoint)

        def compute(_: StepReporter) -> State:
            rows = scoring_batches(self._target, tokens=self._config.batch_tokens)[0]
            batch = self._target.batch(rows)
            with self._ledger.timed(SELECT, TARGET):
                usages = self._gradients.check(batch.to(self._device))
            if usages:
                for stop in (1, usages - 1):
                    self._charge(TARGET, rows_of(batch, 0, stop))
            return State({"batched": self._gradients.batched})

        self.batched = bool(replay_or_run("gradient check", [], self._ledger, compute).values["batched"])

    @property
    def batched(self) -> bool:
        """Whether gradients are taken in batches, as `check` has found."""
        return self._gradients.batched

    @batched.setter
    def batched(self, value: bool) -> None:
        self._gradients.batched = value

    def similarities(self, weights: np.ndarray, name: str) -> np.ndarray:
        """Weighted means of the similarities of each pool example to the target examples, shape (N, G).

        Args:
            weights: weights of the target examples in each mean, shape (G, M). name: label of the checkpoint.
        """
        return self.similarities_to(self.centres(weights), name)

    def similarities_to(self, centres: Tensor, name: str) -> np.ndarray:
        """The similarities of each pool example to the `centres` of the target, shape (N, G)."""
        centres = centres.to(self._device)
        batches = scoring_batches(self._pool, tokens=self._config.batch_tokens)
        shards = _group_batches([len(b) for b in batches])
        identity = [name, len(batches), self._config.recipe, self._projection.dimension]

        def shard(i: int) -> np.ndarray:
            return self._shard_similarities([batches[j] for j in shards[i]], centres)

        in_batch_order = map_shards("similarities", identity, self._ledger, len(shards), shard)
        scores = np.empty_like(in_batch_order)
        scores[np.concatenate(batches)] = in_batch_order
        return scores

    def centres(self, target_weights: np.ndarray) -> Tensor:
        """Weighted means of the target's features, float64, shape (G, d).

        The mean of inner products is the inner product with the mean.

        Args:
            target_weights: weights of the target examples in each mean, shape (G, M).
        """
        weights = torch.from_numpy(target_weights).to(self._device)
        pool, d = self._target, self._projection.dimension
        centres = torch.zeros(len(weights), d, dtype=torch.float64, device=self._device)
        batches = scoring_batches(pool, tokens=self._config.batch_tokens)

        def batch_mean(i: int) -> np.ndarray:
            rows = batches[i]
            features = self._features_of(pool, rows, TARGET, adam=False, ledger=self._ledger)
            mean = weights[:, torch.from_numpy(rows).to(self._device)] @ features.double()
            self._ledger.charge(SELECT, SIMILARITIES, similarity_flops(len(weights), len(rows), d))
            return np.asarray(mean.cpu().numpy())

        for i in range(0, len(batches), TARGET_BATCHES):
            for mean in map_in_turn(self._ledger, range(i, min(i + TARGET_BATCHES, len(batches))), batch_mean):
                centres += torch.from_numpy(mean).to(self._device)
        return centres

    def _shard_similarities(self, batches: Sequence[np.ndarray], centres: Tensor) -> np.ndarray:
        """Similarities of the examples of one shard's batches with the centres, shape (n, G)."""
        pool, rows, d = self._pool, np.concatenate(batches), self._projection.dimension

        def compute() -> FeatureShard:
            shard_ledger = Ledger()
            features = [self._features_of(pool, batch, POOL, adam=True, ledger=shard_ledger) for batch in batches]
            return FeatureShard(
                torch.cat(features).cpu(), {stage: entry for (_, stage), entry in shard_ledger.entries.items()}
            )

        shard = self._shards.get(self._key(rows), len(rows), d, compute)
        # Stored features are charged at their original cost, so that the ledger does not depend on the store.
        for stage, entry in shard.spent.items():
            self._ledger.charge(SELECT, stage, **asdict(entry))
        with self._ledger.timed(SELECT, SIMILARITIES):
            self._ledger.charge(SELECT, SIMILARITIES, similarity_flops(len(rows), len(centres), d))
            parts = [part.double() @ centres.T for part in shard.features.to(self._device).split(COMPARED)]
            return np.asarray(torch.cat(parts).cpu().numpy())

    def _features_of(self, pool: Pool, rows: np.ndarray, stage: str, *, adam: bool, ledger: Ledger) -> Tensor:
        """Projected and normalised gradients (or directions) of some examples, float32, shape (n, d).

        Raises:
            DataError: if a gradient is not finite; the message names the examples.
        """
        assert self._direction is not None
        batch, direction = pool.batch(rows), self._direction
        if len(self._accumulators) < len(rows):
            self._accumulators = self._projection.empty(len(rows))
        # Used again: fresh memory of this size costs as much as the arithmetic.
        features = self._accumulators[: len(rows)].zero_()

        def receive(name: str, start: int, gradient: Tensor) -> None:
            vectors = direction(name, gradient) if adam else gradient
            self._projection.add(name, vectors, features[start : start + len(gradient)])

        with ledger.timed(SELECT, stage):
            self._charge(stage, batch, ledger)
            self._gradients.each(batch.to(self._device), receive)
        lowest, highest = torch.aminmax(features, dim=1)
        finite = (torch.isfinite(lowest) & torch.isfinite(highest)).cpu().numpy()
        if not finite.all():
            ids = pool.ids.take(pa.array(rows[~finite][:5])).to_pylist()
            raise DataError(
                f"the gradients of {int((~finite).sum())} examples of the {pool.name}, such as {ids}, are not finite: "
                "look at these examples, or lower the learning rate of the warm-up"
            )
        ledger.charge(SELECT, PROJECTIONS, self._projection.flops(len(rows)))
        if adam:
            ledger.charge(SELECT, PROJECTIONS, direction.flops(len(rows), self._size))
        ledger.charge(SELECT, SIMILARITIES, normalisation_flops(len(rows), features.shape[1]))
        # A gradient that is exactly zero (a loss of exactly zero) has no direction: its similarity is zero.
        norms = features.norm(dim=1, keepdim=True)
        return features.div_(norms.masked_fill(norms == 0, 1.0)).to(torch.float32, copy=True)

    def _charge(self, stage: str, batch: Batch, ledger: Ledger | None = None) -> None:
        (ledger or self._ledger).charge(
            SELECT,
            stage,
            self._price(batch),
            usages=len(batch),
            tokens=batch.tokens,
            answer_tokens=batch.answer_tokens,
        )

    def _key(self, rows: np.ndarray) -> str:
        """A hash of everything that the features of `rows` and their cost depend on; empty if none are stored."""
        if self._shards.folder is None or self._checkpoint is None:
            return ""
        projection = self._projection
        inputs = [
            self._task.pool.content_hash,
            *self._pool.ids.take(pa.array(rows)).to_pylist(),
            self._checkpoint.content_hash,
            self._frozen_digest,
            self._task.costs.accounting,
            self._config.recipe,
            self._config.precision,
            type(projection).__name__,
            projection.dimension,
            projection.seed,
            sorted(projection.sizes.items()),
            torch.__version__,
        ]
        return hashlib.sha256(repr(inputs).encode()).hexdigest()


def unpacked(pool: Pool) -> Pool:
    """The pool with one example per row: gradients of examples packed into one row cannot be separated."""
    examples: Any = pool.examples
    if not getattr(examples, "packed", False):
        return pool
    return Pool(pool.ids, replace(examples, packed=False), name=pool.name)


def _group_batches(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of consecutive batches, grouped into shards of at least `SHARD_EXAMPLES` examples."""
    shards: list[list[int]] = [[]]
    n_examples = 0
    for i, size in enumerate(sizes):
        if n_examples >= SHARD_EXAMPLES:
            shards.append([])
            n_examples = 0
        shards[-1].append(i)
        n_examples += size
    return shards
