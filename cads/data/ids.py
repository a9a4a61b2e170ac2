"""The order of examples: by their ids, and by their scores, the higher the better and ties by id."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DIGITS = 5
"""Least digits of the number in an id."""


def numbered(name: str, count: int) -> pa.Array:
    """Ids for examples that have none, `name-00000` and so on: they ascend."""
    numbers = pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), max(DIGITS, len(str(count - 1))), "0")
    return pc.binary_join_element_wise(pa.scalar(name), numbers, "-")


def ascending(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Whether each id is greater than the one before it, as those of most data sets are: then none is twice there."""
    return len(ids) < 2 or bool(pc.all(pc.less(ids[:-1], ids[1:])).as_py())


def distinct(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Whether no id is twice there. Only ids that do not ascend need a table of all of them, 100 bytes each."""
    return ascending(ids) or pc.count_distinct(ids).as_py() == len(ids)


def best_first(ids: pa.Array, score: np.ndarray) -> np.ndarray:
    """Positions by falling score (shape (N,)), ties by id; int64, shape (N,)."""
    if ascending(ids):
        return np.argsort(-score, kind="stable")
    order = pc.sort_indices(pa.table({"id": ids, "score": score}), [("score", "descending"), ("id", "ascending")])
    return np.asarray(order).astype(np.int64)


def rank_by_score(ids: pa.Array, score: np.ndarray) -> np.ndarray:
    """Place of each example by falling score (shape (N,)), 0 is best, ties by id; int64, shape (N,)."""
    order = best_first(ids, score)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank
