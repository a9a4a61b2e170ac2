"""Untrusted files: their size in memory and their schema are checked before they are read."""

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
"""Types that are read as a dictionary: a file can store one value once for any number of rows."""
MAX_EXPANSION = 64
"""Most bytes in memory for one byte of a file, by its footer; SNAPPY makes at most 21 of one."""


def memory_limit() -> float:
    """Bytes that the contents of one file may take in memory."""
    return MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_header(file: Path, scores: Path, version: int, label: str) -> dict[str, Any]:
    """Read the JSON header of a saved folder; first check that header and scores are plain files and not too large.

    Args:
        file, scores: header and scores. version: of the schema. label: what the folder holds, for messages.

    Raises:
        SelectionError: if one is missing or a link, or the header is too large, no object, or of another version.
    """
    for path in (file, scores):
        if not path.is_file():
            raise SelectionError(f"{path} does not exist: give the folder of a {label}")
        if path.is_symlink():
            raise SelectionError(f"{path} is a symbolic link: a {label} has its own files")
    if file.stat().st_size > JSON_LIMIT:
        raise SelectionError(f"{file} has {file.stat().st_size} bytes: this is no {label}")
    try:
        header = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SelectionError(f"{file} cannot be read: {error}") from error
    file_version = header.get("schema_version") if isinstance(header, dict) else None
    if file_version != version:
        raise SelectionError(f"{file} has schema version {file_version}; this library reads {version}")
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

    A few bytes can stand for billions of equal rows, so the rows are counted before any is read. Text is read as a
    dictionary, and its size is computed before it is expanded to strings.

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

    Its unpacked size is taken from its footer.

    Raises:
        DataError: if it is larger than this machine can hold.
        pyarrow.ArrowException, OSError, ValueError: if it is no Parquet file.
    """
    with pq.ParquetFile(path) as file:
        _check_size(path, file, columns, range(file.metadata.num_row_groups))
    with pq.ParquetFile(path, read_dictionary=_text_columns(columns)) as file:
        return _expanded(path, file.read(), columns)


def read_score_groups(path: Path, columns: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
    """The row groups of a file as for `read_scores`, one by one, each once it is known that it fits in memory.

    Raises:
        As for `read_scores`.
    """
    with pq.ParquetFile(path) as file:
        _check_footer(path, file, columns)
    with pq.ParquetFile(path, read_dictionary=_text_columns(columns)) as file:
        for group in range(file.metadata.num_row_groups):
            _check_size(path, file, columns, [group])
            yield _expanded(path, file.read_row_group(group), columns)


def _text_columns(columns: Mapping[str, pa.DataType]) -> list[str]:
    return [name for name, kind in columns.items() if kind in TEXT]


def _expanded(path: Path, table: pa.Table, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """The table with its text columns expanded to strings, once their size is known to fit."""
    limit = memory_limit()
    for name in _text_columns(columns):
        column = table[name].unify_dictionaries()
        text_bytes = sum(_expanded_bytes(chunk) for chunk in column.chunks)
        if text_bytes > limit:
            raise DataError(f"column {name!r} of {path} holds {text_bytes} bytes of text: more than memory holds here")
        table = table.set_column(table.schema.get_field_index(name), name, column.cast(columns[name]))
    return table.replace_schema_metadata(None)


def _check_footer(path: Path, file: pq.ParquetFile, columns: Mapping[str, pa.DataType]) -> None:
    schema = file.schema_arrow
    if schema.names != list(columns) or schema.types != list(columns.values()):
        raise DataError(f"{path} has columns {schema.names[:8]}, expected {list(columns)} of {list(columns.values())}")
    footer = file.metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    if unsupported := sorted({chunk.compression for chunk in chunks} - set(CODECS)):
        raise DataError(f"{path} is compressed by {unsupported[0]}: write it with one of {list(CODECS)}")
    if footer.num_rows > sum(group.num_rows for group in groups):
        raise DataError(f"{path} promises {footer.num_rows} rows, more than it has: its footer is damaged")
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > MAX_EXPANSION * path.stat().st_size:
        raise DataError(f"{path} unpacks to {unpacked} bytes from {path.stat().st_size}: its footer is damaged")


def _check_size(path: Path, file: pq.ParquetFile, columns: Mapping[str, pa.DataType], groups: Iterable[int]) -> None:
    """Refuse row groups that are together larger than memory."""
    footers = [file.metadata.row_group(i) for i in groups]
    rows = sum(group.num_rows for group in footers)
    needed = rows * sum(8 if kind in TEXT else kind.bit_width / 8 for kind in columns.values())
    unpacked = sum(group.column(j).total_uncompressed_size for group in footers for j in range(group.num_columns))
    if needed + unpacked > memory_limit():
        raise DataError(
            f"{path} has {rows} rows, which take {needed + unpacked:.3g} bytes: more than memory holds here"
        )


def _expanded_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of all rows of a chunk, expanded to strings."""
    lengths = pc.take(pc.binary_length(chunk.dictionary).cast(pa.int64()), chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)
