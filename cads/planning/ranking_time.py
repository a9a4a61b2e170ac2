"""How long a ranking takes on this machine: two small parts of the data are ranked, and their times continued."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass

import numpy as np

from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CadsError
from cads.scoring.ranker import Ranker
from cads.task import Task

log = logging.getLogger(__name__)

SECONDS = 2.0
"""Most seconds of the larger part, at the speed of training steps; gradients of single examples take longer."""
MOST, FEWEST = 1024, 16
"""Examples of the pool in the larger part: most, and fewest with which a ranking is timed."""
SMALLER = 4
"""How many times smaller the other part is."""


@dataclass(frozen=True)
class RankingTime:
    """The time of a ranking as a line in its FLOPs.

    Attributes:
        once: seconds that do not grow with the data, such as the first import of a library.
        per_flop: seconds of each FLOP.
    """

    once: float
    per_flop: float

    def seconds(self, flops: float) -> float:
        """Of a ranking that costs `flops`."""
        return self.once + self.per_flop * flops


def line_through(first: float, small: tuple[float, float], large: tuple[float, float]) -> RankingTime:
    """The line through two timed rankings.

    Args:
        first: seconds of the very first ranking, of the smaller part. small, large: FLOPs and seconds of the smaller
            part, ranked again, and of the larger one.
    """
    (small_flops, small_seconds), (large_flops, large_seconds) = small, large
    per_flop = (large_seconds - small_seconds) / (large_flops - small_flops)
    # Other work on the machine may make the smaller part the slower one.
    if per_flop <= 0:
        per_flop = large_seconds / large_flops
    fixed = max(0.0, large_seconds - per_flop * large_flops)
    return RankingTime(fixed + max(0.0, first - small_seconds), per_flop)


def time_ranking(ranker: Ranker, sample: Task, flops_per_second: float) -> RankingTime | None:
    """Rank two parts of `sample`; None if that would take too long or is refused.

    Args:
        sample: has examples; its weights may be random. flops_per_second: of its training steps.
    """
    if sample.proxy is not None or getattr(ranker, "features", None) is not None:
        # Another model would be timed, or what is stored would be that of the sample.
        return None
    try:
        large = _largest_part(ranker, sample, SECONDS * flops_per_second)
        if large is None:
            return None
        small = part_of(sample, max(FEWEST // 2, len(large.pool) // SMALLER))
        first, again, longer = (_seconds(ranker, task) for task in (small, small, large))
        costs = [_flops(ranker, task) for task in (small, large)]
        return line_through(first, (costs[0], again), (costs[1], longer)) if costs[0] < costs[1] else None
    except (CadsError, RuntimeError):
        log.debug("%s was not timed", ranker.method, exc_info=True)
        return None


def part_of(task: Task, n: int) -> Task:
    """The task with the first `n` examples of its pool, and as large a share of its target, at least one example."""
    part = copy.copy(task)
    for name in ("pool", "target"):
        whole = getattr(task, name)
        count = max(1, round(len(whole) * min(1.0, n / len(task.pool))))
        setattr(part, name, whole.subset(np.arange(count), whole.name))
    return part


def _largest_part(ranker: Ranker, sample: Task, flops: float) -> Task | None:
    """The largest part that costs at most `flops` to rank."""
    n = min(MOST, len(sample.pool))
    while n >= FEWEST:
        part = part_of(sample, n)
        if _flops(ranker, part) <= flops:
            return part
        n //= 2
    return None


def _flops(ranker: Ranker, task: Task) -> float:
    return ranker.rank_plan(task).total(SELECT).flops


def _seconds(ranker: Ranker, task: Task) -> float:
    started = time.perf_counter()
    ranker.rank(task, seed=0, ledger=Ledger())
    return time.perf_counter() - started
