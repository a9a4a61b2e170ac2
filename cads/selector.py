"""What CADS-S and CADS-E share: dividing the compute, the ladder of short runs, and the guard."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.monitor import Monitor
from cads.selection import Selection
from cads.task import Task


class Selector(Protocol):
    """Anything that chooses what to train on; found through the entry-point group `cads.selectors`."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose from `task.pool` for training within `budget`, charging `ledger` for what is spent."""
        ...

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge, by stage; nothing is trained and no example is read."""
        ...


def zero_cost_plan(task: Task, budget: Budget) -> PlannedLedger:
    """The plan of a selector that spends nothing.

    Raises:
        BudgetError: if the budget does not buy one step.
    """
    check_step(task, budget.flops(task))
    return PlannedLedger()


def full_pool_selection(
    task: Task, budget: Budget, *, method: str, seed: int, ledger: Ledger, notes: dict[str, object]
) -> Selection:
    """The full pool: what a selector returns when nothing better was found, or nothing could be tried."""
    return Selection.from_pool(
        task.pool,
        selected=np.ones(len(task.pool), dtype=bool),
        method=method,
        seed=seed,
        budget=budget,
        ledger=ledger,
        notes=notes,
    )
