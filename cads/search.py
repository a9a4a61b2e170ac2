"""The shape that CADS-S and CADS-E share: a search by short runs, within what selection may spend."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from cads.budget import Budget, Ledger, PlannedLedger
from cads.inner import Inner
from cads.monitor import Monitor
from cads.optimizer import Division, divide, uniform
from cads.selection import Selection
from cads.task import Task

log = logging.getLogger(__name__)

ALLOWANCE = 2.75
"""Selection FLOPs in units of the training budget, if the budget need not cover selection."""
NOTHING = "the allowance buys no scores, or no short runs: the full pool is returned"


@dataclass
class Search(ABC):
    """A selector that tries things on a ladder of short runs, and returns the full pool if nothing beats it."""

    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: 2.75, or 1/3 if the budget counts selection."""
    outer: str | None = None
    """The metric to minimise on the target; null for the task's own."""
    guard: bool = True
    """Return the full pool unless the choice beat it on the target."""

    method: ClassVar[str]
    held_out: ClassVar[bool] = False

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose what to train on; see `cads.optimizer.Selector`."""
        if note := self.plan(task, budget).note:
            log.warning("%s: %s", self.method, note)
            return self.full_pool(task, budget, seed, ledger, note)
        division = self.divide(task, budget)
        spent = Ledger(limit=division.selection)
        inner = Inner(task, spent, monitor or Monitor(), self.outer, held_out=self.held_out)
        try:
            return self.search(inner, budget, division.training, seed, ledger)
        finally:
            ledger.merge(spent)

    def divide(self, task: Task, budget: Budget) -> Division:
        """What selection and training may spend."""
        return divide(task, budget, self.allowance, ALLOWANCE)

    def full_pool(self, task: Task, budget: Budget, seed: int, ledger: Ledger, note: str) -> Selection:
        """What is returned when nothing can be tried."""
        return uniform(task, budget, method=self.method, seed=seed, ledger=ledger, notes={"guard": note})

    @abstractmethod
    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.optimizer.Selector`."""

    @abstractmethod
    def search(self, inner: Inner, budget: Budget, training: float, seed: int, ledger: Ledger) -> Selection:
        """Find something to train on with the ledger of `inner`, for a final training of `training` FLOPs."""


def verdict(beaten: bool) -> str:
    """What the guard has to say."""
    return "better than the full pool on the target" if beaten else "the full pool was not beaten"
