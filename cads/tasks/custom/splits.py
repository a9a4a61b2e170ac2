"""Pools of a task of one's own: their ids and sources, and the test set, if none is given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cads.data.ids import numbered
from cads.data.pool import Examples, Pool
from cads.errors import DataError
from cads.seeding import derive
from cads.task import TEST_OF_TARGET

log = logging.getLogger(__name__)


def labelled_pool(examples: Examples, sources: Sequence[Any] | np.ndarray | None, ids: Sequence[Any] | None) -> Pool:
    """The candidates, with the name of the source of each, or None, and ids, or None for numbers.

    Raises:
        DataError: if there is not one for each example.
    """
    names = pa.array([str(x) for x in ids], pa.string()) if ids is not None else numbered("pool", len(examples))
    if sources is None:
        return Pool(names, examples)
    if len(sources) != len(examples):
        raise DataError(f"{len(sources)} sources for {len(examples)} examples of the pool: give one name each")
    present, codes = np.unique(np.array([str(x) for x in sources]), return_inverse=True)
    return Pool(names, examples, codes, present.tolist())


def target_and_test(target: Examples, test: Examples | None, seed: int) -> tuple[Pool, Pool]:
    """The pools of target and test set; without a test set, that is a half of the target, drawn by `seed`.

    Raises:
        DataError: if the target is too small for that.
    """
    ids = numbered("target", len(target))
    if test is not None:
        return Pool(ids, target, name="target"), Pool(numbered("test", len(test)), test, name="test set")
    if len(target) < 2:
        raise DataError("the target has one example, of which none is left for the test set: give a test set")
    log.warning(TEST_OF_TARGET, f"{len(target) // 2:,}", f"{len(target):,}")
    order = np.random.default_rng(derive(seed, "test set")).permutation(len(target))
    held_out, kept = np.sort(order[: len(target) // 2]), np.sort(order[len(target) // 2 :])
    return (
        Pool(ids.take(pa.array(kept)), target.take(kept), name="target"),
        Pool(ids.take(pa.array(held_out)), target.take(held_out), name="test set"),
    )
