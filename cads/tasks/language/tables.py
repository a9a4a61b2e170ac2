"""Tables from files, from folders of `datasets`, and from the hub."""

from __future__ import annotations

import lzma
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cads.errors import DataError
from cads.runtime.signals import Interrupted
from cads.tasks.language.text_files import GUESS, not_utf8, read_csv, read_json, read_tsv
from cads.tasks.language.written_json import JsonType, decoded_json, has_json

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that a text file has after its own if it is compressed."""


def read_file(path: Path) -> pa.Table:
    """A file as a table. Arrow files stay on disk; all others are held in memory.

    Values of JSON, CSV and TSV are strings, as they are written; see `table_of` for lists and objects.

    Raises:
        DataError: saying what to do, if the suffix is unknown, the file is damaged or not UTF-8, or two columns have
            the same name.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a file ({', '.join(SUFFIXES)}) or a folder of `datasets`")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = (["", *suffixes[:-1]] if compressed else suffixes or [""])[-1]
    if suffix not in READERS:
        raise DataError(f"{path} has the suffix {suffix!r}: use one of {', '.join(SUFFIXES)}{_COMPRESSED_TOO}")
    if compressed and suffix in BINARY:
        raise DataError(f"{path} is a compressed {suffix} file: decompress it first")
    try:
        table = READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(path)) from error
    except (pa.ArrowException, ValueError, OSError, EOFError, RecursionError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    repeated = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if repeated:
        raise DataError(f"{path} has the columns {repeated} more than once: rename or remove the others")
    return table


def guess_of(table: pa.Table) -> str | None:
    """How a file was read where that is a guess, see `read_tsv`; else None."""
    said = (table.schema.metadata or {}).get(GUESS)
    return None if said is None else said.decode()


def stem_of(path: Path) -> str:
    """The name of a file without its suffix, and without that of its compression."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.stem


def read_saved(path: Path) -> pa.Table:
    """A folder written by `Dataset.save_to_disk`; it stays on disk.

    Raises:
        DataError: if it is no such folder, or holds several splits.
    """
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no folder of `datasets` ({error}): name a file in it, one source for each file, or select from "
            "all its files in shards (cads select --launcher local)"
        ) from error
    if not isinstance(loaded, Dataset):
        raise DataError(f"{path} holds several splits {sorted(loaded)}: give the folder of one")
    return _in_order(loaded)


def read_hub(name: str, config: str | None, split: str) -> pa.Table:
    """A data set of the hub; it stays on disk.

    Raises:
        DataError: if it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, config, split=split)
    except Interrupted:
        raise
    except Exception as error:  # the hub client raises many types of exception
        raise DataError(f"data set {name!r} ({split}) cannot be loaded: {type(error).__name__}: {error}") from error
    return _in_order(loaded)


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with its numbers, dates and categories as text; text, lists and objects stay as they are.

    Raises:
        pa.ArrowException: if bytes are not UTF-8.
    """
    kind = column.type
    if has_json(kind):
        return decoded_json(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_nested(kind):
        return column
    if isinstance(kind, JsonType):
        return column
    if isinstance(kind, pa.BaseExtensionType):
        return pa.chunked_array([[None if x is None else str(x) for x in column.to_pylist()]], pa.string())
    if pa.types.is_dictionary(kind):
        return text_column(pc.cast(column, kind.value_type))
    return pc.cast(column, pa.large_string() if pa.types.is_large_binary(kind) else pa.string())


def _in_order(loaded: Any) -> pa.Table:
    # `datasets` copies rows that were selected or shuffled into a new table first.
    ordered = loaded if loaded._indices is None else loaded.flatten_indices()
    return ordered.data.table


def _parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True).read()


def _arrow(path: Path) -> pa.Table:
    """The file format or the stream format; `datasets` writes the second."""
    mapped = pa.memory_map(str(path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()


BINARY: dict[str, Callable[[Path], pa.Table]] = {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow}
READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": read_tsv,
    **BINARY,
}
SUFFIXES = tuple(READERS)
_COMPRESSED_TOO = f"; text files may be compressed ({', '.join(COMPRESSIONS)})"
