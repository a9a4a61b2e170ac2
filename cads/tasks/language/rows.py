"""Text data from files and from the hub: rows, their columns and their ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.ids import all_distinct, id_order, numbered
from cads.data.origin import FileOrigin
from cads.errors import ConfigError, DataError
from cads.runtime.file_listing import is_remote
from cads.tasks.language.columns import (
    COLUMNS,
    LABELS,
    Format,
    assign_columns,
    fill_template,
    is_template,
    unused_columns,
    used_columns,
)
from cads.tasks.language.draws import first_of_each, say_lost
from cads.tasks.language.file_hashes import origin_of, stamp_of
from cads.tasks.language.tables import guess_of, read_file, read_hub, read_saved, stem_of, text_column

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows that are held as Python objects at a time while they are encoded."""
LIMIT = 5
"""First word of the seed that draws `limit` rows."""


@dataclass
class TextSource:
    """Where examples come from: a file, a folder of `datasets`, or a data set on the hub."""

    name: str = ""
    """Name of the source; empty: the name of the file or data set."""
    path: str | None = None
    """A .json, .jsonl, .csv, .tsv, .parquet or .arrow file, also .jsonl.gz and the like, or a folder of `datasets`."""
    dataset: str | None = None
    """Name of a data set on the hub, instead of a path."""
    config: str | None = None
    """dataset: its configuration."""
    split: str = "train"
    """dataset: its split."""
    format: Format | None = None
    """messages (conversations), prompt (and response), or text; null: recognised by the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column stands for messages, prompt, context, response, text, system, history, tools, id, source or subtask;
    a column, or a template of columns, such as "{instruction} {input}"."""
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
        # No field: configurations and results that are stored have none.
        self.is_named = bool(self.name)
        self.name = self.name or self.derived_name

    @property
    def derived_name(self) -> str:
        """The name of the file or data set."""
        return Path(str(self.dataset)).stem if self.path is None else stem_of(Path(self.path))

    @property
    def location(self) -> str:
        """Path or name of the data set, for messages."""
        return str(self.path or self.dataset)


@dataclass(frozen=True)
class Rows:
    """Rows of one format, not yet tokens.

    Attributes:
        table: the columns that examples are written from, named by role: all of `COLUMNS` but the last three.
        format: of all rows.
        ids: one for each row. name: of the source.
        sources, subtasks: a name for each row, or None.
        table_positions: positions of the rows in `table`, ascending, int64; None if they are all of the table. With
            them, rows that are drawn from a table on disk stay on disk.
        origin: the file of which `table` holds every row, in order; None if that is not known.
        columns: the column or template of the file for each role. unused: the other columns of the file.
    """

    table: pa.Table
    format: Format
    ids: pa.Array
    name: str
    sources: pa.Array | None = None
    subtasks: pa.Array | None = None
    table_positions: np.ndarray | None = None
    origin: FileOrigin | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def file_rows(self) -> np.ndarray:
        """The row of each in its file, counted from 0, int64, shape (n,)."""
        return np.arange(len(self)) if self.table_positions is None else self.table_positions

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


def load_rows(source: TextSource, seed: int, *, given_sources: bool = False, prefix: str | None = None) -> Rows:
    """Read a source.

    A folder of `datasets`, a data set on the hub and an Arrow file stay on disk; all other files are held in memory.
    Ids, sources and texts are strings, as they are written. A format or column that is not named is recognised and
    logged.

    Args:
        seed: of the rows that `limit` draws, by their ids.
        given_sources: whether a column called `source` is recognised as the source of each row.
        prefix: of the ids of rows without a column of ids; None: the name of the source.

    Raises:
        DataError: if the source cannot be read, is empty, lacks a column, or has an id on two rows.
    """
    stamp = None if source.path is None else stamp_of(Path(source.path))
    table = _table(source)
    if guess := guess_of(table):
        log.warning("%s: %s", source.location, guess)
    if not len(table):
        raise DataError(f"{source.location} is empty: it needs at least one row")
    read, present = table, table.column_names
    chosen, columns = assign_columns(present, source.format, source.columns, source.location)
    table = _filled(source, read, columns)
    ids = _ids(source, table, columns, prefix or source.name)
    sources = _labels(source, table, columns, given_sources=given_sources)
    if (chosen, columns) != (source.format, source.columns):
        read_as = ", ".join(role if role == name else f"{role} = {name}" for role, name in columns.items())
        log.info("%s (%s): recognised as %s, from columns %s", source.name, source.location, chosen, read_as)
    subtasks = None if "subtask" not in columns else _strings(table, columns["subtask"], source)
    text_columns = {role: name for role, name in columns.items() if role not in LABELS}
    content = _content(source, table, text_columns)
    _say_unused(source, read, columns, given_sources=given_sources)
    id_column = columns.get("id") if columns.get("id") in present else None
    written_from = sorted(used_columns(text_columns.values(), present), key=present.index)
    origin = origin_of(source.location, read.select(written_from), stamp, id_column, text_columns)
    unused = tuple(sorted(set(present) - used_columns(columns.values(), present), key=present.index))
    rows = Rows(content, chosen, ids, source.name, sources, subtasks, None, origin, columns, unused)
    if source.limit is None or source.limit >= len(rows):
        return rows
    order = id_order(ids)[np.random.default_rng((LIMIT, seed)).permutation(len(rows))]
    drawn = rows.take(np.sort(first_of_each(order, source_codes([rows])[0], source.limit)))
    say_lost(labels_of([rows]), labels_of([drawn]), f"{source.limit} rows of {source.location}")
    return drawn


def read_content(path: Path, roles: Mapping[str, str]) -> pa.Table:
    """All rows of a file, or of a folder of `datasets`: the columns that examples are written from, named by role.

    Args:
        roles: the column or template of each role.

    Raises:
        DataError: if the file cannot be read, or lacks a column.
    """
    source = TextSource(path=str(path))
    table = _table(source)
    absent = sorted(used_columns(roles.values(), table.column_names) - set(table.column_names))
    if absent:
        raise DataError(f"{path} has no columns {absent}: it has {table.column_names}")
    return _content(source, _filled(source, table, roles), roles)


def _content(source: TextSource, table: pa.Table, roles: Mapping[str, str]) -> pa.Table:
    return pa.table({role: _text(table, name, source) for role, name in roles.items()})


def _filled(source: TextSource, table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The table, with a column for each template among `columns`, which has the template as its name."""
    for template in dict.fromkeys(columns.values()):
        if is_template(template, table.column_names):
            table = table.append_column(template, fill_template(table, template, source.location))
    return table


def _say_unused(source: TextSource, table: pa.Table, columns: Mapping[str, str], *, given_sources: bool) -> None:
    """Warn of the columns that are not used; `id` and `source` are spoken of where they are read."""
    spoken_of = {role for role in ("id", *(["source"] if given_sources else [])) if role not in columns}
    unused = unused_columns(table, used_columns(columns.values(), table.column_names) | spoken_of)
    if unused:
        log.warning(
            "%s (%s): not used are %s; name them in columns if they belong to the text, such as in a template, "
            'prompt: "{instruction}\\n{input}"',
            source.name,
            source.location,
            unused,
        )


def _table(source: TextSource) -> pa.Table:
    if source.dataset is not None:
        return read_hub(source.dataset, source.config, source.split)
    if is_remote(str(source.path)):
        raise DataError(
            f"{source.path} is an address, which is read in shards alone: use cads select with --launcher, or "
            "give a copy of the file"
        )
    path = Path(str(source.path))
    return read_saved(path) if path.is_dir() else read_file(path)


def source_codes(parts: Sequence[Rows]) -> tuple[np.ndarray, list[str]]:
    """The source of each row as an index into names, int64, shape (N,), and the names.

    Rows without a column of sources are one source, by the name of their file.
    """
    numbers: dict[str, int] = {}
    codes = []
    for rows in parts:
        if rows.sources is None:
            codes.append(np.full(len(rows), numbers.setdefault(rows.name, len(numbers))))
            continue
        encoded = rows.sources.dictionary_encode()
        code_of = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
        codes.append(np.array(code_of, dtype=np.int64)[encoded.indices.to_numpy()])
    return np.concatenate([np.zeros(0, dtype=np.int64), *codes]), list(numbers)


def labels_of(parts: Sequence[Rows]) -> set[str]:
    """The names of all sources that have a row."""
    return {
        name
        for rows in parts
        if len(rows)
        for name in ([rows.name] if rows.sources is None else pc.unique(rows.sources).to_pylist())
    }


def _ids(source: TextSource, table: pa.Table, columns: dict[str, str], prefix: str) -> pa.Array:
    """The ids of all rows of the file, unique; numbers of rows if there is no column of ids.

    A column that is only recognised by its name and has no value at all is removed from `columns`.
    """
    column = columns.get("id")
    if column is not None and "id" not in source.columns and table[column].null_count == len(table):
        log.warning("column %r of %s is empty in all rows: the rows are numbered", column, source.location)
        del columns["id"]
    if column is None or "id" not in columns:
        return numbered(prefix, len(table))
    ids = _names(table, column, source)
    if repeated := repeated_ids(ids):
        raise DataError(
            f"column {column!r} of {source.location} has {len(repeated)} ids on more than one row, such as "
            f"{repeated[:3]}: give each row an id of its own, name another column as id, or remove the column, so that "
            "rows are numbered"
        )
    return ids


def _labels(source: TextSource, table: pa.Table, columns: dict[str, str], *, given_sources: bool) -> pa.Array | None:
    """The source of each row, or None; a column that is only recognised by its name is used if every row has one."""
    if "source" in columns:
        return _names(table, columns["source"], source)
    if not (given_sources and "source" in table.column_names):
        return None
    try:
        labels = _names(table, "source", source)
    except DataError as error:
        log.warning("%s; it is not used, and all rows are one source", error)
        return None
    columns["source"] = "source"
    return labels


def repeated_ids(ids: pa.Array | pa.ChunkedArray) -> list[str]:
    """The ids that are there more than once, in order of appearance."""
    if all_distinct(ids):
        return []
    counts = pc.value_counts(ids)
    repeated: list[str] = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    return repeated


def _text(table: pa.Table, column: str, source: TextSource) -> pa.ChunkedArray:
    try:
        return text_column(table[column])
    except pa.ArrowException as error:
        raise DataError(
            f"column {column!r} of {source.location} is {table[column].type}, which is no text ({error}): write it as "
            "text"
        ) from error


def _strings(table: pa.Table, column: str, source: TextSource) -> pa.Array:
    """A column of which every row needs a value."""
    values = _text(table, column, source)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(
            f"column {column!r} of {source.location} holds lists or objects, and has to be text or numbers: name "
            "another column, or rename this one"
        )
    if values.null_count:
        raise DataError(_missing(column, source, values.null_count, len(values)))
    return pc.cast(values, pa.string()).combine_chunks()


def _names(table: pa.Table, column: str, source: TextSource) -> pa.Array:
    """Ids or sources: as `_strings`, and none is blank, which is how CSV writes a missing value."""
    values = _strings(table, column, source)
    blank = pc.sum(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py()
    if blank:
        raise DataError(_missing(column, source, blank, len(values)))
    return values


def _missing(column: str, source: TextSource, count: int, rows: int) -> str:
    return (
        f"column {column!r} of {source.location} has no value in {count} of {rows} rows: give each row one, name "
        "another column, or rename this one"
    )
