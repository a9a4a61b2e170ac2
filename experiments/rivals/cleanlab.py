"""cleanlab: drops the label issues that confident learning finds (Northcutt et al., JAIR 2021, arXiv 1911.00068).

It needs class probabilities of models that have not seen the label. The usual ones are those of k-fold
cross-validation on the pool; a model of the target has seen no label of the pool either.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cads.accounting.ledger import ROUNDING, SELECT, Ledger
from cads.data.streams import ShuffledStream
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, DataError
from cads.scoring.pool_scores import planned_flops
from cads.scoring.stages import Priced, RankingStage, ReadPool
from cads.seeding import derive
from cads.task import Task
from cads.training.trainer import Trainer
from experiments.rivals.packages import import_package
from experiments.rivals.subset import (
    SubsetRival,
    affordable_passes,
    class_probabilities,
    labels_of,
    read_rows,
    target_model,
    theta_seed,
)

FOLDS, READING = "folds", "probabilities"


@dataclass
class Cleanlab(SubsetRival):
    """Keeps what `cleanlab.filter.find_label_issues` does not name, with its default settings."""

    def choose(self, task: Task, flops: float, seed: int, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """See `SubsetRival`."""
        labels = labels_of(task, task.pool)
        probabilities = self.probabilities(task, flops, seed, ledger)
        kept = ~import_package("cleanlab.filter", "cleanlab").find_label_issues(labels, probabilities, n_jobs=1)
        if not kept.any():
            kept[:] = True
        score = import_package("cleanlab.rank", "cleanlab").get_label_quality_scores(labels, probabilities)
        return kept, np.asarray(score)

    def load(self) -> None:
        """See `SubsetRival`."""
        import_package("cleanlab.filter", "cleanlab")

    @abstractmethod
    def probabilities(self, task: Task, flops: float, seed: int, ledger: Ledger) -> np.ndarray:
        """Of the classes of each pool example, by a model that has not seen its label, shape (N, C)."""


@dataclass
class CleanlabFolds(Cleanlab):
    """Probabilities of k-fold cross-validation on the pool."""

    folds: int = 3
    """k."""
    passes: float = 8.0
    """Most passes of each model over its folds."""

    method: ClassVar[str] = "cleanlab-folds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise ConfigError(f"folds = {self.folds}: it must be at least 2")

    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """See `SubsetRival`."""
        steps, step = self._steps(task, flops)
        usages = self.folds * steps * task.recipe.batch_size
        return Priced(FOLDS, self.folds * steps * step, usages), ReadPool(READING)

    def probabilities(self, task: Task, flops: float, seed: int, ledger: Ledger) -> np.ndarray:
        """See `Cleanlab`."""
        steps, step = self._steps(task, flops)
        fold = folds_of(labels_of(task, task.pool), by_id(task.pool), self.folds, derive(seed, "folds"))
        order = by_id(task.pool)
        streams = [ShuffledStream(order[fold[order] != k], derive(seed, "order", k)) for k in range(self.folds)]
        fit = Trainer(task, ledger).fit_replicas(
            [task.model(derive(seed, "fold", k)) for k in range(self.folds)],
            BatchStream(task.pool, streams, task.recipe.batch_size),
            steps * step * ROUNDING,
            seed=seed,
            phase=SELECT,
            stage=FOLDS,
        )
        if fit.diverged.any():
            raise DataError("cross-validation met a loss that is not finite: lower the learning rate")
        rows = np.empty((len(task.pool), len(task.classes)))
        for k, model in enumerate(fit.models):
            held_out = np.flatnonzero(fold == k)
            rows[held_out] = read_rows(
                task,
                task.pool,
                model,
                lambda m, batch: class_probabilities(task, m, batch),
                ledger=ledger,
                stage=READING,
                positions=held_out,
            )
        return rows

    def _steps(self, task: Task, flops: float) -> tuple[int, float]:
        """The steps of each model, and what one costs."""
        batch_size = task.recipe.batch_size
        step = task.costs.per_usage(task.pool, batch_size) * batch_size
        training = flops - planned_flops(task.costs.forward, task.pool)
        in_folds = self.passes * (1 - 1 / self.folds)
        passes = affordable_passes(task, task.pool, in_folds, training, self.folds)
        return max(1, int(passes * len(task.pool) / batch_size + 1e-9)), step


@dataclass
class CleanlabTarget(Cleanlab):
    """Probabilities of a model that is trained on the target."""

    passes: float = 16.0
    """Most passes over the target."""

    method: ClassVar[str] = "cleanlab-target"

    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """See `SubsetRival`."""
        return target_model(task, self.passes, flops), ReadPool(READING)

    def probabilities(self, task: Task, flops: float, seed: int, ledger: Ledger) -> np.ndarray:
        """See `Cleanlab`."""
        theta = target_model(task, self.passes, flops).run(task, seed=theta_seed(seed), ledger=ledger)
        return read_rows(
            task,
            task.pool,
            theta,
            lambda m, batch: class_probabilities(task, m, batch),
            ledger=ledger,
            stage=READING,
        )


def folds_of(labels: np.ndarray, order: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A fold for each example, each class spread evenly over the folds, int64, shape (N,).

    Args:
        labels: shape (N,). order: positions in the order of ids, so that a permuted pool gives the same folds.
    """
    shuffled = order[np.random.default_rng(seed).permutation(len(order))]
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[by_class] = np.arange(len(labels)) % count
    return fold
