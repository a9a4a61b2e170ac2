"""The rows of a file that a pool was read from, a block at a time, with their values as they stand there."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import DataError
from cads.tasks.language.tables import COMPRESSIONS, READERS, read_file, read_saved
from cads.tasks.language.text_files import json_rows, read_json
from cads.tasks.language.written_json import WrittenFloat, decoded_json, has_json

ROWS_AT_ONCE = 1000
"""Rows of a block."""


class RowBlock(Protocol):
    """Some rows of a file, one after another."""

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """The values of a column; None where a row has none, and everywhere if there is no such column."""
        ...

    def take(self, positions: np.ndarray) -> RowBlock:
        """The rows at `positions`, int64."""
        ...

    def with_column(self, name: str, values: Sequence[Any]) -> RowBlock:
        """The rows with a column of these values, in place of the one that has this name, if any."""
        ...

    def objects(self) -> list[dict[str, Any]]:
        """The rows as objects; those of JSON files have the keys that they have there."""
        ...

    def schema(self) -> pa.Schema:
        """The Arrow types that hold these rows.

        Raises:
            pyarrow.ArrowException, OverflowError: if none do.
        """
        ...

    def table(self, schema: pa.Schema) -> pa.Table:
        """The rows as a table of this schema, null where a row has no value.

        Raises:
            pyarrow.ArrowException, OverflowError: if it cannot hold a value without changing it.
        """
        ...


@dataclass(frozen=True)
class ObjectBlock:
    """Rows of a JSON file."""

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """As `RowBlock`; numbers with a point are text, with all their digits."""
        values = (row.get(column) for row in self.rows)
        return [value.text if isinstance(value, WrittenFloat) else value for value in values]

    def take(self, positions: np.ndarray) -> ObjectBlock:
        """As `RowBlock`."""
        return ObjectBlock([self.rows[i] for i in positions.tolist()])

    def with_column(self, name: str, values: Sequence[Any]) -> ObjectBlock:
        """As `RowBlock`."""
        return ObjectBlock([{**row, name: value} for row, value in zip(self.rows, values, strict=True)])

    def objects(self) -> list[dict[str, Any]]:
        """As `RowBlock`."""
        return self.rows

    def schema(self) -> pa.Schema:
        """As `RowBlock`."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return pa.schema([(name, pa.array([row.get(name) for row in self.rows]).type) for name in names])

    def table(self, schema: pa.Schema) -> pa.Table:
        """As `RowBlock`."""
        columns = [pa.array([row.get(field.name) for row in self.rows], field.type) for field in schema]
        return pa.Table.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class ArrowBlock:
    """Rows of a file of columns; those of CSV files are text."""

    rows: pa.Table

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """As `RowBlock`."""
        if column not in self.rows.column_names:
            return [None] * len(self.rows)
        values: list[Any] = self.rows[column].to_pylist()
        return values

    def take(self, positions: np.ndarray) -> ArrowBlock:
        """As `RowBlock`."""
        return ArrowBlock(self.rows.take(pa.array(positions)))

    def with_column(self, name: str, values: Sequence[Any]) -> ArrowBlock:
        """As `RowBlock`."""
        if name not in self.rows.column_names:
            return ArrowBlock(self.rows.append_column(name, pa.array(values)))
        return ArrowBlock(self.rows.set_column(self.rows.column_names.index(name), name, pa.array(values)))

    def objects(self) -> list[dict[str, Any]]:
        """As `RowBlock`; JSON text of the type `Json` of `datasets` is what it stands for."""
        decoded = {
            name: (decoded_json(column) if has_json(column.type) else column).to_pylist()
            for name, column in zip(self.rows.column_names, self.rows.columns, strict=True)
        }
        return [dict(zip(decoded, row, strict=True)) for row in zip(*decoded.values(), strict=True)]

    def schema(self) -> pa.Schema:
        """As `RowBlock`. Metadata is left out: it says which columns there are."""
        return self.rows.schema.remove_metadata()

    def table(self, schema: pa.Schema) -> pa.Table:
        """As `RowBlock`."""
        present = self.rows.column_names
        columns = [
            self.rows[field.name].cast(field.type) if field.name in present else pa.nulls(len(self), field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)


def read_blocks(path: Path) -> Iterator[RowBlock]:
    """All rows of a file, or of a folder of `datasets`, in the order and number in which a pool is read from it.

    JSON lines and Parquet are read block by block and Arrow stays on disk. Other files are held in memory.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        yield from _blocks(path)
    except (pa.ArrowException, ValueError, OSError, EOFError, RecursionError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _blocks(path: Path) -> Iterator[RowBlock]:
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    if path.is_file() and READERS.get(plain.suffix.lower()) is read_json:
        rows = json_rows(path)
        while block := list(islice(rows, ROWS_AT_ONCE)):
            yield ObjectBlock(block)
        return
    if path.is_file() and path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield ArrowBlock(pa.Table.from_batches([batch]))
        return
    table = read_saved(path) if path.is_dir() else read_file(path)
    for batch in table.to_batches(ROWS_AT_ONCE):
        yield ArrowBlock(pa.Table.from_batches([batch]))
