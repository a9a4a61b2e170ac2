"""The rows of a `datasets.Dataset` or `IterableDataset` that stand for the examples of a pool.

Rows are found by the contents of whole files (`cads.data.origin`), or by a column of ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.ids import all_distinct
from cads.data.origin import Origin, file_digest, row_hashes
from cads.errors import SelectionError

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows that are read as Python objects at a time."""
DEFAULT_ID = "id"
"""The column of ids where none is named or recorded."""
SHOWN = 3
"""Ids and files that a message names."""


@dataclass(frozen=True, eq=False)
class FoundRows:
    """The rows of a data set that stand for selected examples.

    Attributes:
        examples: positions in the pool of the selected examples that were found, int64, shape (n,).
        rows: the row of each in the data set, int64, shape (n,), ascending.
        key_columns: columns by whose contents a row is recognised when a stream is read again.
        keys: the hash of these columns in each row, uint64, shape (n,).
        absent: locations of the files that the data set does not hold.
    """

    examples: np.ndarray
    rows: np.ndarray
    key_columns: tuple[str, ...]
    keys: np.ndarray
    absent: tuple[str, ...] = ()

    def repeated(self, counts: np.ndarray) -> FoundRows:
        """Each row `counts` times (int64, shape (n,)), one after another."""
        examples, rows, keys = (np.repeat(values, counts) for values in (self.examples, self.rows, self.keys))
        return replace(self, examples=examples, rows=rows, keys=keys)


class DatasetReader:
    """Reads columns of a map-style or streaming data set of the library `datasets`.

    Raises:
        SelectionError: if it is something else, such as a dictionary of splits.
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, dict):
            raise SelectionError(f"this holds the splits {sorted(map(str, dataset))}: give one of them")
        if not all(hasattr(dataset, name) for name in ("column_names", "select_columns", "with_format")):
            raise SelectionError(
                f"a {type(dataset).__name__} has no rows to choose: give a Dataset or IterableDataset of `datasets`, "
                "such as load_dataset('json', data_files=..., split='train')"
            )
        self.dataset = dataset
        self.streaming = not hasattr(dataset, "__len__")

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns; those of the first row where a stream does not know them before."""
        if self.dataset.column_names is not None:
            return list(self.dataset.column_names)
        return list(next(iter(self.dataset), {}))

    def shards(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """The values of `columns`, `ROWS_AT_ONCE` rows at a time, in order; missing values are None."""
        data = self.dataset.with_format(None)
        if data.column_names is not None:
            yield from data.select_columns(list(columns)).iter(batch_size=ROWS_AT_ONCE)
            return
        for shard in data.iter(batch_size=ROWS_AT_ONCE):
            absent = [None] * len(next(iter(shard.values())))
            yield {name: shard.get(name, absent) for name in columns}

    def hashes(self, columns: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], np.ndarray]:
        """The hash of each row over each of several sets of columns, uint64, shape (n,) each; one pass for all."""
        names = list(dict.fromkeys(name for group in columns for name in group))
        parts: dict[tuple[str, ...], list[np.ndarray]] = {group: [] for group in columns}
        for shard in self.shards(names):
            for group, hashes in parts.items():
                hashes.append(row_hashes([shard[name] for name in group]))
        return {group: np.concatenate([np.empty(0, np.uint64), *hashes]) for group, hashes in parts.items()}

    def ids(self, column: str) -> pa.Array:
        """A column of ids as strings, null where there is none.

        Raises:
            SelectionError: if the column is missing, or holds neither strings nor numbers.
        """
        if column not in self.columns:
            raise SelectionError(f"the dataset has no column {column!r}: it has {self.columns}")
        parts = [_as_ids(shard[column], column) for shard in self.shards([column])]
        return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def _as_ids(values: Sequence[Any], column: str) -> pa.Array:
    """Ids as strings.

    Arrow converts values of one type at once. Where types are mixed, or numbers are too large for it, Python does.

    Raises:
        SelectionError: if a value is neither text nor a whole number.
    """
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        array = None
    kind = pa.null() if array is None else array.type
    if array is not None and (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        return array.cast(pa.string())
    for value in values:
        if not (value is None or isinstance(value, str | int)) or isinstance(value, bool):
            raise SelectionError(
                f"column {column!r} holds {type(value).__name__} values, such as {value!r:.60}: name a column of "
                "strings or whole numbers"
            )
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def find_rows(
    dataset: Any, ids: pa.Array, selected: np.ndarray, origin: Origin | None, id_column: str | None = None
) -> FoundRows:
    """The rows of `dataset` that stand for the selected examples.

    Without `id_column`, the data set is first compared with the files that the pool was read from: it may hold any of
    them, each whole, in any order. If it does not, its rows are found by their ids.

    Args:
        ids: of the pool, shape (N,). selected: bool, shape (N,). origin: of the pool, or None if it is not known.
        id_column: where ids are; None: the column that the pool's ids were read from.

    Raises:
        SelectionError: if the rows of a selected example are missing or ambiguous, with the remedy.
    """
    reader = DatasetReader(dataset)
    if origin is None or id_column is not None:
        return _by_id(reader, ids, selected, origin, id_column or DEFAULT_ID)
    matches = _by_contents(reader, selected, origin)
    if matches is not None:
        return matches
    columns = dict.fromkeys(file.id_column for file in origin.files if file.id_column is not None)
    present = [column for column in columns if column in reader.columns]
    if not present:
        raise SelectionError(
            f"the dataset is none of the files that the pool was read from ({_few([f.location for f in origin.files])})"
            ", or it was changed, shuffled or filtered, and it has no column of their ids: give these files as they "
            "were, each whole (of CSV files with every column as text), or name a column of ids in id_column"
        )
    if all(name in reader.columns for file in origin.files for name in file.columns):
        log.warning(
            "the data is not made of whole files that the pool was read from: rows are found by their ids, whatever "
            "their contents are"
        )
    return _by_id(reader, ids, selected, origin, present[0])


def _by_contents(reader: DatasetReader, selected: np.ndarray, origin: Origin) -> FoundRows | None:
    """The rows of selected examples, if the data set is made of whole files; else None.

    Raises:
        SelectionError: if it holds one of several files that are equal, so that their rows cannot be told apart.
    """
    files = [i for i, file in enumerate(origin.files) if set(file.columns) <= set(reader.columns)]
    if not files:
        return None
    all_columns = tuple(dict.fromkeys(name for i in files for name in origin.files[i].columns))
    hashes = reader.hashes(list(dict.fromkeys([all_columns, *(origin.files[i].columns for i in files)])))
    starts = _file_starts(files, origin, hashes)
    if starts is None:
        return None
    _check_copies(starts, origin)
    return _by_row(starts, selected, origin, all_columns, hashes[all_columns])


def _file_starts(
    files: Sequence[int], origin: Origin, hashes: Mapping[tuple[str, ...], np.ndarray]
) -> dict[int, int] | None:
    """The first row of each file in a data set that is made of whole files; else None.

    Args:
        files: that may be in it. hashes: of all rows of the data set, by the columns that they cover.
    """
    total = len(next(iter(hashes.values())))
    starts: dict[int, int] = {}
    start = 0
    while start < total:
        # Of two files of which one begins like the other, the longer one is tried first.
        for i in sorted(set(files) - set(starts), key=lambda i: (-origin.files[i].rows, i)):
            file = origin.files[i]
            if file.rows and file_digest(hashes[file.columns][start : start + file.rows]) == file.digest:
                starts[i] = start
                start += file.rows
                break
        else:
            return None
    return starts


def _check_copies(starts: dict[int, int], origin: Origin) -> None:
    """Refuse a file of which an equal copy, which the pool was read from too, is not in the data set."""
    for i in starts:
        file = origin.files[i]
        for j, other in enumerate(origin.files):
            if j not in starts and (other.columns, other.digest) == (file.columns, file.digest):
                raise SelectionError(
                    f"{file.location} and {other.location} have the same contents, so that the rows of one cannot be "
                    "told from those of the other: give a dataset with all files of the pool, or with ids"
                )


def _by_row(
    starts: dict[int, int], selected: np.ndarray, origin: Origin, key_columns: tuple[str, ...], keys: np.ndarray
) -> FoundRows:
    """The rows of selected examples, by the first row of each file. keys: of all rows of the data set."""
    offsets = np.full(len(origin.files), -1, dtype=np.int64)
    offsets[list(starts)] = list(starts.values())
    examples = np.flatnonzero(selected & (offsets[origin.file] >= 0))
    rows = offsets[origin.file[examples]] + origin.row[examples]
    order = np.argsort(rows)
    absent = tuple(file.location for i, file in enumerate(origin.files) if i not in starts)
    return FoundRows(examples[order], rows[order], key_columns, keys[rows[order]], absent)


def _by_id(reader: DatasetReader, ids: pa.Array, selected: np.ndarray, origin: Origin | None, column: str) -> FoundRows:
    """The rows of selected examples, by their ids."""
    row_ids = reader.ids(column)
    examples = np.flatnonzero(selected)
    selected_ids = ids.take(pa.array(examples))
    rows = pc.index_in(selected_ids, value_set=row_ids.drop_null())
    missing = np.asarray(pc.is_null(rows))
    absent = _absent_files(row_ids, ids, examples, missing, origin)
    if origin is not None:
        missing = missing & ~np.isin(origin.file[examples], absent)
    if missing.any():
        raise SelectionError(
            f"{int(missing.sum())} selected ids are not in column {column!r}, such as "
            f"{selected_ids.filter(pa.array(missing))[:SHOWN].to_pylist()}: use the data that the selection was made "
            "from"
        )
    present = ~np.asarray(pc.is_null(rows))
    # Null ids were left out of the search: count rows with them again.
    places = np.flatnonzero(np.asarray(pc.is_valid(row_ids)))
    indices = rows.filter(pa.array(present)).to_numpy(zero_copy_only=False).astype(np.int64)
    _check_once(row_ids, selected_ids, column)
    order = np.argsort(places[indices])
    names = () if origin is None else tuple(origin.files[i].location for i in absent)
    keys = row_hashes([selected_ids.filter(pa.array(present)).take(pa.array(order)).to_pylist()])
    return FoundRows(examples[present][order], places[indices][order], (column,), keys, names)


def _check_once(row_ids: pa.Array, selected_ids: pa.Array, column: str) -> None:
    """Refuse selected ids that stand on two rows."""
    hits = row_ids.filter(pc.is_in(row_ids, value_set=selected_ids))
    if not all_distinct(hits):
        counts = pc.value_counts(hits)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise SelectionError(
            f"{len(twice)} selected ids stand on several rows of column {column!r}, such as "
            f"{twice[:SHOWN].to_pylist()}: remove the copies, or name a column of unique ids"
        )


def _absent_files(
    row_ids: pa.Array, ids: pa.Array, examples: np.ndarray, missing: np.ndarray, origin: Origin | None
) -> list[int]:
    """The files of which the data set has no id, if it has those of another one; rows without ids rule that out."""
    if origin is None or not missing.any() or row_ids.null_count:
        return []
    known = np.asarray(pc.is_in(ids, value_set=row_ids))
    if not known.any():
        return []
    counts = np.bincount(origin.file[known], minlength=len(origin.files))
    concerned = np.unique(origin.file[examples[missing]])
    return [int(i) for i in concerned if counts[i] == 0]


def _few(names: Sequence[str]) -> str:
    first_names = ", ".join(names[:SHOWN])
    return first_names if len(names) <= SHOWN else f"{first_names} and {len(names) - SHOWN} more"
