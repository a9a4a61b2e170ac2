"""The files of a saved Selection: their names and columns, and how they are written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.ids import all_distinct
from cads.data.origin import FileOrigin, Origin
from cads.errors import CadsError, DataError, SelectionError
from cads.runtime.atomic_files import whole_folder
from cads.runtime.checkpoint import State
from cads.runtime.safe_read import check_fields, read_header, read_scores
from cads.trained_run import TRAINED_FILES, read_trained, write_trained

SCHEMA_VERSION = 1
ORIGIN_FILE = "rows.parquet"
FILES = ("selection.json", "scores.parquet", "timings.json", ORIGIN_FILE, *TRAINED_FILES)
"""The files of a saved Selection; `rows.parquet` only if it has an `origin`, the last two only if it is `trained`."""
COLUMNS = {
    "id": pa.string(),
    "source": pa.string(),
    "score": pa.float64(),
    "probability": pa.float64(),
    "rank": pa.int64(),
    "selected": pa.bool_(),
}
ORIGIN_COLUMNS = {"file": pa.int32(), "row": pa.int64()}
"""Columns of `rows.parquet`: the file of each example, as an index into `files` of the header, and its row there."""

HEADER: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "config": dict,
    "seed": int,
    "versions": dict,
    "pool_hash": str,
    "source_probability": dict,
    "target_fraction": (int, float),
    "weighted": bool,
    "notes": dict,
}
"""Fields of selection.json that become fields of a Selection unchanged, and their types."""
OPTIONAL: dict[str, type | tuple[type, ...]] = {"balanced": bool, "stop_passes": (int, float)}
"""Those that are there only if they are set."""


@dataclass(frozen=True)
class StoredSelection:
    """What the files of a saved Selection hold.

    Attributes:
        header: of selection.json, without the digest of `trained`.
        table: of the columns `COLUMNS`, one row an example.
        trained: the end of the run in which the selector trained the final model, or None.
        origin: the file and row of each example, or None.
    """

    header: dict[str, Any]
    table: pa.Table
    trained: State | None
    origin: Origin | None

    def fields(self) -> dict[str, Any]:
        """The fields of the Selection, by name.

        Raises:
            SelectionError: if header and table do not match, or ids repeat or are missing. KeyError, TypeError,
                ValueError, AttributeError, OverflowError, CadsError: if the header lacks a field or holds a wrong one.
        """
        header, table = self.header, self.table
        optional = {name: kind for name, kind in OPTIONAL.items() if name in header}
        check_fields(header, HEADER | optional)
        missing = [n for n in ("id", "score", "probability", "selected") if table[n].null_count]
        if missing:
            raise SelectionError(f"the columns {missing} of the scores have missing values")
        if not all_distinct(table["id"]):
            raise SelectionError("ids of the scores are not unique")
        counts = {"pool": len(table), "selected": pc.sum(table["selected"]).as_py() or 0}
        if header["counts"] != counts:
            raise SelectionError(f"the scores have counts {counts} where the header says {header['counts']}")
        sources = table["source"].combine_chunks()
        return {
            "ids": table["id"].combine_chunks(),
            "score": table["score"].to_numpy(),
            "probability": table["probability"].to_numpy(),
            "selected": table["selected"].to_numpy().astype(bool),
            "sources": None if sources.null_count else sources,
            "budget": Budget(**header["budget"]),
            "ledger": Ledger.from_json(header["ledger"]),
            "trained": self.trained,
            "origin": self.origin,
            **{name: header[name] for name in HEADER | optional},
        }


def write_selection(
    folder: Path | str,
    header: Mapping[str, Any],
    table: pa.Table,
    *,
    ledger: Ledger,
    trained: State | None,
    origin: Origin | None,
) -> Path:
    """Write the files of a Selection to a new folder, all of them or none.

    Args:
        folder: to write to. header: as JSON values, without the files of `origin`. table: of the columns `COLUMNS`.
        ledger: with the times. trained, origin: as in `StoredSelection`.

    Raises:
        SelectionError: if the folder exists and holds other files (`check_folder`).
    """
    folder = Path(folder)
    check_folder(folder)
    # The files of `origin` are no part of the hash of a Selection: training does not read them.
    files = {} if origin is None else {"files": [file.to_json() for file in origin.files]}
    with whole_folder(folder) as partial:
        # Ids are unique: Parquet would build a dictionary of them and discard it.
        pq.write_table(table, partial / "scores.parquet", use_dictionary=["source"])
        (partial / "selection.json").write_text(json.dumps({**header, **files}, indent=2, sort_keys=True) + "\n")
        ledger.save(partial / "timings.json")
        if origin is not None:
            rows = {"file": origin.file, "row": origin.row}
            pq.write_table(pa.table(rows, schema=pa.schema(list(ORIGIN_COLUMNS.items()))), partial / ORIGIN_FILE)
        if trained is not None:
            write_trained(trained, partial)
    return folder


def selection_folder(folder: Path | str) -> Path:
    """The folder of the Selection itself, which may be the part `selection` of the folder of a run."""
    folder = Path(folder)
    return folder / "selection" if (folder / "selection" / "selection.json").exists() else folder


def read_selection(folder: Path) -> StoredSelection:
    """Read the files of a Selection: JSON, Parquet and safetensors; no code is executed.

    Raises:
        SelectionError: if one is missing, corrupt or of another version.
    """
    scores_file = folder / "scores.parquet"
    header = read_header(folder / "selection.json", scores_file, SCHEMA_VERSION, "selection")
    if "start" in header:
        raise SelectionError(
            f"{folder} holds the first part of a run, which this version of cads cannot finish: select again, for "
            "example with --method cads"
        )
    try:
        table = read_scores(scores_file, COLUMNS)
        digest = header.pop("trained", None)
        trained = None if digest is None else read_trained(folder, digest)
        origin = _read_origin(folder, header)
    except (OSError, ValueError, RecursionError, pa.ArrowException, CadsError) as error:
        raise SelectionError(f"{folder} cannot be read: {error}") from error
    return StoredSelection(header, table, trained, origin)


def _read_origin(folder: Path, header: Mapping[str, Any]) -> Origin | None:
    """The origin in a folder, if its header names files.

    Raises:
        DataError: if it is damaged. OSError, ValueError, pyarrow.ArrowException: if it cannot be read.
    """
    if "files" not in header:
        return None
    table = read_scores(folder / ORIGIN_FILE, ORIGIN_COLUMNS)
    if any(table[name].null_count for name in ORIGIN_COLUMNS):
        raise DataError(f"{ORIGIN_FILE} has missing values")
    try:
        files = tuple(FileOrigin.from_json(fields) for fields in header["files"])
    except (KeyError, TypeError) as error:
        raise DataError(f"the files of the header are damaged: {type(error).__name__}: {error}") from error
    return Origin(files, table["file"].to_numpy(), table["row"].to_numpy())


def check_folder(folder: Path | str, files: Sequence[str] = FILES) -> None:
    """Refuse to save to a folder that holds anything other than an earlier Selection.

    Args:
        folder: to save to.
        files: the names of the files of an earlier Selection.

    Raises:
        SelectionError: if `folder` is a file, or holds other files.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SelectionError(f"{folder} is no folder: choose another name")
    foreign = sorted(f.name for f in folder.iterdir() if f.name not in files)
    if foreign:
        raise SelectionError(f"{folder} exists and holds {foreign[:3]}: choose another folder")
