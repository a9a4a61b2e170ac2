"""Found rows of a `datasets.Dataset` or `IterableDataset`, with a column of weights or with repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cads.data.origin import row_hashes
from cads.data.row_search import ROWS_AT_ONCE, FoundRows
from cads.errors import SelectionError

WEIGHT = "weight"
"""The column of weights."""


def take_rows(dataset: Any, matches: FoundRows, weights: np.ndarray | None = None) -> Any:
    """The rows of `matches`, which `find_rows` found in `dataset`.

    Args:
        dataset: map-style or streaming; the result is of the same kind.
        matches: may hold a row several times, one after another.
        weights: of each, for a column `weight`, shape (n,); None: no such column.

    Raises:
        SelectionError: if there is a column `weight` already.
    """
    if weights is not None and WEIGHT in (dataset.column_names or next(iter(dataset), {})):
        raise SelectionError(f"the dataset has a column {WEIGHT!r} already: rename or remove it first")
    if not hasattr(dataset, "__len__"):
        return _stream_of(dataset, matches, weights)
    chosen = dataset.select(matches.rows)
    return chosen if weights is None else chosen.add_column(WEIGHT, weights)


def _stream_of(dataset: Any, matches: FoundRows, weights: np.ndarray | None) -> Any:
    from datasets import Features, IterableDataset, Value

    features = dataset.features
    if features is not None and weights is not None:
        features = Features({**features, WEIGHT: Value("float64")})
    # One generator, and not `filter` with indices: the workers of a data loader count the rows of their shards anew.
    arguments = {"dataset": dataset.with_format(None), "matches": matches, "weights": weights}
    return IterableDataset.from_generator(_chosen_rows, features=features, gen_kwargs=arguments)


def _chosen_rows(dataset: Any, matches: FoundRows, weights: np.ndarray | None) -> Iterator[dict[str, Any]]:
    """The chosen rows of a stream, each as often as it is in `matches`.

    Raises:
        SelectionError: if the stream gives other rows than before.
    """
    done, count = 0, len(matches.rows)
    # Unlike `iter(dataset)`, this reads all shards, also in a worker of a data loader.
    rows = (row for shard in dataset.iter(batch_size=ROWS_AT_ONCE) for row in _rows(shard))
    for i, row in enumerate(rows):
        if done == count:
            return
        if matches.rows[done] != i:
            continue
        if row_hashes([[row.get(name)] for name in matches.key_columns])[0] != matches.keys[done]:
            raise SelectionError(
                f"row {i} of the stream is not what it was before: shuffle the result of apply() instead"
            )
        while done < count and matches.rows[done] == i:
            yield row if weights is None else {**row, WEIGHT: float(weights[done])}
            done += 1
    if done < count:
        raise SelectionError(f"the stream ended before row {matches.rows[done]}, which is selected: read it again")


def _rows(shard: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of columns of values."""
    for values in zip(*shard.values(), strict=True):
        yield dict(zip(shard, values, strict=True))
