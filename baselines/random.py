"""Random: a seeded random subset, nested over budgets and sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from cads.budget import Budget, Ledger, PlannedLedger
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.optimizer import check_step, free
from cads.seeds import derive
from cads.selection import Selection
from cads.task import Pool, Task


@dataclass
class Random:
    """A random subset, as large as the budget can pay for `epochs` times, or a fixed share of the pool.

    The order is by a hash of (seed, id): subsets of one seed are nested, and a permutation of the pool changes
    nothing.
    """

    fraction: float | None = None
    """Share of the pool to keep; null to let the budget decide."""
    epochs: float = 4.0
    """Passes over the subset that the budget pays for: up to four are nearly as good as fresh data
    (Muennighoff et al., 2023, arXiv 2305.16264)."""

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction = {self.fraction}: a share of the pool, above 0 and at most 1")
        if not self.epochs > 0:
            raise ConfigError(f"epochs = {self.epochs}: it must be positive")

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose at random; see `cads.optimizer.Selector`."""
        check_step(task, budget.flops(task))
        pool = task.pool
        score = random_scores(pool, seed)
        if self.fraction is not None:
            size = round(self.fraction * len(pool))
        else:
            usages = budget.flops(task) / task.costs.per_usage(pool, task.recipe.batch_size)
            size = int(usages / self.epochs)
        size = min(len(pool), max(1, size))
        selected = np.zeros(len(pool), dtype=bool)
        selected[np.argsort(-score, kind="stable")[:size]] = True
        return Selection.of(
            pool,
            selected=selected,
            score=score,
            probability=np.full(len(pool), size / len(pool)),
            method="random",
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.optimizer.Selector`."""
        return free(task, budget)


def random_scores(pool: Pool, seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each id, whatever its place in the pool; shape (N,)."""
    return np.array([derive(seed, identity) for identity in pool.ids.to_pylist()]) / 2.0**63
