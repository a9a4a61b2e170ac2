"""Rivals that keep a subset of the pool: the base class, the passes they can pay for, and reading a pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING, SELECT, Ledger, PlannedLedger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.token_batches import scoring_batches
from cads.errors import ConfigError, NotAffordableError
from cads.monitor import Monitor
from cads.scoring.pool_scores import evaluating, planned_flops
from cads.scoring.reference_models import device_of
from cads.scoring.stages import RankingStage, TrainOnTarget
from cads.seeding import derive
from cads.selection import Selection
from cads.task import Task
from cads.training.precision import autocast

THETA = "theta"


@dataclass
class SubsetRival(ABC):
    """Scores the pool with trained models, keeps a subset, and leaves the rest of the budget to the final training.

    The final training draws part of each batch from the target and takes classes in even turns, as the best method
    without selection does.
    """

    share: float = 1 / 3
    """Most of the budget that selection takes."""
    target_fraction: float = 0.3
    """Share of each batch of the final training drawn from the target."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share = {self.share}: a share of the budget, above 0 and below 1")

    @abstractmethod
    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """What `choose` does within `flops`, in order.

        Raises:
            ConfigError: if the task has no classes.
            NotAffordableError: if `flops` do not buy it.
        """

    @abstractmethod
    def choose(self, task: Task, flops: float, seed: int, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """Which examples are kept, bool, shape (N,), and their scores, higher is better, shape (N,)."""

    @abstractmethod
    def load(self) -> None:
        """Import the package.

        Raises:
            ConfigError: if it is not installed.
        """

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.selector.Selector`."""
        ledger = PlannedLedger()
        try:
            for stage in self.stages(task, self._allowance(task, budget)):
                stage.charge(task, ledger)
        except NotAffordableError as error:
            return PlannedLedger(note=f"{error}: the full pool is returned")
        return ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Score and cut, or the full pool if the share does not buy the scores; see `cads.selector.Selector`.

        Raises:
            ConfigError: if the package is not installed, or the task has no classes.
        """
        self.load()
        labels_of(task, task.pool)
        flops = self._allowance(task, budget)
        selection_ledger = Ledger(limit=flops * ROUNDING)
        note = self.plan(task, budget).note
        try:
            kept, score = _everything(task.pool) if note else self.choose(task, flops, seed, selection_ledger)
        finally:
            ledger.merge(selection_ledger)
        return Selection.from_pool(
            task.pool,
            selected=kept,
            score=score,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            target_fraction=self.target_fraction,
            balanced=True,
            notes={"guard": note} if note else {},
        )

    def _allowance(self, task: Task, budget: Budget) -> float:
        total = budget.flops(task)
        check_step(task, (1 - self.share) * total)
        return self.share * total


def _everything(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(len(pool), dtype=bool), np.ones(len(pool))


def labels_of(task: Task, pool: Pool) -> np.ndarray:
    """The class of each example, int64, shape (N,).

    Raises:
        ConfigError: if the task has no classes.
    """
    labels = task.groups(pool)
    if labels is None or not task.classes:
        raise ConfigError(f"{task.name} has no classes: choose a rival that does not compare class probabilities")
    return np.asarray(labels, dtype=np.int64)


def affordable_passes(task: Task, pool: Pool, passes: float, flops: float, n_models: int = 1) -> float:
    """The passes over `pool` that `flops` buy for each of `n_models`, in whole steps; at most `passes`.

    Raises:
        NotAffordableError: if they do not buy one step of each model.
    """
    batch_size = task.recipe.batch_size
    steps = int(flops / n_models / (task.costs.per_usage(pool, batch_size) * batch_size))
    if steps < 1:
        raise NotAffordableError(f"the share of the budget does not buy the scores of {n_models} models")
    return min(passes, steps * batch_size / len(pool))


def target_model(task: Task, passes: float, flops: float) -> TrainOnTarget:
    """The stage that trains theta on the target, for at most `passes` and within `flops` less a reading of the pool.

    Raises:
        NotAffordableError: if that does not buy one step.
    """
    reading = planned_flops(task.costs.forward, task.pool)
    return TrainOnTarget(THETA, affordable_passes(task, task.target, passes, flops - reading))


def read_rows(
    task: Task,
    pool: Pool,
    model: nn.Module,
    function: Callable[[nn.Module, Batch], Tensor],
    *,
    ledger: Ledger,
    stage: str,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """A row of numbers for each example at `positions` (None: all), in one forward pass, float64, shape (n, D).

    Args:
        function: of the model, without dropout and gradients, and a batch: shape (B, D).
    """
    positions = np.arange(len(pool)) if positions is None else positions
    device, batches, parts = device_of(model), scoring_batches(pool, positions=positions), []
    with evaluating(model), autocast(task.recipe.precision, device), ledger.timed(SELECT, stage):
        for rows in batches:
            batch = pool.batch(rows)
            with torch.inference_mode(False):
                ledger.charge(SELECT, stage, task.costs.forward(batch), tokens=batch.tokens)
            parts.append(function(model, batch.to(device)).double().cpu().numpy())
    values = np.concatenate(parts)
    ordered = np.empty((len(pool), values.shape[1]))
    ordered[np.concatenate(batches)] = values
    return ordered[positions]


def class_probabilities(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Shape (B, C)."""
    return torch.softmax(task.logits(model, batch).double(), dim=1)


def feature_width(task: Task) -> int:
    """D, the length of `Task.features`."""
    with torch.no_grad():
        return int(task.features(task.costs.model, task.pool.batch(np.zeros(1, dtype=np.int64))).shape[1])


def theta_seed(seed: int) -> int:
    """The seed of theta."""
    return derive(seed, "theta")
