"""Text data from files and from the hub: rows, their columns and their ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.ids import numbered
from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted
from cads.tasks.language.formats import Format, needed_columns, recognise

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows that are held as Python objects at a time while they are encoded."""
COLUMNS = ("messages", "prompt", "context", "response", "text", "id", "source", "subtask")
"""Roles that a column can have."""
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
LIMIT = 5
"""First word of the seed that draws `limit` rows."""


@dataclass
class TextSource:
    """Where examples come from: a file, a folder of `datasets`, or a data set on the hub."""

    name: str = ""
    """Name of the source; empty: the name of the file or data set."""
    path: str | None = None
    """A .json, .jsonl, .parquet or .csv file, or a folder written by `Dataset.save_to_disk`."""
    dataset: str | None = None
    """Name of a data set on the hub, instead of a path."""
    config: str | None = None
    """dataset: its configuration."""
    split: str = "train"
    """dataset: its split."""
    format: Format | None = None
    """messages (conversations), prompt (and response), or text; null: recognised by the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column stands for messages, prompt, context, response, text, id, source or subtask."""
    limit: int | None = None
    """Draw this many rows by `data_seed`; null: all."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(f"source {self.name!r} needs a path or a dataset, one of the two")
        if self.format is not None and self.format not in get_args(Format):
            raise ConfigError(f"format = {self.format!r}: choose from {list(get_args(Format))}")
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"columns stand for {unknown}, which is unknown: use {', '.join(COLUMNS)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit = {self.limit}: it must be at least 1")
        self.name = self.name or Path(str(self.path or self.dataset)).stem

    @property
    def location(self) -> str:
        """Path or name of the data set, for messages."""
        return str(self.path or self.dataset)


@dataclass(frozen=True)
class Rows:
    """Rows of one format, not yet tokens.

    Attributes:
        table: text columns, named by role: `messages`, `prompt`, `context`, `response` or `text`.
        format: of all rows.
        ids: one for each row. name: of the source.
        sources, subtasks: a name for each row, or None.
        table_positions: positions of the rows in `table`, ascending, int64; None if they are all of the table. With
            them, rows that are drawn from a table on disk stay on disk.
    """

    table: pa.Table
    format: Format
    ids: pa.Array
    name: str
    sources: pa.Array | None = None
    subtasks: pa.Array | None = None
    table_positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: np.ndarray) -> Rows:
        """The rows at `positions`, ascending, int64."""
        index = pa.array(positions)
        sources, subtasks = (None if x is None else x.take(index) for x in (self.sources, self.subtasks))
        table_positions = positions if self.table_positions is None else self.table_positions[positions]
        return replace(
            self, ids=self.ids.take(index), sources=sources, subtasks=subtasks, table_positions=table_positions
        )

    def shards(self) -> Iterator[tuple[pa.Array, pa.Table]]:
        """Ids and contents of `ROWS_AT_ONCE` rows at a time, in order."""
        size = ROWS_AT_ONCE
        if self.table_positions is None:
            for start in range(0, len(self), size):
                yield self.ids.slice(start, size), self.table.slice(start, size)
            return
        # `Table.take` would copy a table of many chunks whole.
        batches = self.table.to_batches()
        ends = np.cumsum([len(batch) for batch in batches])
        for start in range(0, len(self), size):
            positions = self.table_positions[start : start + size]
            batch_of = np.searchsorted(ends, positions, side="right")
            drawn = []
            for i in np.unique(batch_of).tolist():
                first = ends[i] - len(batches[i])
                drawn.append(batches[i].take(pa.array(positions[batch_of == i] - first)))
            yield self.ids.slice(start, size), pa.Table.from_batches(drawn)


def load_rows(source: TextSource, seed: int, *, given_sources: bool = False) -> Rows:
    """Read a source.

    A folder of `datasets` and a data set on the hub stay on disk; JSON, Parquet and CSV files are held in memory. A
    format or column that is not named is recognised and logged.

    Args:
        seed: of the rows that `limit` draws.
        given_sources: whether a column called `source` is recognised as the source of each row.

    Raises:
        DataError: if the source cannot be read, is empty, or a column is missing.
    """
    table = _table(source)
    if not len(table):
        raise DataError(f"{source.location} is empty: it needs at least one row")
    chosen, columns = _columns(source, table.column_names)
    ids = numbered(source.name, len(table)) if "id" not in columns else _strings(table, columns["id"], source)
    if given_sources and "source" in table.column_names:
        columns.setdefault("source", "source")
    if (chosen, columns) != (source.format, source.columns):
        read_as = ", ".join(role if role == name else f"{role} = {name}" for role, name in columns.items())
        log.info("%s (%s): recognised as %s, from columns %s", source.name, source.location, chosen, read_as)
    sources = None if "source" not in columns else _strings(table, columns["source"], source)
    subtasks = None if "subtask" not in columns else _strings(table, columns["subtask"], source)
    text_columns = {role: name for role, name in columns.items() if role not in ("id", "source", "subtask")}
    content = pa.table({role: table[name] for role, name in text_columns.items()})
    rows = Rows(content, chosen, ids, source.name, sources, subtasks)
    if source.limit is None or source.limit >= len(rows):
        return rows
    drawn = np.random.default_rng((LIMIT, seed)).permutation(len(rows))[: source.limit]
    return rows.take(np.sort(drawn))


def _columns(source: TextSource, present: Sequence[str]) -> tuple[Format, dict[str, str]]:
    """The format, and the column of each role; those that are not given are recognised."""
    columns = {"id": "id", **source.columns} if "id" in present else dict(source.columns)
    absent = sorted(set(source.columns.values()) - set(present))
    if absent:
        raise DataError(f"{source.location} has no columns {absent}: it has {list(present)}")
    complete = [f for f in get_args(Format) if set(needed_columns(f)) <= set(columns)]
    if source.format is None and complete:
        return complete[0], columns
    if source.format is None:
        chosen, recognised = recognise(present, source.location)
        if chosen == "prompt" and recognised["prompt"] == "instruction" and "input" in present:
            recognised["context"] = "input"
        return chosen, {**recognised, **columns}
    for role in needed_columns(source.format):
        if role not in columns and role not in present:
            recognised = recognise(present, source.location)[1]
            if role not in recognised:
                raise DataError(
                    f"{source.location} has no column for {role}, which format = {source.format} needs: "
                    "name it in columns"
                )
            columns[role] = recognised[role]
        columns.setdefault(role, role)
    return source.format, columns


def _table(source: TextSource) -> pa.Table:
    if source.dataset is not None:
        return _hub(source)
    path = Path(str(source.path))
    if path.is_dir():
        return _saved(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a file ({', '.join(SUFFIXES)}) or a folder of `datasets`")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} has the suffix {path.suffix!r}: use one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.ParquetFile(path, memory_map=True).read()
        return _csv(path) if path.suffix == ".csv" else _json(path)
    except (pa.ArrowException, ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _csv(path: Path) -> pa.Table:
    """A file with a header; every value is read as text, numbers too."""
    from pyarrow import csv

    parsing = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, parse_options=parsing) as reader:
        types = {name: pa.string() for name in reader.schema.names}
    return csv.read_csv(path, parse_options=parsing, convert_options=csv.ConvertOptions(column_types=types))


def _json(path: Path) -> pa.Table:
    """A file with one object per line, or with one list of objects."""
    with path.open("rb") as file:
        first_byte = file.read(1024).lstrip()[:1]
    if first_byte != b"[":
        from pyarrow import json as lines

        # A block must hold the longest line.
        return lines.read_json(path, read_options=lines.ReadOptions(block_size=2**26))
    rows = json.loads(path.read_text())
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every entry of the list must be an object")
    return pa.Table.from_pylist(rows)


def _saved(path: Path) -> pa.Table:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no folder of `datasets`: {error}") from error
    if not isinstance(loaded, Dataset):
        raise DataError(f"{path} holds several splits {sorted(loaded)}: give the folder of one")
    return _in_order(loaded)


def _in_order(loaded: Any) -> pa.Table:
    # `datasets` copies rows that were selected or shuffled into a new table first.
    ordered = loaded if loaded._indices is None else loaded.flatten_indices()
    return ordered.data.table


def _hub(source: TextSource) -> pa.Table:
    from datasets import load_dataset

    try:
        loaded = load_dataset(str(source.dataset), source.config, split=source.split)
    except Interrupted:
        raise
    except Exception as error:  # the hub client raises many types of exception
        raise DataError(
            f"data set {source.dataset!r} ({source.split}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return _in_order(loaded)


def _strings(table: pa.Table, column: str, source: TextSource) -> pa.Array:
    values = table[column].combine_chunks()
    if values.null_count:
        raise DataError(f"{source.location} has {values.null_count} rows without {column!r}: every row needs one")
    try:
        return pc.cast(values, pa.string())
    except pa.ArrowException as error:
        raise DataError(
            f"column {column!r} of {source.location} is {values.type}: it must be text or numbers"
        ) from error
