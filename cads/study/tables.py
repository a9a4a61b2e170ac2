"""Tables of a study in Parquet: `runs`, `selections`, `examples` and `rankings`, one file for each cell.

A table is a folder of files; a file appears whole or not at all, so any number of processes may add to it. Reading is
reading all of them. Published points are imported into the same tables.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cads.errors import DataError
from cads.runtime.safe_read import read_measured

SCHEMA_VERSION = 2
VERSION_KEY = b"cads_results_version"
"""Where a file's metadata holds the version of its schema."""
ADDED = {1: {"runs": ("maximised",)}, 2: {}}
"""By version that is read, the columns that its tables do not have yet, by table: they are null then."""
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
        ("source_probability", pa.string()),  # JSON: name -> probability, at the end
        ("probability_course", pa.string()),  # JSON: one {name: probability} a step of the policy
        ("notes", pa.string()),  # JSON: what the selector has to say
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
"""In the folder of a study: the cells of the grid that was run last."""


def write_rows(
    folder: Path, table: str, key: str, rows: Sequence[Mapping[str, Any]] | pa.Table, *, header: str = ""
) -> Path:
    """Write the rows of one cell, in place of those that it had; whole or not at all.

    Args:
        folder: of the study. table: a name in `TABLES`. key: of the cell. header: text to keep beside the rows.

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
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        pq.write_table(rows.cast(schema).replace_schema_metadata(metadata), partial, compression="zstd")
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def read_file(path: Path, table: str) -> pa.Table:
    """One file of a table, with its metadata, once it is known that it fits in memory.

    Raises:
        DataError: if it is no Parquet, of another schema or version, or larger than this machine can hold.
    """
    try:
        found = pq.read_schema(path)
        missing = _missing(path, found, table)
        columns = {field.name: field.type for field in TABLES[table] if field.name not in missing}
        if not found.equals(pa.schema(columns)):
            raise DataError(f"{path} has columns {found.names}, expected {list(columns)}")
        read = read_measured(path, columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a table of results: {error}; remove it and run again") from error
    for i, field in enumerate(TABLES[table]):
        if field.name in missing:
            read = read.add_column(i, field, pa.nulls(len(read), field.type))
    return read.replace_schema_metadata(found.metadata)


def _missing(path: Path, found: pa.Schema, table: str) -> Sequence[str]:
    """The columns that a table of this version does not have yet.

    Raises:
        DataError: if it is a version that is not read.
    """
    version = (found.metadata or {}).get(VERSION_KEY, b"none").decode(errors="replace")
    known = {str(number): added for number, added in ADDED.items()}
    if version not in known:
        raise DataError(
            f"{path} has schema version {version}; this library reads {', '.join(known)}: use the version that wrote "
            "it, or another folder"
        )
    return known[version].get(table, ())


def read_rows(folder: Path, table: str, keys: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table, by file name; of the given cells alone, if `keys` is given.

    Raises:
        DataError: if a file is damaged or of another schema version.
    """
    wanted = None if keys is None else set(keys)
    files = sorted((folder / "tables" / table).glob("*.parquet"))
    tables = [read_file(f, table) for f in files if wanted is None or f.stem in wanted]
    return [row for read in tables for row in read.to_pylist()]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a study: cells of its grid, in the order of the grid, and imported points, the cheapest first.

    Raises:
        DataError: if the folder holds no runs, one of them twice, or a table of another schema version.
    """
    rows = read_rows(folder, "runs")
    if not rows:
        raise DataError(f"{folder} holds no results: give the folder of `cads compare`")
    _refuse_twice(folder, rows)
    order = {key: i for i, key in enumerate(grid_cells(folder))}
    rows = [row for row in rows if row["status"] == IMPORTED or row["cell"] in order or not order]
    imported = [row for row in rows if row["status"] == IMPORTED]
    imported.sort(key=lambda row: (row["task"], row["n_parameters"] or 0.0, row["total_flops"], row["method"]))
    own = [row for row in rows if row["status"] != IMPORTED]
    return [*sorted(own, key=lambda row: order.get(row["cell"], len(order))), *imported]


def _refuse_twice(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a cell that two files hold: its seeds would be counted twice."""
    cells = [row["cell"] for row in rows]
    twice = next((cell for cell, count in Counter(cells).items() if count > 1), None)
    if twice is None:
        return
    files = sorted((folder / "tables" / "runs").glob("*.parquet"))
    both = [f.name for f in files if twice in read_file(f, "runs")["cell"].to_pylist()]
    raise DataError(f"{twice!r} is in {folder / 'tables' / 'runs'} more than once, in {both}: keep one")


def grid_cells(folder: Path) -> list[str]:
    """Keys of the cells of the grid that was run last in a folder, in order; none if no grid was.

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
