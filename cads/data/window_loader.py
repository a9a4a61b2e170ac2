"""Loads the batches of several steps together, where all their rows are known beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.training_batches import collated, joined

Rows = tuple[np.ndarray, np.ndarray]
"""Positions in the pool and in the target that one step trains on, int64, shape (n,) each."""


class WindowLoader:
    """The batches of a window of steps. In each step, rows of the pool come before those of the target.

    Args:
        pool, target: whose examples are loaded.
        workers: threads that load the steps of a window ahead. Without them (0), the rows of a window are read at once
            and cut into steps, if all have the same shape: a read costs more than its rows where these are small.
    """

    def __init__(self, pool: Pool, target: Pool, *, workers: int) -> None:
        self._pools = pool, target
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._at_once = not workers and _same_shape(pool, target)
        self._steps: Iterator[list[Batch]] = iter(())

    def begin(self, steps: Sequence[Rows]) -> None:
        """Load `steps` next."""
        steps, loaded = list(steps), self._cut if self._at_once else self._each
        self._steps = iter(loaded(steps) if steps else ())

    def __next__(self) -> list[Batch]:
        """The batches of the next step; see `collated`."""
        return next(self._steps)

    def _each(self, steps: Sequence[Rows]) -> Iterable[list[Batch]]:
        return map(self._load, steps) if self._threads is None else self._threads.map(self._load, steps)

    def _load(self, rows: Rows) -> list[Batch]:
        (pool, target), (pool_rows, target_rows) = self._pools, rows
        return collated((pool, pool_rows), (target, target_rows))

    def _cut(self, steps: Sequence[Rows]) -> Iterable[list[Batch]]:
        (whole,) = self._load((np.concatenate([p for p, _ in steps]), np.concatenate([t for _, t in steps])))
        counts = [len(rows) for step in steps for rows in step]
        is_target = np.repeat(np.tile([False, True], len(steps)), counts)
        # In `whole`, all rows of the pool come before all of the target.
        index = np.empty(len(whole), dtype=np.int64)
        index[~is_target], index[is_target] = np.split(np.arange(len(whole)), [np.count_nonzero(~is_target)])
        ends = np.cumsum(counts)[1::2].tolist()
        whole = whole.take(torch.from_numpy(index))
        return [[whole.part(start, end)] for start, end in zip([0, *ends], ends, strict=False)]


def _same_shape(*pools: Pool) -> bool:
    """Whether all examples of `pools` can be in one batch."""
    representatives = [(pool, pool.examples.shapes()[0]) for pool in pools]
    batches = [pool.batch(positions[:1]) for pool, positions in representatives if len(positions) == 1]
    return len(batches) == len(pools) and len(joined(batches, 1)) == 1
