"""Hashes of the files that rows were read from, computed when a Selection is saved: each reads a whole file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from cads.data.origin import UNKNOWN, FileOrigin, file_digest, row_hashes
from cads.errors import DataError
from cads.tasks.language.tables import read_file

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows that are Python objects at a time while they are hashed."""

Stamp = tuple[int, int]
"""Bytes of a file, and the time of its last change in nanoseconds."""


@dataclass(frozen=True)
class FileHasher:
    """Computes the digest of a file, which is read again for this: kept, its rows may take more memory than tokens.

    Attributes:
        path: of the file, absolute. columns: that are hashed.
        stamp: of the file, from before it was read.
    """

    path: Path
    columns: tuple[str, ...]
    stamp: Stamp

    def __call__(self) -> str:
        """The digest; `UNKNOWN`, with a warning, if the file was removed or changed since it was read."""
        try:
            if stamp_of(self.path) == self.stamp:
                digest = table_digest(read_file(self.path).select(self.columns))
                if stamp_of(self.path) == self.stamp:
                    return digest
        except DataError as error:
            log.warning("%s", error)
        log.warning(
            "%s was removed or changed after it was read, so that a Selection finds its rows by their ids only; leave "
            "files as they are until the Selection is saved",
            self.path,
        )
        return UNKNOWN


def origin_of(
    location: str, table: pa.Table, stamp: Stamp | None, id_column: str | None, roles: Mapping[str, str] | None = None
) -> FileOrigin:
    """The record of a file, a folder of `datasets` or a data set of the hub, by which a Selection finds its rows again.

    The tables of folders and data sets stay open: they are on disk, and `datasets` does not change their files.

    Args:
        table: all rows, and the columns that examples are written from. stamp: of a file; None for anything else.
        roles: as in `FileOrigin`.
    """
    columns = tuple(table.column_names)
    hashed: Callable[[], str] = partial(table_digest, table)
    if stamp is not None:
        hashed = FileHasher(Path(location).absolute(), columns, stamp)
    return FileOrigin(location, len(table), columns, hashed, id_column, roles)


def stamp_of(path: Path) -> Stamp | None:
    """What changes with a file; None if there is none, such as for a folder."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if path.is_file() else None


def table_digest(table: pa.Table) -> str:
    """The hash of the contents of a table; see `file_digest`."""
    hashes = [
        row_hashes([shard.to_pylist() for shard in table.slice(start, ROWS_AT_ONCE).itercolumns()])
        for start in range(0, len(table), ROWS_AT_ONCE)
    ]
    return file_digest(np.concatenate(hashes))
