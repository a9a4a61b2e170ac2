"""The best of more examples than memory holds: one pass over their scores, keeping what can still be among them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.accounting.ledger import ROUNDING
from cads.data.ids import best_first, distinct
from cads.errors import ConfigError, DataError
from cads.scoring.score_files import read_groups


class TopK:
    """The best examples of a stream, by falling score and ties by id, for as long as their costs fit.

    It keeps what a ranking of the whole stream would: the longest prefix whose costs sum to at most `most`, and at
    least one example. The first that does not fit is kept beside them: whatever comes later can only push it further
    back, and nothing behind it can fit any more, however cheap it is. Memory is that of the examples kept, twice, and
    of one shard.

    Args:
        most: sum of the costs; without costs, how many examples.

    Raises:
        ConfigError: if `most` is not positive.
    """

    def __init__(self, most: float) -> None:
        if not most > 0:
            raise ConfigError(f"the best {most} examples: give a positive number")
        self._most = most
        self._kept = _rows(pa.array([], pa.string()), np.empty(0), np.empty(0))
        self._new: list[pa.Table] = []
        self._n_new = 0
        self._least = -np.inf
        self._n_fit = 0

    def add(self, ids: pa.Array, score: np.ndarray, cost: np.ndarray | None = None) -> None:
        """Look at one shard.

        Args:
            score: shape (n,). cost: of each example, > 0, shape (n,); None: 1 each.

        Raises:
            DataError: if a score or a cost is not such a number, or there is not one an id.
        """
        cost = np.ones(len(ids)) if cost is None else np.asarray(cost, dtype=np.float64)
        if ids.type != pa.string() or not score.shape == cost.shape == (len(ids),):
            raise DataError(
                f"{len(ids)} ids of type {ids.type} with scores of shape {score.shape} and costs of {cost.shape}: give "
                "strings, and one of each to each"
            )
        if not (np.isfinite(score).all() and np.isfinite(cost).all() and (cost > 0).all()):
            raise DataError("a score that is not finite, or a cost that is not positive: look at these examples")
        # What is worse than the first that does not fit need not be sorted; what is as good may win by its id.
        candidates = pa.array(score >= self._least)
        self._new.append(_rows(ids, score, cost).filter(candidates))
        self._n_new += len(self._new[-1])
        if self._n_new >= len(self._kept):
            self._cut()

    def result(self) -> tuple[pa.Array, np.ndarray]:
        """The ids and scores (float64, shape (k,)) of the best, best first.

        Raises:
            DataError: if an id is twice among them.
        """
        self._cut()
        kept = self._kept.slice(0, max(1, self._n_fit))
        ids = kept["id"].combine_chunks()
        if not distinct(ids):
            counts = pc.value_counts(ids)
            twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            raise DataError(f"{len(twice)} ids are scored more than once, such as {twice[:3].to_pylist()}")
        return ids, kept["score"].to_numpy()

    def _cut(self) -> None:
        """Keep the prefix that fits, and the one after it."""
        table = pa.concat_tables([self._kept, *self._new]).combine_chunks()
        self._new, self._n_new = [], 0
        order = best_first(table["id"], table["score"].to_numpy())
        spent = np.cumsum(table["cost"].to_numpy()[order])
        self._n_fit = int(np.searchsorted(spent, self._most * ROUNDING, side="right"))
        self._kept = table.take(pa.array(order[: self._n_fit + 1]))
        if self._n_fit < len(order):
            self._least = float(self._kept["score"][-1].as_py())


def best_of_files(paths: Iterable[Path | str], most: float) -> tuple[pa.Array, np.ndarray]:
    """The ids and scores of the `most` best examples in score files, best first, as one ranking of all would have them.

    Raises:
        DataError: if a file cannot be read, or an id is twice among the best.
    """
    best = TopK(most)
    for ids, score in read_groups(paths):
        best.add(ids, score)
    return best.result()


def _rows(ids: pa.Array, score: np.ndarray, cost: np.ndarray) -> pa.Table:
    return pa.table({"id": ids, "score": np.asarray(score, dtype=np.float64), "cost": cost})
