"""DataCull's prunings: CCS and TDDS, which prune once, and its own RCAP, which prunes anew in every epoch.

CCS (Zheng et al., ICLR 2023) cuts the examples with the smallest margins, and keeps some of each stratum of the rest.
TDDS (Zhang et al., CVPR 2024) keeps those whose predictions change most unevenly. Both score by the predictions of a
model while it trains on the pool, as DataCull logs them. RCAP (Hassan et al., 2025) draws hard examples more often,
within each class. None of the three knows the target. RS2 and MetriQ, which draw at random, are left out.
"""

from __future__ import annotations

import copy
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cads.accounting.ledger import Ledger
from cads.data.balanced_stream import balanced_stream
from cads.data.batch import Batch
from cads.data.streams import Stream
from cads.data.token_batches import by_id
from cads.errors import NotAffordableError
from cads.scoring.stages import RankingStage, TrainOnPool
from cads.seeding import derive
from cads.task import Task
from experiments.rivals.online_rule import OnlineRider, OnlineRule, OnlineRun
from experiments.rivals.packages import import_package, reproducible
from experiments.rivals.subset import SubsetRival, affordable_passes, labels_of

PACKAGE = "datacull"
HARDEST = 0.2
"""beta of CCS, the share of the pool with the smallest margins, which is cut."""
STRATA = 50
"""Of CCS."""
DECAY, WINDOW = 0.9, 10
"""Of TDDS: weight of the last window, and epochs in it at most."""
TEMPERATURE = 1.0
"""beta of RCAP."""


class _Labels(Dataset[tuple[int, int]]):
    """What DataCull reads of a data set: its labels."""

    def __init__(self, labels: np.ndarray) -> None:
        self.targets = labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.targets[index])


@dataclass
class Culled(SubsetRival):
    """Keeps half of the pool, by the predictions of each epoch of one model."""

    fraction: float = 0.5
    """Share of the pool that is kept."""
    epochs: int = 10
    """Most epochs of the model."""

    fewest_epochs: ClassVar[int] = 1

    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """See `SubsetRival`."""
        return (self._training(task, flops)[0],)

    def choose(self, task: Task, flops: float, seed: int, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """See `SubsetRival`."""
        stage, epochs = self._training(task, flops)
        logits = _logged(task, stage, epochs, derive(seed, "pool model"), ledger)
        order, dataset = _ordered(task)
        with reproducible(derive(seed, "prune")), tempfile.TemporaryDirectory() as folder:
            logger = import_package(PACKAGE, PACKAGE).DCLogger(f"{folder}/")
            for epoch, rows in enumerate(logits):
                logger.log_metric(epoch, torch.arange(len(order)), rows[order])
            importance = np.asarray(self.importance(dataset, logger, epochs), dtype=np.float64)
            loader = self.loader(dataset)
            loader.resample(importance)
        kept, score = np.zeros(len(order), dtype=bool), np.empty(len(order))
        kept[order[np.array(loader.subset_indices)]] = True
        score[order] = importance
        return kept, score

    def load(self) -> None:
        """See `SubsetRival`."""
        import_package(PACKAGE, PACKAGE)

    @abstractmethod
    def importance(self, dataset: Any, logger: Any, epochs: int) -> np.ndarray:
        """Of each example, from the logged predictions, shape (N,)."""

    @abstractmethod
    def loader(self, dataset: Any) -> Any:
        """What prunes by importance."""

    def _training(self, task: Task, flops: float) -> tuple[TrainOnPool, int]:
        """The model's training, and how many whole epochs it has."""
        size, batch_size = len(task.pool), task.recipe.batch_size
        passes = affordable_passes(task, task.pool, self.epochs + batch_size / size, flops)
        epochs = min(self.epochs, int(passes + 1e-9))
        if epochs < self.fewest_epochs:
            raise NotAffordableError(f"the share of the budget does not buy {self.fewest_epochs} epochs of the pool")
        steps = min(-(-epochs * size // batch_size), round(passes * size / batch_size))
        return TrainOnPool("pool model", steps * batch_size / size), epochs


@dataclass
class Ccs(Culled):
    """Coverage-centric coreset selection, by the area under the margin (AUM)."""

    method: ClassVar[str] = "datacull-ccs"

    def importance(self, dataset: Any, logger: Any, epochs: int) -> np.ndarray:
        """See `Culled`."""
        scores = import_package(PACKAGE, PACKAGE).AUMImportance(dataset, epochs, logger).compute_importance()
        return np.asarray(scores)

    def loader(self, dataset: Any) -> Any:
        """See `Culled`."""
        return import_package(PACKAGE, PACKAGE).CCSDataLoader(dataset, self.fraction, beta=HARDEST, num_strata=STRATA)


@dataclass
class Tdds(Culled):
    """Temporal dual-depth scoring."""

    method: ClassVar[str] = "datacull-tdds"
    fewest_epochs: ClassVar[int] = 3

    def importance(self, dataset: Any, logger: Any, epochs: int) -> np.ndarray:
        """See `Culled`. A window is shorter than the run, and has two changes at least."""
        tdds, window = import_package(PACKAGE, PACKAGE).TDDSImportance, max(3, min(WINDOW, epochs // 2))
        return np.asarray(tdds(dataset, epochs, window, DECAY, logger).compute_importance())

    def loader(self, dataset: Any) -> Any:
        """See `Culled`."""
        return import_package(PACKAGE, PACKAGE).TDDSDataLoader(dataset, self.fraction)


def _logged(task: Task, stage: TrainOnPool, epochs: int, seed: int, ledger: Ledger) -> list[Tensor]:
    """The logits of each pool example at its turn in each epoch, of shape (N, C) each."""
    positions: list[Tensor] = []
    logits: list[Tensor] = []

    def losses(model: Callable[..., Any], batch: Batch) -> Tensor:
        assert isinstance(model, nn.Module)
        hook = model.register_forward_hook(lambda _, __, output: logits.append(output.detach().float().cpu()))
        try:
            positions.append(batch.positions)
            return task.training_losses(model, batch)
        finally:
            hook.remove()

    logging = copy.copy(task)
    logging.training_losses = losses  # type: ignore[method-assign]
    stage.run(logging, seeds=[seed], ledger=ledger)
    size = len(task.pool)
    turns, rows = torch.cat(positions)[: epochs * size], torch.cat(logits)[: epochs * size]
    by_epoch = []
    for epoch in range(epochs):
        in_order = torch.empty(size, rows.shape[1])
        in_order[turns[epoch * size : (epoch + 1) * size]] = rows[epoch * size : (epoch + 1) * size]
        by_epoch.append(in_order)
    return by_epoch


@dataclass
class Rcap(OnlineRule):
    """Robust class-aware probabilistic pruning: half of the pool in each epoch, drawn by the losses of the last one."""

    fraction: float = 0.5
    """Share of the pool in an epoch."""

    method: ClassVar[str] = "datacull-rcap"

    def prices(self, task: Task, n_steps: int) -> dict[str, float]:
        """None: the losses are those of training."""
        return {}

    def rider(self, run: OnlineRun) -> OnlineRider:
        """See `OnlineRule`."""
        import_package(PACKAGE, PACKAGE)
        return _Rider(run, self.n_pool(run.task), self.fraction)


class _Rider(OnlineRider):
    """Draws from the half of each epoch; `memory` holds it, and the losses by which it was drawn."""

    def __init__(self, run: OnlineRun, n_candidates: int, fraction: float) -> None:
        super().__init__(run, n_candidates)
        self._fraction, self._pool = fraction, _ordered(run.task)
        self._stream: tuple[int, Stream] | None = None
        self._epoch_steps = max(1, int(fraction * len(run.task.pool)) // n_candidates)

    def candidates(self, step: int) -> np.ndarray:
        """Of the half of this epoch, in even turns of the classes."""
        epoch, turn = divmod(step, self._epoch_steps)
        if not turn:
            self._begin(epoch)
        if self._stream is None or self._stream[0] != epoch:
            half, groups = self.memory["half"].numpy(), self.run.task.groups(self.run.task.pool)
            self._stream = epoch, balanced_stream(half, groups, derive(self.run.seed, "order", epoch))
        return self._stream[1].take(turn * self.n_kept, self.n_kept)

    def kept(self, step: int, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """All."""
        return np.arange(len(candidates))

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        super().observe(losses)
        rows = self.drawn[0]
        self.memory["losses"][rows] = torch.from_numpy(np.asarray(losses[: len(rows)], dtype=np.float64))
        self.memory["seen"][rows] = True

    def _begin(self, epoch: int) -> None:
        """Draw the half of an epoch, by the losses of the one before."""
        package, (order, dataset) = import_package(PACKAGE, PACKAGE), self._pool
        with reproducible(derive(self.run.seed, "half", epoch)), tempfile.TemporaryDirectory() as folder:
            logger = package.DCLogger(f"{folder}/")
            importance = package.RCAPImportance(dataset, logger, TEMPERATURE)
            if self.memory:
                importance.epoch, importance.sample_losses = epoch - 1, self.memory["before"].numpy().copy()
                seen = np.flatnonzero(self.memory["seen"].numpy()[order])
                logger.log_metric(epoch - 1, torch.from_numpy(seen), self.memory["losses"][order[seen]])
            loader = package.RCAPDataLoader(dataset, self._fraction)
            loader.resample(importance.compute_importance())
        self.memory = {
            "half": torch.from_numpy(order[np.sort(np.array(loader.subset_indices))]),
            "before": torch.from_numpy(np.asarray(importance.sample_losses, dtype=np.float64)),
            "losses": torch.zeros(len(order), dtype=torch.float64),
            "seen": torch.zeros(len(order), dtype=torch.bool),
        }


def _ordered(task: Task) -> tuple[np.ndarray, Any]:
    """The positions of the pool in the order of ids, and DataCull's data set in this order.

    So a permuted pool gives the same choice.
    """
    order = by_id(task.pool)
    return order, import_package(PACKAGE, PACKAGE).DCDataset(_Labels(labels_of(task, task.pool)[order]))
