"""JSON lines and Parquet files of blocks of rows, written with a block or a row group in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import DataError
from cads.exports.row_blocks import RowBlock
from cads.tasks.language.written_json import WrittenFloat

Blocks = Callable[[], Iterator[RowBlock]]
"""Gives all blocks from the first one, each time that it is called."""

GROUP_BYTES = 2**26
"""Bytes in memory of the tables that become a row group."""


def write_json_lines(blocks: Blocks, path: Path) -> int:
    """Write one JSON object a line; returns their number.

    Values of JSON files stay as they are written, with all digits. Of others, dates are in ISO format, and what is no
    number is null.

    Raises:
        DataError: if a value has no form in JSON.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for block in blocks():
            for row in block.objects():
                file.write(f"{json_text(row)}\n")
            count += len(block)
    return count


def json_text(value: Any) -> str:
    """A value as JSON on one line, in which numbers keep the digits that they were written with.

    Raises:
        DataError: if it has no form in JSON.
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json_text(str(name))}: {json_text(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(json_text, value))}]"
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, float | Decimal) and math.isnan(value):
        return "null"
    if value is None or isinstance(value, str | int | float):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, date | time):
        return json.dumps(value.isoformat())
    if isinstance(value, UUID):
        return json.dumps(str(value))
    raise DataError(f"{type(value).__name__} values, such as {value!r:.60}, have no form in JSON: use --to parquet")


def write_parquet(blocks: Blocks, path: Path) -> int:
    """Write one table, whose types are those of all rows together; returns the number of its rows.

    Columns that a row lacks are null. The blocks are read twice: first for the types.

    Raises:
        DataError: if no type holds all values of a column.
    """
    try:
        schema = _schema(blocks)
        with pq.ParquetWriter(path, schema) as writer:
            return sum(_write_group(writer, group) for group in _groups(blocks, schema))
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            f"no type of Parquet holds all values of each column ({error}): use --to jsonl, which keeps them"
        ) from error


def _schema(blocks: Blocks) -> pa.Schema:
    schema = pa.schema([])
    for block in blocks():
        schema = pa.unify_schemas([schema, block.schema()], promote_options="permissive")
    return schema


def _groups(blocks: Blocks, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows as tables of about `GROUP_BYTES`."""
    tables: list[pa.Table] = []
    size = 0
    for block in blocks():
        tables.append(block.table(schema))
        size += tables[-1].nbytes
        if size >= GROUP_BYTES:
            yield pa.concat_tables(tables)
            tables, size = [], 0
    if tables:
        yield pa.concat_tables(tables)


def _write_group(writer: pq.ParquetWriter, group: pa.Table) -> int:
    writer.write_table(group, row_group_size=len(group))
    return len(group)
