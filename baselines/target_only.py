"""Target-only: train on the target alone."""

from __future__ import annotations

from dataclasses import dataclass

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
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.selector.Selector`."""
        return zero_cost_plan(task, budget)
