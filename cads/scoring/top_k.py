"""The best of more examples than memory holds: one pass over their scores, keeping only candidates for the top."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.accounting.ledger import ROUNDING
from cads.data.ids import all_distinct, best_first
from cads.errors import ConfigError, DataError
from cads.scoring.score_files import read_groups


class TopK:
    """The best examples of a stream, by falling score and ties by id, for as long as their costs fit.

    The result is that of a ranking of the whole stream: the longest prefix whose costs sum to at most `max_cost`, and
    at least one example. The first example that does not fit is kept too. Later examples can only push it further
    back, and no example behind it can fit any more, however cheap it is. Memory is twice that of the examples kept,
    and that of one shard.

    Args:
        max_cost: largest sum of the costs; without costs, the number of examples.

    Raises:
        ConfigError: if `max_cost` is not positive.
    """

    def __init__(self, max_cost: float) -> None:
        if not max_cost > 0:
            raise ConfigError(f"the best {max_cost} examples: give a positive number")
        self._max_cost = max_cost
        self._kept: pa.Table | None = None
        self._new: list[pa.Table] = []
        self._n_new = 0
        self._min_score = -np.inf
        self._n_fit = 0

    def add(self, ids: pa.Array, score: np.ndarray, cost: np.ndarray | None = None, **columns: np.ndarray) -> None:
        """Add the examples of one shard.

        Args:
            ids: strings, shape (n,).
            score: finite, shape (n,).
            cost: of each example, > 0, shape (n,); None: 1 each.
            columns: what else is kept of each example, shape (n,), by the same names in all shards.

        Raises:
            DataError: if a score or a cost is outside its range, or there is not one per id.
        """
        cost = np.ones(len(ids)) if cost is None else np.asarray(cost, dtype=np.float64)
        if ids.type != pa.string() or not score.shape == cost.shape == (len(ids),):
            raise DataError(
                f"{len(ids)} ids of type {ids.type} with scores of shape {score.shape} and costs of {cost.shape}: give "
                "strings, and one of each to each"
            )
        if not (np.isfinite(score).all() and np.isfinite(cost).all() and (cost > 0).all()):
            raise DataError("a score that is not finite, or a cost that is not positive: look at these examples")
        # An example worse than the first that does not fit cannot be in the result; an equal one may win by its id.
        candidates = pa.array(score >= self._min_score)
        rows = pa.table({"id": ids, "score": np.asarray(score, dtype=np.float64), "cost": cost, **columns})
        self._new.append(rows.filter(candidates))
        self._n_new += len(self._new[-1])
        if self._kept is None or self._n_new >= len(self._kept):
            self._cut()

    def result(self) -> tuple[pa.Array, np.ndarray]:
        """The ids and scores (float64, shape (k,)) of the best, best first.

        Raises:
            DataError: if an id occurs twice among them.
        """
        best = self.table()
        return best["id"].combine_chunks(), best["score"].to_numpy()

    def table(self) -> pa.Table:
        """The best, best first: `id`, `score`, `cost`, and the columns that were given.

        Raises:
            DataError: if an id occurs twice among them, or nothing was added.
        """
        self._cut()
        if self._kept is None:
            raise DataError("the best of no examples: add some")
        best = self._kept.slice(0, max(1, self._n_fit))
        ids = best["id"].combine_chunks()
        if not all_distinct(ids):
            counts = pc.value_counts(ids)
            repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            raise DataError(f"{len(repeated)} ids are scored more than once, such as {repeated[:3].to_pylist()}")
        return best

    def _cut(self) -> None:
        """Keep the prefix that fits, and the example after it."""
        if not self._new:
            return
        table = pa.concat_tables([*([] if self._kept is None else [self._kept]), *self._new]).combine_chunks()
        self._new, self._n_new = [], 0
        order = best_first(table["id"], table["score"].to_numpy())
        cumulative_cost = np.cumsum(table["cost"].to_numpy()[order])
        self._n_fit = int(np.searchsorted(cumulative_cost, self._max_cost * ROUNDING, side="right"))
        self._kept = table.take(pa.array(order[: self._n_fit + 1]))
        if self._n_fit < len(order):
            self._min_score = float(self._kept["score"][-1].as_py())


def best_of_files(paths: Iterable[Path | str], max_count: float) -> tuple[pa.Array, np.ndarray]:
    """The ids and scores of the `max_count` best examples in score files, best first, as in one ranking of all.

    Raises:
        DataError: if a file cannot be read, or an id occurs twice among the best.
    """
    best = TopK(max_count)
    for ids, score in read_groups(paths):
        best.add(ids, score)
    return best.result()
