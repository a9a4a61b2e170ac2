"""Embedding: the similarity of an example to the target, in the features of an encoder or of the task's own model.

Source: CCDS (arXiv 2410.16208), representation-based selection by the mean cosine to the target examples, which is
`aggregate = mean`. The default here is the best of the subtasks' means, as in LESS. CCDS truncates texts at 256 tokens
and averages the token vectors; here the encoder's own maximum length and pooling apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from baselines.similarity.clusters import ROUNDS, cluster_centres, cluster_sample, nearest_centre, take_turns
from baselines.similarity.encoders import (
    COMPARING,
    ENCODING,
    Encoder,
    FeatureEncoder,
    SentenceEncoder,
    backbone_network,
)
from baselines.similarity.queries import mean_weights, subtask_weights
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.operations import kmeans_flops, normalisation_flops, similarity_flops
from cads.data.pool import Pool
from cads.data.token_batches import default_tokens
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.runtime.journal import map_shards
from cads.scoring.pool_scores import check_finite
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.scoring.stages import Priced, RankingStage, TrainOnPool
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer

Aggregate = Literal["subtask", "mean", "max", "top"]
ENCODED_TOKENS = 1024
"""Padded tokens of a batch on a CPU: an encoder is small, and on one core 1.2 times as fast with 1024 as with 512."""
WARM_UP, CLUSTERING = "warm-up", "clusters"


@dataclass
class Embedding(Ranker):
    """Cosine similarity to the target: of sentence embeddings, of a backbone's features, or of the task's own features.

    Each target example is one query. Similarities are exact. Only one batch of the pool is in memory at a time.
    """

    encoder: str | None = None
    """For texts: a sentence-transformers model, by name or folder; null: no sentence encoder."""
    backbone: str | None = None
    """For images: a torchvision classifier whose features are compared; null: the features of the task's own model."""
    backbone_size: int | None = None
    """Side in pixels of the square that images are scaled to for the backbone; null: no scaling."""
    pretrained: bool = True
    """Load torchvision's pretrained weights into the backbone."""
    download: bool = False
    """Allow torchvision to download missing weights."""
    warm_up: float = 0.0
    """Passes over the pool that the task's own model is first trained for: for models that start from scratch."""
    aggregate: Aggregate = "subtask"
    """Over the target: the best of the subtasks' means (without subtasks the mean), mean, max, or the mean of `top`."""
    top: int = 5
    """With aggregate = top: how many of the nearest target examples are averaged."""
    clusters: int | None = None
    """Diversity: number of k-means clusters that take turns in the ranking; null: rank by similarity alone."""
    batch_tokens: int | None = None
    """Padded tokens of a batch; null: as many as suit the device, 1024 on a CPU."""

    method: ClassVar[str] = "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_passes(warm_up=self.warm_up)
        if self.aggregate not in get_args(Aggregate):
            raise ConfigError(f"aggregate = {self.aggregate!r}: choose from {list(get_args(Aggregate))}")
        if self.encoder is not None and self.backbone is not None:
            raise ConfigError(f"encoder = {self.encoder!r} and backbone = {self.backbone!r}: give one of them")
        if self.warm_up and not self._uses_task_model:
            raise ConfigError(f"warm_up = {self.warm_up} trains the task's own model, and another one encodes: give 0")
        for name in ("top", "batch_tokens", "backbone_size", "clusters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        self._cached: tuple[Task, Encoder] | None = None

    @property
    def _uses_task_model(self) -> bool:
        return self.encoder is None and self.backbone is None

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Encode the target, then the pool batch by batch; see `cads.scoring.ranker.Ranker`."""
        scorer = self.scorer_of(task)
        encoder = self.encoder_for(scorer)
        self.load_weights(encoder, scorer, seed, ledger, monitor)
        pool = scorer.pool
        target = self.unit_vectors(encoder, scorer.target, ledger)
        check_finite(target.sum(dim=1).numpy(), scorer.target, self.method)
        reference = self.reference(scorer, target)
        self.comparing(scorer, encoder, len(scorer.pool)).charge(scorer, ledger)
        centres = self._centres(encoder, scorer, seed, ledger)

        def score_and_cluster(unit: Tensor) -> Tensor:
            """Similarity and cluster index of each example of a batch, shape (B, 2)."""
            cluster = torch.zeros(len(unit)) if centres is None else nearest_centre(unit, centres)
            return torch.stack([self.aggregated(unit @ reference.T), cluster.double()], dim=1)

        results = np.empty((len(pool), 2))
        results[np.concatenate(encoder.batches(pool))] = self.encoded(encoder, pool, ledger, score_and_cluster)
        score, cluster = results.T
        check_finite(score, pool, self.method)
        if centres is not None:
            score = take_turns(pool.ids, score, cluster.astype(np.int64))
        self._cached = None
        return self.ranking(task, score, seed=seed, ledger=ledger, pool=pool)

    def stages(self, scorer: Task) -> Sequence[RankingStage]:
        """Padding included; see `cads.scoring.ranker.Ranker`."""
        encoder = self.encoder_for(scorer)
        pools, clustering = [scorer.target, scorer.pool], []
        if self.clusters is not None:
            sample = cluster_sample(scorer.pool, self.clusters)
            pools.append(sample)
            clustering.append(_clustering(self.clusters, len(sample), len(scorer.pool), encoder))
        return [
            self._warming,
            _Encoding(encoder, pools),
            self.comparing(scorer, encoder, len(scorer.pool)),
            *clustering,
        ]

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.vectors import ShardedVectors

        if self.clusters is not None:
            raise not_sharded(self.method, f"clusters = {self.clusters} are those of the whole pool; leave them out")
        if self.warm_up:
            raise not_sharded(self.method, f"warm_up = {self.warm_up} trains on the whole pool; give 0")
        return ShardedVectors(self, asdict(self))

    @property
    def _warming(self) -> TrainOnPool:
        return TrainOnPool(WARM_UP, self.warm_up)

    def comparing(self, task: Task, encoder: Encoder, n: int) -> Priced:
        """Normalising the vectors of the target and of n examples, the target's means, and the inner products."""
        m, width = len(task.target), encoder.dimension
        averaged = self.aggregate in ("subtask", "mean")
        n_references = len(self._weights(task)) if averaged else m
        means = 2 * m * width if averaged else 0
        flops = normalisation_flops(n + m, width) + means + similarity_flops(n_references, n, width)
        return Priced(COMPARING, flops)

    def _centres(self, encoder: Encoder, task: Task, seed: int, ledger: Ledger) -> Tensor | None:
        """Centres of the clusters, shape (K, D), float64; None without clusters."""
        if self.clusters is None:
            return None
        sample = cluster_sample(task.pool, self.clusters)
        vectors = self.unit_vectors(encoder, sample, ledger)
        check_finite(vectors.sum(dim=1).numpy(), sample, self.method)
        _clustering(self.clusters, len(sample), len(task.pool), encoder).charge(task, ledger)
        with ledger.timed(SELECT, CLUSTERING):
            return torch.from_numpy(cluster_centres(vectors.numpy(), self.clusters, derive(seed, "clusters")))

    def unit_vectors(self, encoder: Encoder, pool: Pool, ledger: Ledger) -> Tensor:
        """Unit vectors of all examples of a small pool, shape (M, D), float64; charges the ledger."""
        vectors = torch.empty(len(pool), encoder.dimension, dtype=torch.float64)
        results = self.encoded(encoder, pool, ledger, lambda unit: unit)
        vectors[np.concatenate(encoder.batches(pool))] = torch.from_numpy(results)
        return vectors

    def encoder_for(self, task: Task) -> Encoder:
        """The encoder, cached between the plan and the ranking; `load_weights` gives a `FeatureEncoder` its model."""
        if self._cached is None or self._cached[0] is not task:
            encoder: Encoder
            tokens = default_tokens(ENCODED_TOKENS) if self.batch_tokens is None else self.batch_tokens
            if self.encoder is not None:
                encoder = SentenceEncoder(task, self.encoder, tokens)
            elif self.backbone is not None:
                with torch.device("meta"):
                    meta_network = backbone_network(
                        task, self.backbone, self.backbone_size, pretrained=False, download=False
                    )
                encoder = FeatureEncoder(task, meta_network, tokens)
            else:
                encoder = FeatureEncoder(task, task.costs.model, tokens)
            self._cached = task, encoder
        return self._cached[1]

    def load_weights(self, encoder: Encoder, task: Task, seed: int, ledger: Ledger, monitor: Monitor | None) -> None:
        """Train or load the model of a `FeatureEncoder`; a `SentenceEncoder` is loaded already."""
        if not isinstance(encoder, FeatureEncoder):
            return
        if self.backbone is None:
            seeds = [derive(seed, "embedding")] if self.warm_up else [seed]
            encoder.model = self._warming.run(task, seeds=seeds, ledger=ledger, monitor=monitor)[0]
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "backbone"))
            network = backbone_network(
                task, self.backbone, self.backbone_size, pretrained=self.pretrained, download=self.download
            )
        encoder.model = network.to(Trainer(task, ledger).accelerator.device)

    def encoded(
        self, encoder: Encoder, pool: Pool, ledger: Ledger, transform: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        """The outputs of `transform` on the unit vectors (float64) of each batch, in batch order; charges `ledger`."""
        batches = encoder.batches(pool)

        def shard(i: int) -> np.ndarray:
            with ledger.timed(SELECT, ENCODING):
                encoded = encoder.encode(pool, batches[i])
                ledger.charge(SELECT, ENCODING, encoded.flops, tokens=encoded.tokens)
                unit = functional.normalize(encoded.vectors.double().cpu(), dim=1)
                return np.asarray(transform(unit).numpy())

        return map_shards("encoding", [pool.name, len(pool)], ledger, len(batches), shard)

    def _weights(self, task: Task) -> np.ndarray:
        return subtask_weights(task) if self.aggregate == "subtask" else mean_weights(task)

    def reference(self, task: Task, target: Tensor) -> Tensor:
        """The vectors that pool examples are compared with, shape (G, D): means of unit vectors, or all target vectors.

        The mean cosine to a set is the inner product with the mean of its unit vectors.
        """
        if self.aggregate in ("max", "top"):
            return target
        return torch.from_numpy(self._weights(task)) @ target

    def aggregated(self, cosines: Tensor) -> Tensor:
        """One score for each row of cosines (B, G), shape (B,)."""
        if self.aggregate == "top":
            return cosines.topk(min(self.top, cosines.shape[1]), dim=1).values.mean(dim=1)
        return cosines.max(dim=1).values


@dataclass(frozen=True)
class _Encoding:
    """Encode all examples of some pools, as `Embedding.encoded` does."""

    encoder: Encoder
    pools: Sequence[Pool]

    def charge(self, task: Task, ledger: PlannedLedger) -> None:
        """Padding included; see `cads.scoring.stages.Stage`."""
        ledger.charge(SELECT, ENCODING, sum(self.encoder.flops(pool) for pool in self.pools))
        ledger.scored.append(task)


def _clustering(n_clusters: int, n_sampled: int, n: int, encoder: Encoder) -> Priced:
    """Learning `n_clusters` centres from a sample, and finding the nearest one for each of n examples."""
    unit, learning = (
        normalisation_flops(n_sampled, encoder.dimension),
        kmeans_flops(n_sampled, n_clusters, encoder.dimension, ROUNDS),
    )
    return Priced(CLUSTERING, unit + learning + similarity_flops(n_clusters, n, encoder.dimension))
