"""Source: train on one source alone, or on some."""

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
    """One source, or some, by name: what a user without a selector would try."""

    name: str | list[str]
    """The source, or several."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select all of them; see `cads.selector.Selector`."""
        check_step(task, budget.flops(task))
        names = self._known(task)
        mask = np.array([name in self._wanted for name in names])
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
        self._known(task)
        return zero_cost_plan(task, budget)

    @property
    def _wanted(self) -> list[str]:
        return [self.name] if isinstance(self.name, str) else self.name

    def _known(self, task: Task) -> tuple[str, ...]:
        """The names of the sources.

        Raises:
            ConfigError: if one that is asked for is not among them, or none is.
        """
        names = task.pool.source_names
        unknown = [name for name in self._wanted if name not in names]
        if unknown or not self._wanted:
            wrong = f"{unknown[0]!r} is no source of the pool" if unknown else "[] names no source"
            raise ConfigError(f"name = {wrong}: choose from {list(names)}")
        return names
