"""A bound where subsets are too many to train them all: a random sample, and local search from the best of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cads.accounting.budget import Budget
from cads.seeding import derive
from cads.task import Task
from experiments.truth import REPLICAS, Truth, content_key, train_masks, write_whole

SAMPLED = 160
"""Random subsets that are trained with the first seed."""
KEPT = 24
"""Of these, the best are trained with the other seeds to choose on."""
PARENTS = 2
"""Subsets whose neighbours (one source more or less) are trained in each round of the local search."""
MEASURED = 8
"""The best subsets in the end, which are trained with the seeds to measure on."""

Key = tuple[bool, ...]


class Trained:
    """What has been trained so far, kept on disk: losses and accuracies by subset and seed.

    Args:
        seconds: training stops at the first chunk that begins later than this after the start.
    """

    def __init__(self, task: Task, flops: float, cache: Path, seconds: float) -> None:
        self._task, self._flops = task, flops
        self._file = cache / f"bound-{content_key(task, flops, 'bound')}.json"
        self._end = time.perf_counter() + seconds
        self.found: dict[tuple[Key, int], tuple[float, float]] = {}
        if self._file.exists():
            for mask, seed, loss, accuracy in json.loads(self._file.read_text()):
                self.found[tuple(map(bool, mask)), seed] = (loss, accuracy)

    def train(self, masks: Iterable[Key], seed: int) -> bool:
        """Train what is missing of `masks` with `seed`; whether time was enough."""
        missing = [m for m in dict.fromkeys(masks) if (m, seed) not in self.found]
        for start in range(0, len(missing), REPLICAS):
            if time.perf_counter() > self._end:
                return False
            chunk = missing[start : start + REPLICAS]
            losses, accuracy = train_masks(
                self._task, [np.array(m) for m in chunk], self._flops, seed=derive(seed, "truth")
            )
            for mask, loss, share in zip(chunk, losses, accuracy, strict=True):
                self.found[mask, seed] = (float(loss), float(share))
            rows = [[list(map(int, mask)), s, *values] for (mask, s), values in self.found.items()]
            write_whole(self._file, rows)
        return True

    def best(self, seeds: Iterable[int], what: int) -> list[Key]:
        """The subsets that were trained with all of `seeds`, best first.

        Args:
            what: 0 to compare by loss, 1 by accuracy.
        """
        seeds, sign = list(seeds), 1 - 2 * what
        complete = [m for m in dict.fromkeys(m for m, _ in self.found) if all((m, s) in self.found for s in seeds)]
        return sorted(complete, key=lambda m: (sign * sum(self.found[m, s][what] for s in seeds), m))


def neighbours(mask: Key) -> list[Key]:
    """The subsets with one source more or less, the empty one left out."""
    flipped = [(*mask[:i], not mask[i], *mask[i + 1 :]) for i in range(len(mask))]
    return [m for m in flipped if any(m)]


def sample(n: int, count: int, seed: int) -> list[Key]:
    """All sources, each source alone, and random subsets of evenly spread sizes; distinct, at most `count`."""
    rng = np.random.default_rng(seed)
    rows = [np.ones(n, dtype=bool), *np.eye(n, dtype=bool)]
    rows += list(rng.random((4 * count, n)) < rng.uniform(0.15, 0.95, (4 * count, 1)))
    distinct = dict.fromkeys(tuple(map(bool, row)) for row in rows if row.any())
    return list(distinct)[:count]


def bound(task: Task, budget: Budget, seeds: int, cache: Path, *, seconds: float = math.inf) -> Truth:
    """The best subsets that a search finds; what was trained before is read from `cache`.

    The search looks at the seeds to choose on (the even ones) alone. With less time than it needs it ends
    earlier, with a weaker bound; started again it goes on.
    """
    n, flops = len(task.pool.source_names), budget.flops(task)
    trained = Trained(task, flops, cache, seconds)
    even, odd = list(range(0, seeds, 2)), list(range(1, seeds, 2))
    going = trained.train(sample(n, SAMPLED, derive(0, "bound")), 0)
    full = (True,) * n
    kept = [full, *trained.best([0], 0)[:KEPT], *trained.best([0], 1)[: KEPT // 3]]
    going = going and all([trained.train(kept, s) for s in even])
    expanded: set[Key] = set()
    while going:
        parents = [m for what in (0, 1) for m in trained.best(even, what)[:PARENTS] if m not in expanded]
        if not parents:
            break
        expanded |= set(parents)
        near = [m for parent in parents for m in neighbours(parent)]
        going = all([trained.train(near, s) for s in even])
    # Time that has run out must not leave the best without a measure.
    trained = Trained(task, flops, cache, math.inf)
    best = [full, *trained.best(even, 0)[:MEASURED], *trained.best(even, 1)[:MEASURED]]
    for seed in odd if len(best) > 1 else [*even, *odd]:
        trained.train(best, seed)
    masks = list(dict.fromkeys([*best, *trained.best(even, 0)]))
    values = np.array([[trained.found.get((m, s), (np.nan, np.nan)) for s in range(seeds)] for m in masks])
    return Truth(np.array(masks), values[..., 0], values[..., 1], flops, exhaustive=False)
