"""The order of sources in a search: that of their names, whichever comes first in a file."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import numpy as np

from cads.data.pool import Pool
from cads.task import Task

_by_name: WeakKeyDictionary[Pool, Pool] = WeakKeyDictionary()
"""Pools whose sources were numbered by name before. A plan and its run share what is computed of such a pool."""


def in_name_order(task: Task) -> Task:
    """The task with the sources of its pool numbered in the order of their names.

    Readers number sources as they occur. Policies draw masks by number, so that a sorted file would give other draws.
    """
    names = task.pool.source_names
    if list(names) == sorted(names):
        return task
    other = copy.copy(task)
    other.pool = _by_name.get(task.pool) or _by_name.setdefault(task.pool, _renumbered(task.pool))
    return other


def _renumbered(pool: Pool) -> Pool:
    """The same examples in the same order, with sources numbered by name."""
    order = sorted(range(len(pool.source_names)), key=pool.source_names.__getitem__)
    number = np.empty(len(order), dtype=np.int32)
    number[order] = np.arange(len(order))
    other = copy.copy(pool)
    assert pool.sources is not None
    other.sources, other.source_names = number[pool.sources], tuple(pool.source_names[i] for i in order)
    # Computed from the old numbers.
    vars(other).pop("content_hash", None)
    return other
