"""Embedding: how close an example is to the target, in the space of an encoder or of the task's own features.

Source: CCDS (arXiv 2410.16208), representation-based selection: the mean cosine to the target examples, which is
`aggregate = mean`; the best mean of a subtask, as in LESS, is the default here. CCDS cuts texts at 256 tokens and takes
the mean over them; here an encoder's own length and pooling hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from baselines.similarity.clusters import ROUNDS, cluster_centres, cluster_sample, nearest_centre, take_turns
from baselines.similarity.encoders import Encoder, FeatureEncoder, SentenceEncoder, backbone_network
from baselines.similarity.queries import mean_weights, subtask_weights
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.operations import kmeans_flops, normalisation_flops, similarity_flops
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.runtime.journal import map_shards
from cads.scoring.pool_scores import check_finite
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes, plan_training, proxy_of, train_on_pool
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer

Aggregate = Literal["subtask", "mean", "max", "top"]
ENCODED_TOKENS = 1024
"""Padded tokens of a batch: an encoder is small, and on a core 1.2 times as fast with these as with 512."""
WARM_UP, ENCODING, COMPARING, CLUSTERING = "warm-up", "embeddings", "similarities", "clusters"


@dataclass
class Embedding(Ranker):
    """Cosine similarity to the target: of sentences, of a backbone's features, or of the task's own features.

    One query a target example. The products are exact, and only one batch of the pool is in memory at a time.
    """

    encoder: str | None = None
    """Texts: a sentence-transformers model, by name or folder; null: no sentence encoder."""
    backbone: str | None = None
    """Images: a classifier of torchvision whose features are compared; null: the features of the task's own model."""
    backbone_size: int | None = None
    """Scale images to this many pixels square for the backbone; null: as they are."""
    pretrained: bool = True
    """Give the backbone torchvision's pretrained weights."""
    download: bool = False
    """Allow torchvision to fetch weights that are missing."""
    warm_up: float = 0.0
    """Train the task's own model for this many passes over the pool first: for models that start from scratch."""
    aggregate: Aggregate = "subtask"
    """Over the target: the best mean of a subtask (without subtasks the mean), mean, max, or the mean of `top`."""
    top: int = 5
    """aggregate = top: how many of the nearest target examples are averaged."""
    clusters: int | None = None
    """Diversity: as many groups of alike examples, by k-means, take turns in the ranking; null: similarity alone."""
    batch_tokens: int = ENCODED_TOKENS
    """Padded tokens of a batch."""

    method: ClassVar[str] = "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_passes(warm_up=self.warm_up)
        if self.aggregate not in get_args(Aggregate):
            raise ConfigError(f"aggregate = {self.aggregate!r}: choose from {list(get_args(Aggregate))}")
        if self.encoder is not None and self.backbone is not None:
            raise ConfigError(f"encoder = {self.encoder!r} and backbone = {self.backbone!r}: give one of them")
        if self.warm_up and not self._own:
            raise ConfigError(f"warm_up = {self.warm_up} trains the task's own model, and another one encodes: give 0")
        for name in ("top", "batch_tokens", "backbone_size", "clusters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        self._made: tuple[Task, Encoder] | None = None

    @property
    def _own(self) -> bool:
        return self.encoder is None and self.backbone is None

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Encode the target, then the pool batch by batch; see `cads.scoring.ranker.Ranker`."""
        scorer = proxy_of(task)
        space = self._space(scorer)
        self._fill(space, scorer, seed, ledger, monitor)
        pool = scorer.pool
        target = self._unit_vectors(space, scorer.target, ledger)
        check_finite(target.sum(dim=1).numpy(), scorer.target, self.method)
        reference = self._reference(scorer, target)
        ledger.charge(SELECT, COMPARING, self._products(scorer, space, len(reference)))
        centres = self._centres(space, pool, seed, ledger)

        def placed(unit: Tensor) -> Tensor:
            """Similarity and cluster of each example of a batch, shape (B, 2)."""
            group = torch.zeros(len(unit)) if centres is None else nearest_centre(unit, centres)
            return torch.stack([self._aggregated(unit @ reference.T), group.double()], dim=1)

        found = np.empty((len(pool), 2))
        found[np.concatenate(space.batches(pool))] = self._encoded(space, pool, ledger, placed)
        score, group = found.T
        check_finite(score, pool, self.method)
        if centres is not None:
            score = take_turns(pool.ids, score, group.astype(np.int64))
        self._made = None
        return self.ranking(task, score, seed=seed, ledger=ledger, pool=pool)

    def rank_plan(self, task: Task) -> PlannedLedger:
        """Padding included; see `cads.scoring.ranker.Ranker`."""
        scorer, ledger = proxy_of(task), PlannedLedger()
        space = self._space(scorer)
        plan_training(scorer, scorer.pool, self.warm_up, ledger, stage=WARM_UP)
        ledger.charge(SELECT, ENCODING, space.flops(scorer.target) + space.flops(scorer.pool))
        references = len(self._weights(scorer)) if self.aggregate in ("subtask", "mean") else len(scorer.target)
        ledger.charge(SELECT, COMPARING, self._products(scorer, space, references))
        if self.clusters is not None:
            sample = cluster_sample(scorer.pool, self.clusters)
            ledger.charge(SELECT, ENCODING, space.flops(sample))
            ledger.charge(SELECT, CLUSTERING, _clustering(self.clusters, len(sample), len(scorer.pool), space))
        ledger.scored.append(scorer)
        return ledger

    def _centres(self, space: Encoder, pool: Pool, seed: int, ledger: Ledger) -> Tensor | None:
        """Of the clusters, shape (K, D), float64; None without."""
        if self.clusters is None:
            return None
        sample = cluster_sample(pool, self.clusters)
        vectors = self._unit_vectors(space, sample, ledger)
        check_finite(vectors.sum(dim=1).numpy(), sample, self.method)
        ledger.charge(SELECT, CLUSTERING, _clustering(self.clusters, len(sample), len(pool), space))
        with ledger.timed(SELECT, CLUSTERING):
            return torch.from_numpy(cluster_centres(vectors.numpy(), self.clusters, derive(seed, "clusters")))

    def _unit_vectors(self, space: Encoder, pool: Pool, ledger: Ledger) -> Tensor:
        """Of all examples of a small pool, shape (M, D), float64; charged."""
        vectors = torch.empty(len(pool), space.dimension, dtype=torch.float64)
        found = self._encoded(space, pool, ledger, lambda unit: unit)
        vectors[np.concatenate(space.batches(pool))] = torch.from_numpy(found)
        return vectors

    def _space(self, task: Task) -> Encoder:
        """The space, kept from the plan to the ranking; without the weights of the task's own model."""
        if self._made is None or self._made[0] is not task:
            space: Encoder
            if self.encoder is not None:
                space = SentenceEncoder(task, self.encoder, self.batch_tokens)
            elif self.backbone is not None:
                with torch.device("meta"):
                    counted = backbone_network(
                        task, self.backbone, self.backbone_size, pretrained=False, download=False
                    )
                space = FeatureEncoder(task, counted, self.batch_tokens)
            else:
                space = FeatureEncoder(task, task.costs.model, self.batch_tokens)
            self._made = task, space
        return self._made[1]

    def _fill(self, space: Encoder, task: Task, seed: int, ledger: Ledger, monitor: Monitor | None) -> None:
        """Give the space its weights."""
        if not isinstance(space, FeatureEncoder):
            return
        if self.backbone is None:
            seeds = [derive(seed, "embedding")] if self.warm_up else [seed]
            space.model = train_on_pool(task, self.warm_up, seeds=seeds, ledger=ledger, monitor=monitor, stage=WARM_UP)[
                0
            ]
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "backbone"))
            network = backbone_network(
                task, self.backbone, self.backbone_size, pretrained=self.pretrained, download=self.download
            )
        space.model = network.to(Trainer(task, ledger).accelerator.device)

    def _encoded(self, space: Encoder, pool: Pool, ledger: Ledger, use: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What `use` makes of the unit vectors (float64) of each batch of a pool, batch after batch; charged."""
        batches = space.batches(pool)

        def shard(i: int) -> np.ndarray:
            with ledger.timed(SELECT, ENCODING):
                encoded = space.encode(pool, batches[i])
                ledger.charge(SELECT, ENCODING, encoded.flops, tokens=encoded.tokens)
                unit = functional.normalize(encoded.vectors.double().cpu(), dim=1)
                return np.asarray(use(unit).numpy())

        return map_shards("encoding", [pool.name, len(pool)], ledger, len(batches), shard)

    def _weights(self, task: Task) -> np.ndarray:
        return subtask_weights(task) if self.aggregate == "subtask" else mean_weights(task)

    def _reference(self, task: Task, target: Tensor) -> Tensor:
        """What pool examples are multiplied with, shape (G, D): means of unit vectors, or all of them.

        The mean cosine to a set is the product with the mean of its unit vectors.
        """
        if self.aggregate in ("max", "top"):
            return target
        return torch.from_numpy(self._weights(task)) @ target

    def _aggregated(self, cosines: Tensor) -> Tensor:
        """One score for each row of cosines (B, G), shape (B,)."""
        if self.aggregate == "top":
            return cosines.topk(min(self.top, cosines.shape[1]), dim=1).values.mean(dim=1)
        return cosines.max(dim=1).values

    def _products(self, task: Task, space: Encoder, n_references: int) -> float:
        """FLOPs of unit vectors, of their means, and of the products."""
        n, m, width = len(task.pool), len(task.target), space.dimension
        means = 2 * m * width if self.aggregate in ("subtask", "mean") else 0
        return normalisation_flops(n + m, width) + means + similarity_flops(n_references, n, width)


def _clustering(count: int, sampled: int, n: int, space: Encoder) -> float:
    """FLOPs of learning as many centres from a sample, and of finding the nearest one to each of n examples."""
    unit, learning = (
        normalisation_flops(sampled, space.dimension),
        kmeans_flops(sampled, count, space.dimension, ROUNDS),
    )
    return unit + learning + similarity_flops(count, n, space.dimension)
