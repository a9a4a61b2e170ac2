"""What selection may spend: dividing a budget between selection and training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING
from cads.errors import ConfigError
from cads.task import Task

COUNTED_ALLOWANCE, ALLOWED_PER_PASS = (1 / 3, 1.0), 1 / 12
"""Selection's share, least and most, in units of what is left for training, if the budget must cover both, and how it
grows with the passes over the pool that the budget buys: up to four, a pass is worth nearly as much as one over fresh
examples, and past that less and less (Muennighoff et al. 2023), so that selection takes what is worth little."""
PRETRAINED_PER_PASS, MOST_FOR_LEAST = 1 / 6, 3.0
"""The same for models that are pretrained: they learn a pool by heart within fewer passes. And where that does not buy
the least that a search can do, they give up to this much for it: how much they are trained matters less to them than on
what (`experiments/results`)."""


@dataclass(frozen=True)
class BudgetSplit:
    """How a budget is divided.

    Attributes:
        training: FLOPs for training the final model.
        selection: the most that selection may spend.
    """

    train_flops: float
    selection_flops: float


def split_budget(
    task: Task, budget: Budget, allowance: float | None, default: float, least: float = 0.0
) -> BudgetSplit:
    """Divide `budget` between selection and training.

    Args:
        allowance: selection FLOPs in units of the training FLOPs; None for `default`, but for no more than
            `selection_share` if the budget must cover selection.
        least: FLOPs below which selection can do nothing.

    Raises:
        ConfigError: if the allowance is negative or not finite.
        BudgetError: if what is left for training does not buy one step.
    """
    total = budget.flops(task)
    if allowance is None:
        allowance = min(selection_share(task, total, least), default) if budget.count_selection else default
    if not (math.isfinite(allowance) and allowance >= 0):
        raise ConfigError(f"allowance = {allowance}: it must be finite and >= 0, in units of the training FLOPs")
    training = total / (1 + allowance) if budget.count_selection else total
    check_step(task, training)
    return BudgetSplit(training, allowance * training)


def selection_share(task: Task, total: float, least: float = 0.0) -> float:
    """What selection may spend of `total` FLOPs that cover training too, in units of what is left for training.

    A step of training is left, if `total` buys one.

    Args:
        least: FLOPs below which selection can do nothing.
    """
    usages = total / task.costs.per_usage(task.pool, task.recipe.batch_size)
    lowest, most = COUNTED_ALLOWANCE
    per_pass = PRETRAINED_PER_PASS if task.pretrained else ALLOWED_PER_PASS
    wanted = min(most, max(lowest, per_pass * usages / len(task.pool)))
    least *= ROUNDING
    if task.pretrained and least < total and (needed := least / (total - least)) <= MOST_FOR_LEAST:
        wanted = max(wanted, needed)
    return min(wanted, max(0.0, usages / task.recipe.batch_size - 1))
