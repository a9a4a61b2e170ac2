"""How a ranking is cut: which prefix of it the budget pays for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.costs import Workload
from cads.accounting.ledger import ROUNDING
from cads.data.target_share import TargetFraction, check_target_fraction, target_share
from cads.errors import BudgetError, ConfigError
from cads.task import Task

CUT_OPTIONS = ("fraction", "epochs", "target_fraction")
"""Options of how a ranking is cut and trained on, which do not change the ranking."""

TargetUsage = Callable[[], tuple[int, float]]
"""-> the examples of the target, and the FLOPs of a usage of one in training."""


@dataclass(frozen=True)
class Cut:
    """The options of a cut; fields as in `cads.scoring.ranker.Ranker`."""

    fraction: float | None
    epochs: float
    target_fraction: TargetFraction

    def check(self) -> None:
        """Refuse options out of range.

        Raises:
            ConfigError: naming the option.
        """
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction = {self.fraction}: a share of the pool, above 0 and at most 1")
        if not self.epochs > 0:
            raise ConfigError(f"epochs = {self.epochs}: it must be positive")
        check_target_fraction(self.target_fraction)

    def pass_flops(self, train_flops: float, pool_flops: float) -> float:
        """FLOPs that one pass over what is kept may cost, where the whole pool costs `pool_flops`."""
        return self.fraction * pool_flops if self.fraction is not None else train_flops / self.epochs

    def size(self, usages: np.ndarray, train_flops: float, target: TargetUsage, pool_flops: float | None = None) -> int:
        """How many of the examples are kept: at least one.

        By `fraction`, or as many as `train_flops` pass over `epochs` times, with the target's part of the batches.

        Args:
            usages: FLOPs of a usage of each example, with its share of the optimizer step, best first, shape (n,).
            target: of the target. pool_flops: of one pass over the pool; None if `usages` are those of all of it.
        """
        cumulative_flops = np.cumsum(usages)
        pass_flops = self.pass_flops(train_flops, cumulative_flops[-1] if pool_flops is None else pool_flops)
        if self.fraction is None and self.target_fraction:
            n_target, usage = target()
            n_kept = np.arange(1.0, len(usages) + 1)
            share = target_share(self.target_fraction, n_target, n_kept)
            cumulative_flops = cumulative_flops + n_kept * share / (1 - share) * usage
        return max(1, int(np.searchsorted(cumulative_flops, pass_flops * ROUNDING, side="right")))

    def planned_size(self, n_pool: int, usage: float, train_flops: float, target: TargetUsage) -> int:
        """As `size`, of `n_pool` examples whose usages cost `usage` FLOPs each."""
        if self.fraction is not None:
            return max(1, int(self.fraction * n_pool * ROUNDING))
        pass_flops = self.pass_flops(train_flops, n_pool * usage) * ROUNDING
        if not self.target_fraction:
            return max(1, min(n_pool, int(pass_flops / usage)))
        return self.size(np.full(n_pool, usage), train_flops, target)

    def target_share(self, n_target: int, n_kept: int) -> float:
        """The share of the target in each batch of the final training."""
        return float(target_share(self.target_fraction, n_target, n_kept))


def target_usage(task: Task) -> tuple[int, float]:
    """See `TargetUsage`."""
    return len(task.target), task.costs.per_usage(task.target, task.recipe.batch_size)


def left_to_train(task: Workload, budget: Budget, select_flops: float, method: str) -> float:
    """FLOPs that remain for training after a selection of `select_flops`.

    Raises:
        BudgetError: if they are less than one step.
    """
    total = budget.flops(task)
    remaining = total - select_flops if budget.count_selection else total
    if budget.count_selection and remaining < total and remaining <= 0:
        raise BudgetError(
            f"{method} would spend {select_flops:.4g} of {total:.4g} FLOPs on its ranking: nothing is left to train "
            "with; raise the budget, or do not count selection"
        )
    check_step(task, remaining)
    return remaining
