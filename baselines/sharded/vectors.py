"""Embeddings file by file: the target is encoded once, and each file is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from baselines.similarity.encoders import COMPARING, ENCODING, Encoder
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.operations import normalisation_flops, similarity_flops
from cads.data.pool import Pool
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.scoring.pool_scores import check_finite
from cads.scoring.reference_models import in_pool_order, proxy_of
from cads.scoring.sharded import ShardedScoring, Values
from cads.scoring.stages import Priced
from cads.task import Task

REFERENCE = "reference"


class VectorSettings(Protocol):
    """What is asked of `baselines.embedding.Embedding`."""

    method: ClassVar[str]

    @property
    def cut(self) -> Cut:
        """How its ranking is cut."""
        ...

    def encoder_for(self, task: Task) -> Encoder:
        """The encoder."""
        ...

    def load_weights(self, encoder: Encoder, task: Task, seed: int, ledger: Ledger, monitor: Monitor | None) -> None:
        """Load its model."""
        ...

    def unit_vectors(self, encoder: Encoder, pool: Pool, ledger: Ledger) -> Tensor:
        """Unit vectors of a small pool, shape (M, D)."""
        ...

    def reference(self, task: Task, target: Tensor) -> Tensor:
        """What examples are compared with, shape (G, D)."""
        ...

    def comparing(self, task: Task, encoder: Encoder, n: int) -> Priced:
        """The cost of comparing n examples, and of the target."""
        ...

    def aggregated(self, cosines: Tensor) -> Tensor:
        """One score for each row, shape (B,)."""
        ...

    def encoded(
        self, encoder: Encoder, pool: Pool, ledger: Ledger, transform: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        """The outputs of `transform`, in batch order."""
        ...


class ShardedVectors(ShardedScoring):
    """Similarities to the target, as those of `Embedding.rank`."""

    def __init__(self, embedding: VectorSettings, config: dict[str, Any]) -> None:
        super().__init__(embedding.method, config, embedding.cut)
        self._embedding = embedding

    def prepare(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> State:
        """Encode the target."""
        scorer = proxy_of(task)
        encoder = self._encoder(scorer, seed)
        vectors = self._embedding.unit_vectors(encoder, scorer.target, ledger)
        check_finite(vectors.sum(dim=1).numpy(), scorer.target, self.method)
        self._embedding.comparing(scorer, encoder, 0).charge(scorer, ledger)
        return State({}, {REFERENCE: self._embedding.reference(scorer, vectors).contiguous()})

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """See `ShardedScoring`."""
        encoder, reference = self._encoder(proxy_of(task), seed), state.tensors[REFERENCE]
        width = encoder.dimension

        def values(part: Task, ledger: Ledger) -> np.ndarray:
            pool = proxy_of(part).pool
            flops = normalisation_flops(len(pool), width) + similarity_flops(len(reference), len(pool), width)
            ledger.charge(SELECT, COMPARING, flops)
            found = self._embedding.encoded(
                encoder, pool, ledger, lambda unit: self._embedding.aggregated(unit @ reference.T)
            )
            scores = np.empty(len(pool))
            scores[np.concatenate(encoder.batches(pool))] = found
            return in_pool_order(scores, pool, part.pool)

        return values

    def plan(self, task: Task) -> PlannedLedger:
        """Encoding the pool."""
        ledger, scorer = PlannedLedger(), proxy_of(task)
        ledger.charge(SELECT, ENCODING, self._embedding.encoder_for(scorer).flops(scorer.pool))
        return ledger

    def _encoder(self, scorer: Task, seed: int) -> Encoder:
        encoder = self._embedding.encoder_for(scorer)
        self._embedding.load_weights(encoder, scorer, seed, Ledger(), None)
        return encoder
