"""Ids of examples, names of sources, and orders of examples: by id, and by score (ties are broken by id)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DIGITS = 5
"""Minimum number of digits in an id."""


def numbered(name: str, count: int) -> pa.Array:
    """Ids for examples that have none: `name-00000` and so on, in ascending order."""
    numbers = pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), max(DIGITS, len(str(count - 1))), "0")
    return pc.binary_join_element_wise(pa.scalar(name), numbers, "-")


def ascending(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Whether each id is greater than the one before it, as in most data sets. Ascending ids are unique."""
    return len(ids) < 2 or bool(pc.all(pc.less(ids[:-1], ids[1:])).as_py())


def all_distinct(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all ids are unique. Only ids that do not ascend need a hash table, about 100 bytes an id."""
    return ascending(ids) or pc.count_distinct(ids).as_py() == len(ids)


def id_order(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Positions in the order of the ids, int64, shape (N,). They name the same examples, however rows are ordered."""
    return np.arange(len(ids)) if ascending(ids) else np.asarray(pc.sort_indices(ids)).astype(np.int64)


def best_first(ids: pa.Array, score: np.ndarray) -> np.ndarray:
    """Positions in descending order of `score` (shape (N,)), ties by id; int64, shape (N,)."""
    if ascending(ids):
        return np.argsort(-score, kind="stable")
    order = pc.sort_indices(pa.table({"id": ids, "score": score}), [("score", "descending"), ("id", "ascending")])
    return np.asarray(order).astype(np.int64)


def rank_by_score(ids: pa.Array, score: np.ndarray) -> np.ndarray:
    """Rank of each example by `score` (shape (N,)): 0 has the highest score, ties by id; int64, shape (N,)."""
    order = best_first(ids, score)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def as_dictionary(names: pa.Array | Sequence[str] | None) -> pa.DictionaryArray | None:
    """Names as a dictionary array of int32 codes."""
    if names is None:
        return None
    column = names if isinstance(names, pa.Array) else pa.array(names, pa.string())
    return column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
