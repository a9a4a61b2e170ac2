"""Rankings: every example of a pool scored once, and cut for any budget. What the cost-aware baselines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.budget import SELECT, Budget, Ledger, PlannedLedger
from cads.errors import BudgetError, ConfigError, DataError
from cads.monitor import Monitor
from cads.optimizer import check_step
from cads.selection import Selection, rank_by_score
from cads.task import Pool, Task


@dataclass
class Ranking:
    """A score for each example of a pool, whatever the budget.

    Attributes:
        ids: of the examples. score: higher is better, shape (N,).
        method, config, seed, ledger: how it was made, and what it cost.
        pool_hash: content hash of the pool.
        notes: what the method has to say.
    """

    ids: pa.Array
    score: np.ndarray
    method: str
    seed: int
    ledger: Ledger
    pool_hash: str
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def scores_of(self, pool: Pool) -> np.ndarray:
        """The scores in the order of `pool`, matched by id, shape (N,).

        Raises:
            DataError: if an example of the pool has no score, or one that is not finite.
        """
        found = pc.index_in(pool.ids, value_set=self.ids)
        if found.null_count:
            missing = pool.ids.filter(pc.is_null(found))
            raise DataError(
                f"{found.null_count} examples of the {pool.name} have no score by {self.method}, such as "
                f"{missing[:3].to_pylist()}: rank the pool that is trained on"
            )
        score = self.score[found.to_numpy()]
        if not np.isfinite(score).all():
            bad = pool.ids.take(np.flatnonzero(~np.isfinite(score))[:5]).to_pylist()
            raise DataError(f"{self.method} scores examples such as {bad} with NaN or infinity: look at these examples")
        return score


@dataclass
class Ranker(ABC):
    """A selector that scores the whole pool once, and keeps the best of it that the budget pays for.

    The examples kept are a prefix of the ranking, so those of a smaller budget are among those of a larger one.
    """

    fraction: float | None = None
    """Share of the pool to keep, by what its examples cost; null to let the budget decide."""
    epochs: float = 4.0
    """Passes over the examples kept that the budget pays for: up to four are nearly as good as fresh data
    (Muennighoff et al., 2023, arXiv 2305.16264)."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction = {self.fraction}: a share of the pool, above 0 and at most 1")
        if not self.epochs > 0:
            raise ConfigError(f"epochs = {self.epochs}: it must be positive")

    @abstractmethod
    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Score every example of `task.pool`, charging `ledger`; no budget is looked at."""

    @abstractmethod
    def rank_plan(self, task: Task) -> PlannedLedger:
        """What `rank` would charge, by stage; nothing is trained and no example is read.

        Raises:
            ConfigError: if the method does not apply to this task.
        """

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Rank and cut; see `cads.optimizer.Selector`.

        Raises:
            BudgetError: if the budget must cover selection, and does not leave one step to train with.
        """
        self._afford(task, budget, self.plan(task, budget).total(SELECT).flops)
        ranking = self.rank(task, seed=seed, ledger=ledger, monitor=monitor)
        return self.cut(ranking, task, budget, ledger)

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.optimizer.Selector`."""
        check_step(task, budget.flops(task))
        return self.rank_plan(task)

    def cut(self, ranking: Ranking, task: Task, budget: Budget, ledger: Ledger | None = None) -> Selection:
        """The best examples of `ranking`, best first, that the budget pays for.

        Args:
            ledger: what the selection is charged; None for what the ranking cost.
        """
        ledger = ranking.ledger if ledger is None else ledger
        training = self._afford(task, budget, ledger.total(SELECT).flops)
        score = ranking.scores_of(task.pool)
        selected = np.zeros(len(task.pool), dtype=bool)
        order = np.argsort(rank_by_score(task.pool.ids, score), kind="stable")
        selected[order[: self._size(task, order, training)]] = True
        return Selection.of(
            task.pool,
            selected=selected,
            score=score,
            method=ranking.method,
            seed=ranking.seed,
            budget=budget,
            ledger=ledger,
            config=ranking.config,
            notes=ranking.notes,
        )

    def ranking(self, task: Task, score: np.ndarray, *, seed: int, ledger: Ledger, **notes: Any) -> Ranking:
        """What `rank` returns for scores in the order of the pool, shape (N,)."""
        made = Ranking(task.pool.ids, score, self.method, seed, ledger, task.pool.content_hash, asdict(self), notes)
        made.scores_of(task.pool)
        return made

    def _size(self, task: Task, order: np.ndarray, training: float) -> int:
        """How many of the examples in `order` are kept: at least one."""
        usages = task.costs.usages(task.pool)[order] + task.costs.optimizer_step / task.recipe.batch_size
        spent = np.cumsum(usages)
        most = self.fraction * spent[-1] if self.fraction is not None else training / self.epochs
        return max(1, int(np.searchsorted(spent, most * (1 + 1e-9), side="right")))

    def _afford(self, task: Task, budget: Budget, selection: float) -> float:
        """FLOPs that are left for training.

        Raises:
            BudgetError: if that is less than one step.
        """
        total = budget.flops(task)
        left = total - selection if budget.count_selection else total
        if budget.count_selection and left < total and left <= 0:
            raise BudgetError(
                f"{self.method} would spend {selection:.4g} of {total:.4g} FLOPs on its ranking: nothing is left to "
                "train with; raise the budget, or do not count selection"
            )
        check_step(task, left)
        return left
