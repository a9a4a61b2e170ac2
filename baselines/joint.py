"""Joint: train on the whole pool and the target together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.data.target_share import TargetFraction, check_target_fraction, target_share
from cads.monitor import Monitor
from cads.selection import Selection
from cads.selector import full_pool_selection, zero_cost_plan
from cads.task import Task


@dataclass
class Joint:
    """The whole pool, with a share of each batch from the target: selection costs nothing."""

    target_fraction: TargetFraction = 0.3
    """Share of each batch that is drawn from the target; "by size": its share of all examples, at most 0.6."""
    balanced: bool = False
    """Whether batches hold the classes in even turns."""
    stop_passes: float | None = None
    """Passes over pool and target after which training ends, if the budget buys more; null: never."""

    def __post_init__(self) -> None:
        check_target_fraction(self.target_fraction, zero=False)

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select the whole pool, with a share of each batch from the target; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        full_pool = full_pool_selection(task, budget, method="joint", seed=seed, ledger=ledger, notes={})
        return replace(
            full_pool,
            target_fraction=float(target_share(self.target_fraction, len(task.target), len(task.pool))),
            config=asdict(self),
            balanced=self.balanced,
            stop_passes=self.stop_passes,
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.selector.Selector`."""
        return zero_cost_plan(task, budget, kept=len(task.pool))
