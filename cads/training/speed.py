"""A budget of time in FLOPs, by the measured speed of training."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.streams import ShuffledStream
from cads.data.training_batches import BatchStream
from cads.errors import BudgetError
from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run
from cads.runtime.lockstep import StepReporter
from cads.runtime.processes import active_group
from cads.task import Task
from cads.training.trainer import Trainer

log = logging.getLogger(__name__)

STAGE = "speed test"
WARM_UP, MAX_SHARE, MAX_SECONDS = 3, 0.05, 2.0
"""Steps of the first part, largest share of the time for measuring, and most seconds."""


@dataclass(frozen=True)
class TrainingSpeed:
    """How fast a model trains.

    Attributes:
        flops_per_second: of the last part of the measurement, the longest.
        seconds: that the measurement took.
        train_seconds: that its steps take at that rate; the rest went to what comes once.
    """

    flops_per_second: float
    seconds: float
    train_seconds: float


def measure_speed(task: Task, ledger: Ledger, limit: float, parts: int = 1) -> TrainingSpeed:
    """Train a throw-away model on random batches for about `limit` seconds, `WARM_UP` steps at least.

    The steps are charged to `ledger`, as selection. All processes measure one speed.

    Args:
        parts: fewest runs, each of twice the steps of the one before. The first one warms up.
    """
    group = active_group()

    def elapsed() -> float:
        # Processes have one clock: with their own they would measure for different times, or wait forever.
        return float(group.on_rank_zero(lambda: time.perf_counter() - started))

    batch_size = task.recipe.batch_size
    step = batch_size * task.costs.per_usage(task.pool, batch_size)
    started, rate, n_steps, spent, n_parts = time.perf_counter(), 0.0, WARM_UP, 0.0, 0
    draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], batch_size)
    # The last, longest part is what counts. It takes about as long as all before it.
    while n_parts < parts or elapsed() < limit / 2:
        flops = (n_steps + 0.5) * step
        fit = Trainer(task, ledger).fit(task.model(0), draws, flops, seed=0, phase=SELECT, stage=STAGE)
        rate, n_steps = float(group.on_rank_zero(partial(float, fit.flops_per_second))), 2 * n_steps
        spent, n_parts = spent + float(fit.flops[-1]), n_parts + 1
    return TrainingSpeed(rate, elapsed(), spent / rate)


def in_flops(task: Task, budget: Budget, ledger: Ledger) -> Budget:
    """`budget`, or if it is a time the FLOPs that training does in what measuring its speed leaves of it.

    A throw-away model trains on random batches for at most `MAX_SHARE` of the time. That is charged to `ledger`. A
    run that goes on keeps the speed that was measured first.

    Raises:
        BudgetError: if the time does not suffice to measure the speed.
    """
    if budget.unit != "seconds":
        return budget

    def measure(_: StepReporter) -> State:
        speed = measure_speed(task, ledger, measuring_seconds(budget.amount))
        return State({"rate": speed.flops_per_second, "seconds": speed.seconds})

    state = replay_or_run(STAGE, [], ledger, measure)
    rate, left = state.number("rate"), budget.amount - state.number("seconds")
    if left <= 0:
        raise BudgetError(f"a budget of {budget} does not suffice to measure how fast training is: raise it")
    flops = replace(budget, amount=float(np.floor(rate * left)), unit="FLOPs")
    epochs = flops.amount / (task.costs.per_usage(task.pool, task.recipe.batch_size) * len(task.pool))
    log.warning("%s at %.3g FLOP/s, as measured: %.4g FLOPs, %.3g epochs", budget, rate, flops.amount, epochs)
    return flops


def measuring_seconds(budget: float) -> float:
    """Seconds that are spent on measuring the speed where the budget is a time of `budget` seconds."""
    return min(MAX_SECONDS, MAX_SHARE * budget)
