"""Selection that a method pays once, before any training, at every budget: also where costs were read off a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cads.study.analysis.points import MethodPoint

SAME_MEASURED, NEARLY_SAME = 0.01, 0.1
"""Measured costs within the first share of their median are one cost, paid once. So are those that span at most the
second share, unless they grow with the budget, but a reader should know."""
SAME_PUBLISHED, READING_ERROR = 0.05, 0.02
"""Published costs within the first share of their median, or the second of a point's total, are one cost. What a point
pays for selection is its total less its training. Both are read off a figure, with an error of 1 % or so each."""


@dataclass(frozen=True)
class FixedCost:
    """What a method pays for selection at every budget.

    Attributes:
        flops: the median over the budgets; 0 if selection grows with the budget, or is free.
        doubt: what does not fit, and what is done about it; empty if all fits.
    """

    flops: float
    doubt: str = ""

    @classmethod
    def of(cls, points: Sequence[MethodPoint]) -> FixedCost:
        """The cost that the points of one method, at one or more budgets, have in common."""
        costs = np.array([p.selection for p in points])
        median = float(np.median(costs))
        differs = np.abs(costs - median) > _tolerances(points, median)
        if not differs.any():
            return cls(median)
        published = all(p.imported for p in points)
        if not published and (_grows(points) or np.ptp(costs) > NEARLY_SAME * costs.max()):
            return cls(0.0)
        far = ", ".join(f"{p.selection:.4g} at {p.budget}" for p, d in zip(points, differs, strict=True) if d)
        rule = f"{SAME_PUBLISHED:.0%}, and {READING_ERROR:.0%} of the total" if published else f"{SAME_MEASURED:.0%}"
        finding = f"selection costs {median:.4g} FLOPs in the median of all budgets, and differs by over {rule}: {far}"
        # A few points far from the others were misread. Costs that rise much less than the budgets are one cost.
        if 2 * differs.sum() < len(points) or not _grows(points):
            return cls(median, f"{finding}. The curve is fitted with the median")
        return cls(0.0, f"{finding}. The curve is fitted as if nothing were paid before training: check the points")

    def totals(self, points: Sequence[MethodPoint]) -> list[float]:
        """The FLOPs of each point, with this cost in place of its own where it is paid once; shape (n,)."""
        return [self.flops + p.train_flops if self.flops else p.total for p in points]


def _tolerances(points: Sequence[MethodPoint], median: float) -> np.ndarray:
    """How far from the median the cost of each point may be, FLOPs, shape (n,)."""
    published = [max(SAME_PUBLISHED * median, READING_ERROR * p.total) for p in points]
    return np.array([x if p.imported else SAME_MEASURED * median for p, x in zip(points, published, strict=True)])


def _grows(points: Sequence[MethodPoint]) -> bool:
    """Whether selection costs grow with the training, by more than its square root."""
    costs, train_flops = ([getattr(p, name) for p in points] for name in ("selection", "train_flops"))
    return min(costs) <= 0 or max(costs) / min(costs) >= math.sqrt(max(train_flops) / min(train_flops))
