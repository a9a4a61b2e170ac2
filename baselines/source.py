"""Source: train on one source alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from cads.budget import Budget, Ledger, PlannedLedger
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.optimizer import check_step, free
from cads.selection import Selection
from cads.task import Task


@dataclass
class Source:
    """One source, by name: what a user without a selector would try."""

    name: str
    """The source."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select all of the source; see `cads.optimizer.Selector`."""
        check_step(task, budget.flops(task))
        names = self._known(task)
        mask = np.array([name == self.name for name in names])
        selected = np.zeros(len(task.pool), dtype=bool)
        selected[task.pool.in_sources(mask)] = True
        return Selection.of(
            task.pool,
            selected=selected,
            method="source",
            seed=seed,
            budget=budget,
            ledger=ledger,
            source_probability=dict(zip(names, mask.astype(float).tolist(), strict=True)),
            config=asdict(self),
        )

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """Nothing is spent; see `cads.optimizer.Selector`."""
        self._known(task)
        return free(task, budget)

    def _known(self, task: Task) -> tuple[str, ...]:
        """The names of the sources.

        Raises:
            ConfigError: if this one is not among them.
        """
        names = task.pool.source_names
        if self.name not in names:
            raise ConfigError(f"name = {self.name!r} is no source of the pool: choose from {list(names)}")
        return names
