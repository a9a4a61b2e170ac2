"""Files from strangers: how large they will be is known before they are read, and what they say they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cads.errors import DataError, SelectionError

JSON_LIMIT = 64 * 2**20
"""Largest JSON file, in bytes, that is read; a real one has a few kilobytes."""
MEMORY_SHARE = 0.5
"""Share of the machine's memory that the contents of one file may take."""
CODECS = ("UNCOMPRESSED", "SNAPPY")
"""Compressions that are read: what they unpack to is bounded by the size of the file."""
TEXT = (pa.string(), pa.binary())
"""Types whose values are read as a dictionary: a file can hold one of them once for any number of rows."""
LARGEST_EXPANSION = 64
"""Bytes that one byte of a file may stand for, as its footer tells; SNAPPY makes at most 21 of one."""


def memory_limit() -> float:
    """Bytes that the contents of one file may take in memory."""
    return MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_header(file: Path, scores: Path, version: int, what: str) -> dict[str, Any]:
    """The JSON header of a saved folder, once it is known that it and the scores are small enough files of their own.

    Args:
        file, scores: header and scores. version: of the schema. what: they are of, for messages.

    Raises:
        SelectionError: if one is missing or a link, or the header is too large, no object, or of another version.
    """
    for path in (file, scores):
        if not path.is_file():
            raise SelectionError(f"{path} does not exist: give the folder of a {what}")
        if path.is_symlink():
            raise SelectionError(f"{path} is a symbolic link: a {what} has its own files")
    if file.stat().st_size > JSON_LIMIT:
        raise SelectionError(f"{file} has {file.stat().st_size} bytes: this is no {what}")
    try:
        header = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SelectionError(f"{file} cannot be read: {error}") from error
    found = header.get("schema_version") if isinstance(header, dict) else None
    if found != version:
        raise SelectionError(f"{file} has schema version {found}; this library reads {version}")
    return dict(header)


def check_fields(header: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse a header with fields of other types than these.

    Raises:
        SelectionError: naming the first. KeyError: if one is missing.
    """
    for name, kind in kinds.items():
        if not isinstance(header[name], kind) or (kind is not bool and isinstance(header[name], bool)):
            raise SelectionError(f"{name} = {header[name]!r} has the wrong type")


def read_scores(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a Parquet file of exactly these columns, once it is known that it fits in memory.

    A few bytes can stand for billions of equal rows, so the rows are counted before any is read; and text is read
    as a dictionary and measured before it is spelt out.

    Raises:
        DataError: if it has other columns, another compression, or is larger than this machine can hold.
        pyarrow.ArrowException, OSError, ValueError: if it is no Parquet file.
    """
    # Not pq.read_table: it makes columns of folders in the path that are called `name=value`.
    with pq.ParquetFile(path) as file:
        _check_footer(path, file, columns)
    return read_measured(path, columns)


def read_measured(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a Parquet file that has these columns, in whatever compression, as `read_scores` does, without metadata.

    What it unpacks to is as its footer says.

    Raises:
        DataError: if it is larger than this machine can hold.
        pyarrow.ArrowException, OSError, ValueError: if it is no Parquet file.
    """
    with pq.ParquetFile(path) as file:
        _check_size(path, file, columns, range(file.metadata.num_row_groups))
    with pq.ParquetFile(path, read_dictionary=_text(columns)) as file:
        return _spelt_out(path, file.read(), columns)


def read_score_groups(path: Path, columns: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
    """The row groups of such a file one by one, each once it is known that it fits in memory.

    Raises:
        As for `read_scores`.
    """
    with pq.ParquetFile(path) as file:
        _check_footer(path, file, columns)
    with pq.ParquetFile(path, read_dictionary=_text(columns)) as file:
        for group in range(file.metadata.num_row_groups):
            _check_size(path, file, columns, [group])
            yield _spelt_out(path, file.read_row_group(group), columns)


def _text(columns: Mapping[str, pa.DataType]) -> list[str]:
    return [name for name, kind in columns.items() if kind in TEXT]


def _spelt_out(path: Path, table: pa.Table, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """The table with its text as strings, once it is measured."""
    limit = memory_limit()
    for name in _text(columns):
        column = table[name].unify_dictionaries()
        spelt = sum(_spelt_bytes(chunk) for chunk in column.chunks)
        if spelt > limit:
            raise DataError(f"column {name!r} of {path} holds {spelt} bytes of text: more than memory holds here")
        table = table.set_column(table.schema.get_field_index(name), name, column.cast(columns[name]))
    return table.replace_schema_metadata(None)


def _check_footer(path: Path, file: pq.ParquetFile, columns: Mapping[str, pa.DataType]) -> None:
    found = file.schema_arrow
    if found.names != list(columns) or found.types != list(columns.values()):
        raise DataError(f"{path} has columns {found.names[:8]}, expected {list(columns)} of {list(columns.values())}")
    footer = file.metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    if odd := sorted({chunk.compression for chunk in chunks} - set(CODECS)):
        raise DataError(f"{path} is compressed by {odd[0]}: write it with one of {list(CODECS)}")
    if footer.num_rows > sum(group.num_rows for group in groups):
        raise DataError(f"{path} promises {footer.num_rows} rows, more than it has: its footer is damaged")
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > LARGEST_EXPANSION * path.stat().st_size:
        raise DataError(f"{path} unpacks to {unpacked} bytes from {path.stat().st_size}: its footer is damaged")


def _check_size(path: Path, file: pq.ParquetFile, columns: Mapping[str, pa.DataType], groups: Iterable[int]) -> None:
    """Refuse to read row groups together that are larger than memory."""
    footers = [file.metadata.row_group(i) for i in groups]
    rows = sum(group.num_rows for group in footers)
    needed = rows * sum(8 if kind in TEXT else kind.bit_width / 8 for kind in columns.values())
    unpacked = sum(group.column(j).total_uncompressed_size for group in footers for j in range(group.num_columns))
    if needed + unpacked > memory_limit():
        raise DataError(
            f"{path} has {rows} rows, which take {needed + unpacked:.3g} bytes: more than memory holds here"
        )


def _spelt_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of all its rows, spelt out."""
    lengths = pc.take(pc.binary_length(chunk.dictionary).cast(pa.int64()), chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)
