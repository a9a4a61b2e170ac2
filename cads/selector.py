"""The interface of a selector, and the plan and selection of a selector that does not search."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.monitor import Monitor
from cads.selection import Selection
from cads.task import Task


class Selector(Protocol):
    """A method that chooses what to train on; registered in the entry-point group `cads.selectors`."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose examples of `task.pool` for training within `budget`, and charge `ledger` for the cost of choosing."""
        ...

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge, by stage. Nothing is trained and no example is read."""
        ...


def zero_cost_plan(task: Task, budget: Budget, *, kept: int | None = None) -> PlannedLedger:
    """The empty plan of a selector that spends no FLOPs.

    Args:
        kept: number of pool examples that training can draw, if it is known.

    Raises:
        BudgetError: if the budget does not buy one step.
    """
    check_step(task, budget.flops(task))
    ledger = PlannedLedger()
    ledger.kept = kept
    return ledger


def full_pool_selection(
    task: Task, budget: Budget, *, method: str, seed: int, ledger: Ledger, notes: dict[str, object]
) -> Selection:
    """The full pool: what a selector returns if it found nothing better, or if the budget buys no trial."""
    return Selection.from_pool(
        task.pool,
        selected=np.ones(len(task.pool), dtype=bool),
        method=method,
        seed=seed,
        budget=budget,
        ledger=ledger,
        notes=notes,
    )
