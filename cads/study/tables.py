"""Tables of a study in Parquet: `runs`, `selections`, `examples` and `rankings`, one file for each cell.

A table is a folder of files. A file appears whole or not at all, so that any number of processes may write at the same
time. A table is read from all its files. Published points are imported into the same tables.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import DataError
from cads.runtime.atomic_files import atomic_file
from cads.runtime.safe_read import read_measured

SCHEMA_VERSION = 3
VERSION_KEY = b"cads_results_version"
"""Key of the schema version in the metadata of a file."""
ADDED: dict[int, dict[str, tuple[str, ...]]] = {1: {"runs": ("maximised", "shares")}, 2: {"runs": ("shares",)}, 3: {}}
"""For each version that can be read, by table: the columns that later versions added. They are read as null."""
DONE, OVER_BUDGET, NOT_APPLICABLE, FAILED, IMPORTED = "done", "over budget", "n/a", "failed", "imported"
"""States of a cell."""

RUNS = pa.schema(
    [
        ("cell", pa.string()),  # key of the cell
        ("task", pa.string()),
        ("model", pa.string()),  # label of the size
        ("n_parameters", pa.float64()),  # of the trained model
        ("selector_parameters", pa.float64()),  # of the model that selection works on
        ("method", pa.string()),  # label, as in figures
        ("selector", pa.string()),  # installed name
        ("options", pa.string()),  # JSON
        ("budget", pa.string()),  # as given
        ("budget_flops", pa.float64()),
        ("count_selection", pa.bool_()),  # whether the budget covers selection
        ("sharing", pa.float64()),  # tasks that share the cost of one selection
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("error", pa.string()),  # why there is no score
        ("metric", pa.string()),
        ("maximised", pa.bool_()),  # whether more of the metric is better; null: as its name says
        ("score", pa.float64()),  # on the test set
        ("stderr", pa.float64()),  # of the score, from the finite test set
        ("metrics", pa.string()),  # JSON: all metrics of the test set
        ("selection_flops", pa.float64()),  # as charged
        ("selection_flops_spent", pa.float64()),
        ("training_flops", pa.float64()),
        ("evaluation_flops", pa.float64()),
        ("total_flops", pa.float64()),  # selection as charged, and training
        ("full_flops", pa.float64()),  # C(D): one pass over the whole pool
        ("n_pool", pa.int64()),
        ("n_selected", pa.int64()),
        ("examples", pa.int64()),  # usages in the final training
        ("tokens", pa.int64()),  # in the final training
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("accounting", pa.string()),
        ("version", pa.string()),  # of the package
        ("code", pa.string()),  # digest of its sources
        ("ledger", pa.string()),  # JSON: one record a stage, as charged
        ("source_probability", pa.string()),  # JSON: name -> probability under the policy, at the end
        ("shares", pa.string()),  # JSON: name -> share of what the final training draws from the pool; null: unknown
        ("probability_course", pa.string()),  # JSON: one {name: probability} a step of the policy
        ("notes", pa.string()),  # JSON: notes of the selector
    ]
)
SELECTIONS = pa.schema([("cell", pa.string()), ("id", pa.string()), ("source", pa.string()), ("rank", pa.int64())])
EXAMPLES = pa.schema(
    [
        ("cell", pa.string()),
        ("id", pa.string()),
        ("kept", pa.bool_()),
        ("score", pa.float64()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("image", pa.binary()),  # PNG
    ]
)
RANKINGS = pa.schema(
    [
        ("ranking", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("id", pa.string()),
        ("score", pa.float64()),
        ("rank", pa.int64()),
    ]
)
TABLES = {"runs": RUNS, "selections": SELECTIONS, "examples": EXAMPLES, "rankings": RANKINGS}
GRID_FILE = "grid.json"
"""File in the folder of a study: the cells of the grid that was run last."""


def write_rows(
    folder: Path, table: str, key: str, rows: Sequence[Mapping[str, Any]] | pa.Table, *, header: str = ""
) -> Path:
    """Write the file of one cell, whole or not at all. It replaces the rows that the cell had.

    Args:
        folder: of the study. table: a name in `TABLES`. key: of the cell. header: text stored beside the rows.

    Raises:
        DataError: if the rows have other columns than the table.
    """
    schema = TABLES[table]
    if not isinstance(rows, pa.Table):
        unknown = sorted({name for row in rows for name in row} - set(schema.names))
        if unknown:
            raise DataError(f"the table {table} has no columns {unknown}: it has {schema.names}")
        rows = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), b"cads_header": header.encode()}
    path = folder / "tables" / table / f"{key}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        pq.write_table(rows.cast(schema).replace_schema_metadata(metadata), partial, compression="zstd")
    return path


def read_table_file(path: Path, table: str) -> pa.Table:
    """One file of a table, with its metadata. Its size is checked against memory before it is read.

    Raises:
        DataError: if it is no Parquet, of another schema or version, or larger than this machine can hold.
    """
    try:
        stored = pq.read_schema(path)
        missing = _missing(path, stored, table)
        columns = {field.name: field.type for field in TABLES[table] if field.name not in missing}
        if not stored.equals(pa.schema(columns)):
            raise DataError(f"{path} has columns {stored.names}, expected {list(columns)}")
        rows = read_measured(path, columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a table of results: {error}; remove it and run again") from error
    for i, field in enumerate(TABLES[table]):
        if field.name in missing:
            rows = rows.add_column(i, field, pa.nulls(len(rows), field.type))
    return rows.replace_schema_metadata(stored.metadata)


def _missing(path: Path, stored: pa.Schema, table: str) -> Sequence[str]:
    """The columns of the table that the stored schema lacks, because its version is older.

    Raises:
        DataError: if its version cannot be read.
    """
    version = (stored.metadata or {}).get(VERSION_KEY, b"none").decode(errors="replace")
    versions = {str(number): added for number, added in ADDED.items()}
    if version not in versions:
        raise DataError(
            f"{path} has schema version {version}; this library reads {', '.join(versions)}: use the version that "
            "wrote it, or another folder"
        )
    return [name for name in versions[version].get(table, ()) if name not in stored.names]


def read_rows(folder: Path, table: str, keys: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table in the order of file names; with `keys`, only those of these cells.

    Raises:
        DataError: if a file is damaged or of another schema version.
    """
    stems = None if keys is None else set(keys)
    files = sorted((folder / "tables" / table).glob("*.parquet"))
    tables = [read_table_file(f, table) for f in files if stems is None or f.stem in stems]
    return [row for part in tables for row in part.to_pylist()]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a study: first the cells in the order of the grid, then imported points by task, size and cost.

    Raises:
        DataError: if the folder holds no runs, a run twice, or a table of another schema version.
    """
    rows = read_rows(folder, "runs")
    if not rows:
        of_one = f" ({folder} is of one run: its README.md reports on it)" if (folder / "results.json").exists() else ""
        raise DataError(f"{folder} holds no results of a grid: give the folder of `cads compare`{of_one}")
    _refuse_twice(folder, rows)
    order = {key: i for i, key in enumerate(grid_cells(folder))}
    rows = [row for row in rows if row["status"] == IMPORTED or row["cell"] in order or not order]
    imported = [row for row in rows if row["status"] == IMPORTED]
    imported.sort(key=lambda row: (row["task"], row["n_parameters"] or 0.0, row["total_flops"], row["method"]))
    cells = [row for row in rows if row["status"] != IMPORTED]
    return [*sorted(cells, key=lambda row: order.get(row["cell"], len(order))), *imported]


def _refuse_twice(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a cell that two files hold. Otherwise it would count as two seeds."""
    keys = [row["cell"] for row in rows]
    repeated = next((key for key, count in Counter(keys).items() if count > 1), None)
    if repeated is None:
        return
    files = sorted((folder / "tables" / "runs").glob("*.parquet"))
    names = [f.name for f in files if repeated in read_table_file(f, "runs")["cell"].to_pylist()]
    raise DataError(f"{repeated!r} is in {folder / 'tables' / 'runs'} more than once, in {names}: keep one")


def grid_cells(folder: Path) -> list[str]:
    """Keys of the cells of the grid that was run last in a folder, in order; empty if no grid was run.

    Raises:
        DataError: if the file is damaged.
    """
    path = folder / GRID_FILE
    if not path.exists():
        return []
    try:
        cells = json.loads(path.read_text())["cells"]
        return [str(key) for key in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): run `cads compare` again, finished cells are kept") from error
