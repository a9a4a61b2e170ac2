"""The validation curve: the final model is measured on the target while it trains.

Nothing depends on it. It is charged to "evaluate", and no budget pays for it. Methods that train on the target have
seen these examples: there the curve shows how well the target is fitted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cads.accounting.ledger import EVALUATE, TRAIN, Ledger
from cads.data.pool import Pool
from cads.monitor import Monitor
from cads.seeding import derive
from cads.task import Task

STAGE = "validation"
LARGEST_SHARE = 0.05
"""Largest share of the FLOPs of the training that the curve may cost."""
FEWEST_EXAMPLES, FEWEST_POINTS = 64, 2
"""Where the curve would cost more, it has fewer examples, then fewer points; with fewer than these there is none."""


@dataclass(frozen=True)
class Validation:
    """Measures a model on part of the target at evenly spaced shares of its training.

    Attributes:
        task: of the model. pool: the examples. points: how many measurements, the end included.
        flops: of one measurement. horizon: FLOPs of the training.
    """

    task: Task
    pool: Pool
    points: int
    flops: float
    horizon: float

    @classmethod
    def of(cls, task: Task, phase: str, horizon: float, points: int) -> Validation | None:
        """The curve of a training of `horizon` FLOPs, of `points` points if they cost no more than `LARGEST_SHARE`.

        None if it is not the final training, if no points are wanted, or if the training is too short for two.
        """
        if phase != TRAIN or points < FEWEST_POINTS:
            return None
        size = len(task.target)
        per_example = task.costs.forward_pool(task.target) / size
        affordable = LARGEST_SHARE * horizon / per_example
        n = min(size, max(FEWEST_EXAMPLES, int(affordable / points)))
        points = min(points, int(affordable / n))
        if points < FEWEST_POINTS:
            return None
        pool = task.target
        if n < size:
            positions = np.random.default_rng(derive(0, "validation")).permutation(size)[:n]
            pool = pool.subset(np.sort(positions), pool.name)
        return cls(task, pool, points, task.costs.forward_pool(pool), horizon)

    def is_due(self, spent: float, last: float) -> bool:
        """Whether a measurement falls between `last` and `spent` FLOPs."""
        width = self.horizon / self.points
        return spent // width > last // width

    def measure(self, model: nn.Module, step: int, spent: float) -> dict[str, Any]:
        """The record of a measurement: step, FLOPs, seconds, metrics."""
        start = time.perf_counter()
        metrics = self.task.metrics(model, self.pool)
        seconds = time.perf_counter() - start
        return {"step": step, "flops": spent, "seconds": seconds, "metrics": metrics}

    def charge(self, ledger: Ledger, records: list[dict[str, Any]]) -> None:
        """Charge a ledger for measurements."""
        for record in records:
            ledger.charge(EVALUATE, STAGE, self.flops, seconds=record["seconds"])


def show(monitor: Monitor, record: dict[str, Any]) -> None:
    """Show a measurement."""
    monitor.validated(record["step"], record["flops"], record["metrics"])
