"""Rules that choose the examples of each step while the final model trains: what they share.

Every step has its share of the target, and classes come in even turns, as in the final training of the other rivals.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING, SELECT, TRAIN, Ledger, PlannedLedger
from cads.data.balanced_stream import balanced_stream
from cads.data.batch import Batch
from cads.data.token_batches import by_id
from cads.data.training_batches import joined
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.selector import finished
from cads.task import Task
from cads.training.rider import Rider
from cads.training.run_state import RunSegment
from cads.training.trainer import Trainer
from experiments.rivals.subset import labels_of


@dataclass
class OnlineRule(ABC):
    """Selects as it trains: the budget covers what the rule costs and the one run."""

    target_fraction: float = 0.3
    """Share of each batch that is the target's."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.target_fraction < 1:
            raise ConfigError(f"target_fraction = {self.target_fraction}: it must be above 0 and below 1")

    @abstractmethod
    def prices(self, task: Task, n_steps: int) -> dict[str, float]:
        """FLOPs of the rule in a run of `n_steps`, by stage."""

    @abstractmethod
    def rider(self, run: OnlineRun) -> OnlineRider:
        """What draws the batches of a run, and charges its ledger for the rule."""

    def trained_task(self, task: Task, rider: OnlineRider) -> Task:
        """The task that is trained on: `task`, unless the rule changes its losses."""
        return task

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge to "select"; see `cads.selector.Selector`."""
        ledger = PlannedLedger()
        for stage, flops in self.prices(task, self._steps(task, budget)).items():
            ledger.charge(SELECT, stage, flops)
        return ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Train the final model; see `cads.selector.Selector`.

        Returns:
            a Selection with the run in `trained`, whose score says how often each example was trained on.
        """
        labels_of(task, task.pool)
        limit = budget.flops(task) * ROUNDING if budget.count_selection else None
        run_ledger, n_steps = Ledger(limit=limit), self._steps(task, budget)
        model = task.model(derive(seed, "final model"))
        rider = self.rider(OnlineRun(task, model, run_ledger, n_steps, self.n_target(task), seed))
        try:
            fit = Trainer(self.trained_task(task, rider), run_ledger, monitor).fit(
                model,
                rider,
                n_steps * step_flops(task) * ROUNDING,
                seed=derive(seed, "training"),
                phase=TRAIN,
                stage="final model",
                segment=RunSegment(keep=True),
            )
        finally:
            ledger.merge(run_ledger)
        assert fit.state is not None
        return Selection.from_pool(
            task.pool,
            selected=rider.counts > 0,
            score=rider.counts,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            target_fraction=self.target_fraction,
            trained=finished(fit.state),
        )

    def n_target(self, task: Task) -> int:
        """Target examples of a step."""
        return min(task.recipe.batch_size - 1, max(1, round(self.target_fraction * task.recipe.batch_size)))

    def n_pool(self, task: Task) -> int:
        """Pool examples of a step."""
        return task.recipe.batch_size - self.n_target(task)

    def _steps(self, task: Task, budget: Budget) -> int:
        """The steps that the budget buys, with what the rule costs in them."""
        total, step = budget.flops(task), step_flops(task)
        most = int(total / step * ROUNDING)
        if not budget.count_selection:
            return most

        def cost(n_steps: int) -> float:
            return n_steps * step + sum(self.prices(task, n_steps).values())

        check_step(task, total * step / cost(1))
        return bisect_right(range(1, most + 1), total * ROUNDING, key=cost)


@dataclass(frozen=True)
class OnlineRun:
    """A run of the final model.

    Attributes:
        model: that is trained. ledger: charged for the rule. n_steps: of the run. n_target: target examples of a step.
    """

    task: Task
    model: nn.Module
    ledger: Ledger
    n_steps: int
    n_target: int
    seed: int


class OnlineRider(Rider, ABC):
    """Draws each batch by the present model.

    Attributes:
        counts: how often each pool example was trained on, shape (N,).
        drawn: positions in pool and target of the examples of the last step.
        memory: all else that later draws depend on, by name.

    Args:
        run: that it draws for. n_candidates: pool examples that are drawn for each step.
    """

    def __init__(self, run: OnlineRun, n_candidates: int) -> None:
        task, seed = run.task, run.seed
        super().__init__(task.pool, task.recipe.batch_size)
        self.run = run
        self.counts = np.zeros(len(task.pool))
        self.drawn = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self.memory: dict[str, Tensor] = {}
        self._n_candidates = n_candidates
        self._pool_rows = balanced_stream(by_id(task.pool), task.groups(task.pool), derive(seed, "order"))
        self._target_rows = balanced_stream(by_id(task.target), task.groups(task.target), derive(seed, "target order"))

    @property
    def n_kept(self) -> int:
        """Pool examples that a step trains on."""
        return self.batch_size - self.run.n_target

    @abstractmethod
    def kept(self, step: int, candidates: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Which of the candidates are trained on, indices, shape (n_kept,).

        Args:
            candidates: positions in the pool. targets: positions in the target.
        """

    def candidates(self, step: int) -> np.ndarray:
        """Positions in the pool that are drawn for a step, in even turns of the classes."""
        return self._pool_rows.take(step * self._n_candidates, self._n_candidates)

    def step(self, step: int) -> list[Batch]:
        """See `Rider`. The batch after the last step is drawn, but not trained on: nothing is computed for it."""
        task, n_target = self.run.task, self.run.n_target
        candidates = self.candidates(step)
        targets = self._target_rows.take(step * n_target, n_target)
        chosen = np.arange(self.n_kept)
        if step < self.run.n_steps:
            chosen = np.sort(self.kept(step, candidates, targets))
        self.drawn = candidates[chosen], targets
        return joined([task.pool.batch(self.drawn[0]), task.target.batch(targets)], 1)

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        np.add.at(self.counts, self.drawn[0], 1)

    def ids(self, batches: list[Batch]) -> list[str]:
        """See `Rider`."""
        pools = (self.run.task.pool, self.run.task.target)
        return [i for pool, rows in zip(pools, self.drawn, strict=True) for i in pool.ids.take(rows).to_pylist()]

    def fingerprint(self) -> str:
        """See `Rider`."""
        parts = (type(self).__name__, self.run.seed, self.run.n_steps, self._n_candidates, self.run.n_target)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        """See `Rider`."""
        return {"counts": torch.from_numpy(self.counts.copy()), **self.memory}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Rider`."""
        self.counts = state["counts"].numpy().copy()
        self.memory = {name: x for name, x in state.items() if name != "counts"}


def step_flops(task: Task) -> float:
    """The most that a training step costs, whichever examples it holds."""
    usage = max(task.costs.usages(task.pool).max(), task.costs.usages(task.target).max())
    return float(usage * task.recipe.batch_size + task.costs.optimizer_step)


def forward_flops(task: Task) -> tuple[float, float]:
    """One forward pass over a mean example of the pool, and over one of the target."""
    in_pool, in_target = (task.costs.forward_pool(pool) / len(pool) for pool in (task.pool, task.target))
    return in_pool, in_target
