"""Target-only: train on the target alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.monitor import Monitor
from cads.selection import Selection
from cads.selector import zero_cost_plan
from cads.task import Task


@dataclass
class TargetOnly:
    """Selects nothing of the pool and trains on the target only. Best, or close to it, at the smallest budgets."""

    balanced: bool = False
    """Whether batches hold the classes in even turns."""
    stop_passes: float | None = None
    """Passes over the target after which training ends, if the budget buys more; null: never."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select nothing of the pool; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        return Selection.from_pool(
            task.pool,
            selected=np.zeros(len(task.pool), dtype=bool),
            method="target-only",
            seed=seed,
            budget=budget,
            ledger=ledger,
            target_fraction=1.0,
            config=asdict(self),
            balanced=self.balanced,
            stop_passes=self.stop_passes,
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.selector.Selector`."""
        return zero_cost_plan(task, budget, kept=0)
