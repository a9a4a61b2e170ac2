"""submodlib: targeted facility location on the features of a model of the target.

    f(A) = sum_{i in Q} max_{j in A} s_ij + eta sum_{j in A} max_{i in Q} s_ij

is the variant mutual information of facility location (Kothawade et al., AAAI 2022, arXiv 2103.00128): the subset A of
the pool stands for the target Q, and each of its examples is like one of them. Memory is linear in the pool: only
similarities to a sample of the target are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cads.accounting.ledger import Ledger
from cads.errors import ConfigError
from cads.scoring.stages import Priced, RankingStage, ReadPool, TrainOnTarget
from cads.seeding import derive
from cads.task import Task
from experiments.rivals.packages import import_package
from experiments.rivals.subset import SubsetRival, feature_width, labels_of, read_rows, target_model, theta_seed

QUERIES = 256
"""Most examples of the target that the subset stands for."""
READING, READING_TARGET, SIMILARITIES = "features", "features of the target", "similarities"


@dataclass
class FacilityLocation(SubsetRival):
    """Greedy maximisation with submodlib. Examples of different classes have the similarity 0."""

    fraction: float = 0.5
    """Share of the pool that is kept."""
    passes: float = 16.0
    """Most passes of the model over the target."""

    method: ClassVar[str] = "facility-location"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 1:
            raise ConfigError(f"fraction = {self.fraction}: a share of the pool, above 0 and below 1")

    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """See `SubsetRival`."""
        return self._theta(task, flops), ReadPool(READING), *self._priced(task)

    def choose(self, task: Task, flops: float, seed: int, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """See `SubsetRival`; the score falls with the turn in which an example is taken."""
        theta = self._theta(task, flops).run(task, seed=theta_seed(seed), ledger=ledger)
        queries = self._queries(task, seed)
        pool = read_rows(task, task.pool, theta, task.features, ledger=ledger, stage=READING)
        target = read_rows(
            task, task.target, theta, task.features, ledger=ledger, stage=READING_TARGET, positions=queries
        )
        self._priced(task)[1].charge(task, ledger)
        same = labels_of(task, task.pool)[:, None] == labels_of(task, task.target)[queries]
        similarity = np.where(same, np.clip(_unit(pool) @ _unit(target).T, 0, None), 0.0)
        order = self._greedy(similarity, max(1, round(self.fraction * len(pool))))
        score = np.zeros(len(pool))
        score[order] = np.arange(len(order), 0, -1) / len(order)
        return score > 0, score

    def load(self) -> None:
        """See `SubsetRival`."""
        import_package("submodlib", "submodlib-py")

    def _theta(self, task: Task, flops: float) -> TrainOnTarget:
        return target_model(task, self.passes, flops - sum(stage.flops for stage in self._priced(task)))

    @staticmethod
    def _priced(task: Task) -> tuple[Priced, Priced]:
        """Reading the queries, and the similarities of the pool to them."""
        count = min(QUERIES, len(task.target))
        reading = task.costs.forward_pool(task.target) / len(task.target) * count
        products = 2.0 * len(task.pool) * count * feature_width(task)
        return Priced(READING_TARGET, reading), Priced(SIMILARITIES, products)

    def _queries(self, task: Task, seed: int) -> np.ndarray:
        count = min(QUERIES, len(task.target))
        return np.sort(np.random.default_rng(derive(seed, "queries")).permutation(len(task.target))[:count])

    @staticmethod
    def _greedy(similarity: np.ndarray, count: int) -> np.ndarray:
        """Positions in the order in which they are taken, shape (count,), of similarities (N, Q)."""
        submodlib = import_package("submodlib", "submodlib-py")
        function = submodlib.FacilityLocationVariantMutualInformationFunction(
            n=similarity.shape[0], num_queries=similarity.shape[1], query_sijs=similarity
        )
        taken = function.maximize(budget=count, optimizer="LazyGreedy", show_progress=False)
        return np.array([position for position, _ in taken], dtype=np.int64)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero rows stay."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
