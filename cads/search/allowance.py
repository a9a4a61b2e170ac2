"""Dividing a budget between selection and training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING
from cads.errors import ConfigError
from cads.search.constants import constants_of
from cads.task import Task


@dataclass(frozen=True)
class BudgetSplit:
    """How a budget is divided.

    Attributes:
        train_flops: for training the final model.
        selection_flops: the most that selection may spend.
    """

    train_flops: float
    selection_flops: float


def split_budget(
    task: Task, budget: Budget, allowance: float | None, default: float, min_flops: float = 0.0
) -> BudgetSplit:
    """Divide `budget` between selection and training.

    Args:
        allowance: selection FLOPs in units of the training FLOPs; None for `default`, but for no more than
            `selection_share` if the budget must cover selection.
        min_flops: FLOPs below which selection can do nothing.

    Raises:
        ConfigError: if the allowance is negative or not finite.
        BudgetError: if the training FLOPs do not buy one step.
    """
    total = budget.flops(task)
    if allowance is None:
        allowance = min(selection_share(task, total, min_flops), default) if budget.count_selection else default
    if not (math.isfinite(allowance) and allowance >= 0):
        raise ConfigError(f"allowance = {allowance}: it must be finite and >= 0, in units of the training FLOPs")
    train_flops = total / (1 + allowance) if budget.count_selection else total
    check_step(task, train_flops)
    return BudgetSplit(train_flops, allowance * train_flops)


def selection_share(task: Task, total: float, min_flops: float = 0.0) -> float:
    """FLOPs that selection may spend, in units of the training FLOPs, where `total` FLOPs cover both.

    The training FLOPs buy at least one step, if `total` does.

    Args:
        min_flops: FLOPs below which selection can do nothing.
    """
    usages = total / task.costs.per_usage(task.pool, task.recipe.batch_size)
    constants = constants_of(task)
    min_share, max_share = constants.counted_share
    share = min(max_share, max(min_share, constants.share_per_pass * usages / len(task.pool)))
    min_flops *= ROUNDING
    if min_flops < total and (needed := min_flops / (total - min_flops)) <= constants.share_for_min_search:
        share = max(share, needed)
    return min(share, max(0.0, usages / task.recipe.batch_size - 1))
