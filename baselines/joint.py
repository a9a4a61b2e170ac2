"""Joint: train on the whole pool and the target together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.selection import Selection
from cads.selector import full_pool_selection, zero_cost_plan
from cads.task import Task


@dataclass
class Joint:
    """The whole pool, with a share of each batch from the target: selection costs nothing."""

    target_fraction: float = 0.3
    """Share of each batch that is drawn from the target."""

    def __post_init__(self) -> None:
        if not 0 < self.target_fraction < 1:
            raise ConfigError(f"target_fraction = {self.target_fraction}: it must lie between 0 and 1")

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select the whole pool, with a share of each batch from the target; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        full_pool = full_pool_selection(task, budget, method="joint", seed=seed, ledger=ledger, notes={})
        return replace(full_pool, target_fraction=self.target_fraction, config=asdict(self))

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.selector.Selector`."""
        return zero_cost_plan(task, budget)
