"""A budget of time in FLOPs, by the measured speed of training."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
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


def in_flops(task: Task, budget: Budget, ledger: Ledger) -> Budget:
    """`budget`, or if it is a time the FLOPs that training does in what measuring its speed leaves of it.

    A throw-away model trains on random batches for at most `MAX_SHARE` of the time. That is charged to `ledger`. A
    run that goes on keeps the speed that was measured first.

    Raises:
        BudgetError: if the time does not suffice to measure the speed.
    """
    if budget.unit != "seconds":
        return budget

    batch_size = task.recipe.batch_size
    usage = task.costs.per_usage(task.pool, batch_size)
    step = batch_size * usage

    def measure(_: StepReporter) -> State:
        group = active_group()

        def elapsed() -> float:
            # Processes have one clock: with their own they would measure for different times, or wait forever.
            return float(group.on_rank_zero(lambda: time.perf_counter() - started))

        started, rate, n_steps = time.perf_counter(), 0.0, WARM_UP
        limit = min(MAX_SECONDS, MAX_SHARE * budget.amount)
        draws = BatchStream(task.pool, [ShuffledStream(np.arange(len(task.pool)), 0)], batch_size)
        # The last, longest part is what counts. It takes about as long as all before it.
        while not rate or elapsed() < limit / 2:
            flops = (n_steps + 0.5) * step
            fit = Trainer(task, ledger).fit(task.model(0), draws, flops, seed=0, phase=SELECT, stage=STAGE)
            rate, n_steps = float(group.on_rank_zero(partial(float, fit.flops_per_second))), 2 * n_steps
        return State({"rate": rate, "seconds": elapsed()})

    state = replay_or_run(STAGE, [], ledger, measure)
    rate, left = state.number("rate"), budget.amount - state.number("seconds")
    if left <= 0:
        raise BudgetError(f"a budget of {budget} does not suffice to measure how fast training is: raise it")
    flops = replace(budget, amount=float(np.floor(rate * left)), unit="FLOPs")
    epochs = flops.amount / (usage * len(task.pool))
    log.warning("%s at %.3g FLOP/s, as measured: %.4g FLOPs, %.3g epochs", budget, rate, flops.amount, epochs)
    return flops
