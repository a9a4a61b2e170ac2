"""Source: train on one source alone, or on several."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.selection import Selection
from cads.selector import zero_cost_plan
from cads.task import Task


@dataclass
class Source:
    """One or several sources, by name: what a user without a selector would try."""

    name: str | list[str]
    """The name of the source, or several names."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select all examples of the sources; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        names = self._source_names(task)
        mask = np.array([name in self._requested for name in names])
        selected = np.zeros(len(task.pool), dtype=bool)
        selected[task.pool.positions_in(mask)] = True
        return Selection.from_pool(
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
        """Nothing is spent; see `cads.selector.Selector`."""
        self._source_names(task)
        return zero_cost_plan(task, budget)

    @property
    def _requested(self) -> list[str]:
        return [self.name] if isinstance(self.name, str) else self.name

    def _source_names(self, task: Task) -> tuple[str, ...]:
        """The names of the pool's sources.

        Raises:
            ConfigError: if a requested source is not among them, or none is requested.
        """
        names = task.pool.source_names
        unknown = [name for name in self._requested if name not in names]
        if unknown or not self._requested:
            problem = f"{unknown[0]!r} is no source of the pool" if unknown else "[] names no source"
            raise ConfigError(f"name = {problem}: choose from {list(names)}")
        return names
