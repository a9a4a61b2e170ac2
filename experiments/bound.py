"""A bound on the best subset where there are too many to train them all.

A random sample of subsets is trained first; local search then starts from the best of them.
"""

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
"""The best of these subsets, which are trained with the other seeds to choose on."""
PARENTS = 2
"""Subsets whose neighbours (one source more or less) are trained in each round of the local search."""
MEASURED = 8
"""The best subsets at the end of the search, which are trained with the seeds to measure on."""

Key = tuple[bool, ...]
"""A subset of the sources as a mask of length S."""


class Trained:
    """Losses and accuracies of the subsets trained so far, kept on disk.

    Args:
        cache: folder of the file. seconds: no chunk of models starts training later than this after the object is made.

    Attributes:
        results: calibrated test loss and test accuracy, by subset and seed.
    """

    def __init__(self, task: Task, flops: float, cache: Path, seconds: float) -> None:
        self._task, self._flops = task, flops
        self._file = cache / f"bound-{content_key(task, flops, 'bound')}.json"
        self._end = time.perf_counter() + seconds
        self.results: dict[tuple[Key, int], tuple[float, float]] = {}
        if self._file.exists():
            for mask, seed, loss, accuracy in json.loads(self._file.read_text()):
                self.results[tuple(map(bool, mask)), seed] = (loss, accuracy)

    def train(self, masks: Iterable[Key], seed: int) -> bool:
        """Train with `seed` those of `masks` that have no result yet; returns whether time was enough for all."""
        missing = [m for m in dict.fromkeys(masks) if (m, seed) not in self.results]
        for start in range(0, len(missing), REPLICAS):
            if time.perf_counter() > self._end:
                return False
            chunk = missing[start : start + REPLICAS]
            losses, accuracy = train_masks(
                self._task, [np.array(m) for m in chunk], self._flops, seed=derive(seed, "truth")
            )
            for mask, loss, share in zip(chunk, losses, accuracy, strict=True):
                self.results[mask, seed] = (float(loss), float(share))
            rows = [[list(map(int, mask)), s, *values] for (mask, s), values in self.results.items()]
            write_whole(self._file, rows)
        return True

    def best(self, seeds: Iterable[int], metric: int) -> list[Key]:
        """The subsets that were trained with all of `seeds`, best first.

        Args:
            metric: what to compare by: 0 is the loss, 1 the accuracy.
        """
        seeds, sign = list(seeds), 1 - 2 * metric
        complete = [m for m in dict.fromkeys(m for m, _ in self.results) if all((m, s) in self.results for s in seeds)]
        return sorted(complete, key=lambda m: (sign * sum(self.results[m, s][metric] for s in seeds), m))


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
    """The best subsets that a search finds; results of earlier runs are read from `cache`.

    The search looks only at the seeds to choose on, which are the even ones. If `seconds` are too few, it ends earlier
    with a weaker bound. Called again, it goes on from the results in `cache`.
    """
    n, flops = len(task.pool.source_names), budget.flops(task)
    trained = Trained(task, flops, cache, seconds)
    even, odd = list(range(0, seeds, 2)), list(range(1, seeds, 2))
    in_time = trained.train(sample(n, SAMPLED, derive(0, "bound")), 0)
    full = (True,) * n
    candidates = [full, *trained.best([0], 0)[:KEPT], *trained.best([0], 1)[: KEPT // 3]]
    in_time = in_time and all([trained.train(candidates, s) for s in even])
    expanded: set[Key] = set()
    while in_time:
        parents = [m for metric in (0, 1) for m in trained.best(even, metric)[:PARENTS] if m not in expanded]
        if not parents:
            break
        expanded |= set(parents)
        adjacent = [m for parent in parents for m in neighbours(parent)]
        in_time = all([trained.train(adjacent, s) for s in even])
    # The best subsets are measured even if the time has run out.
    trained = Trained(task, flops, cache, math.inf)
    best = [full, *trained.best(even, 0)[:MEASURED], *trained.best(even, 1)[:MEASURED]]
    for seed in odd if len(best) > 1 else [*even, *odd]:
        trained.train(best, seed)
    masks = list(dict.fromkeys([*best, *trained.best(even, 0)]))
    values = np.array([[trained.results.get((m, s), (np.nan, np.nan)) for s in range(seeds)] for m in masks])
    return Truth(np.array(masks), values[..., 0], values[..., 1], flops, exhaustive=False)
