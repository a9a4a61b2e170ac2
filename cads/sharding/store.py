"""The folder of a run in shards: one part for each file of the pool, published whole, with what it was made from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import CheckpointError, DataError
from cads.runtime.atomic_files import published_once
from cads.runtime.checkpoint import differences, load_json
from cads.runtime.file_listing import DataFile
from cads.runtime.safe_read import read_measured

Kind = Literal["surveys", "values"]
HEADER, TABLE = "part.json", "table.parquet"
VERSION = 1
GROUP = 2**18
"""Rows of a row group: the memory that merging takes at a time."""
MAX_NAME = 60
"""Characters of the name of a file that are part of the name of its folder."""


class NamedFile(Protocol):
    """A file of a pool.

    Attributes:
        name: unique in the pool. file: where it is.
    """

    @property
    def name(self) -> str:
        """Its name in the pool."""
        ...

    @property
    def file(self) -> DataFile:
        """Where it is."""
        ...


@dataclass(frozen=True)
class Part:
    """What was made of one file.

    Attributes:
        folder: that holds it. header: JSON values, the ledger among them.
    """

    folder: Path
    header: dict[str, Any]

    @property
    def table_path(self) -> Path:
        """The file of its rows."""
        return self.folder / TABLE

    def table(self, columns: Mapping[str, pa.DataType]) -> pa.Table:
        """All its rows.

        Raises:
            CheckpointError: if they cannot be read, or are not as many as the header says.
        """
        try:
            table = read_measured(self.table_path, columns)
        except (OSError, ValueError, pa.ArrowException, DataError) as error:
            raise damaged(self.folder, error) from error
        if len(table) != self.header["rows"] or table.column_names != list(columns):
            raise damaged(self.folder, f"{len(table)} rows of {table.column_names}")
        return table

    def groups(self, columns: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        """Its rows, a row group at a time.

        Raises:
            CheckpointError: as `table`.
        """
        rows = 0
        try:
            with pq.ParquetFile(self.table_path) as file:
                if file.schema_arrow.names != list(columns) or file.schema_arrow.types != list(columns.values()):
                    raise damaged(self.folder, f"columns {file.schema_arrow.names}")
                for group in range(file.metadata.num_row_groups):
                    table = file.read_row_group(group)
                    rows += len(table)
                    yield table
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(self.folder, error) from error
        if rows != self.header["rows"]:
            raise damaged(self.folder, f"{rows} rows where the header says {self.header['rows']}")


class PartStore:
    """The parts of one kind of a run.

    Args:
        folder: of the parts. identity: of the run, as JSON values: settings, code and versions.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = dict(identity)

    def read(self, file: NamedFile) -> Part | None:
        """The part of a file; None if it has not been made.

        Raises:
            CheckpointError: naming the part, if it is of another run, of another state of the file, or damaged.
        """
        folder = self.path(file)
        if not folder.exists():
            return None
        try:
            header = load_json(folder / HEADER)
            if header["schema_version"] != VERSION:
                raise ValueError(f"schema version {header['schema_version']!r} is not {VERSION}")
            changed = differences(header["identity"], self._identity)
            changed += differences(header["file"], file.file.to_json(), "file.")
            size = folder.joinpath(TABLE).stat().st_size
            if size != header["bytes"]:
                raise ValueError(f"{TABLE} has {size} bytes where the header says {header['bytes']}")
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            raise damaged(folder, error) from error
        if changed:
            raise CheckpointError(
                f"the shard {folder} is of another run: {'; '.join(changed[:5])}; remove it, or choose another folder "
                "with --out"
            )
        return Part(folder, header)

    def has(self, file: NamedFile) -> bool:
        """Whether the part of a file is there; it is not looked into."""
        return self.path(file).exists()

    def publish(self, file: NamedFile, table: pa.Table, header: Mapping[str, Any]) -> None:
        """Write the part of a file under a temporary name, and give it its own when it is whole."""
        with published_once(self.path(file)) as partial:
            pq.write_table(table, partial / TABLE, row_group_size=GROUP, use_dictionary=False)
            described = {
                "schema_version": VERSION,
                "identity": self._identity,
                "file": file.file.to_json(),
                "rows": len(table),
                "bytes": (partial / TABLE).stat().st_size,
            }
            (partial / HEADER).write_text(json.dumps({**header, **described}, indent=1, sort_keys=True) + "\n")

    def path(self, file: NamedFile) -> Path:
        """The folder of the part of a file, named after it."""
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", file.name).strip("-.")[-MAX_NAME:]
        return self.folder / f"{readable}-{hashlib.sha256(file.name.encode()).hexdigest()[:8]}"

    def foreign(self, files: set[str]) -> list[Path]:
        """Folders here that are of none of the given folder names; half-written ones do not count."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if not p.name.startswith(".") and p.name not in files)


def damaged(folder: Path, reason: object) -> CheckpointError:
    """The refusal of a part that cannot be used."""
    return CheckpointError(f"the shard {folder} is damaged ({reason}): remove it, and run its shard again")
