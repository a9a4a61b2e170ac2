"""Full: train on the whole pool."""

from __future__ import annotations

from dataclasses import dataclass

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.monitor import Monitor
from cads.selection import Selection
from cads.selector import full_pool_selection, zero_cost_plan
from cads.task import Task


@dataclass
class Full:
    """The whole pool: no selection, no cost."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select the whole pool; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        return full_pool_selection(task, budget, method="full", seed=seed, ledger=ledger, notes={})

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.selector.Selector`."""
        return zero_cost_plan(task, budget, kept=len(task.pool))
