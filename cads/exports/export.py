"""One export: what is written, where, and in which form."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cads.errors import ConfigError
from cads.exports.chosen_rows import AddedColumns, chosen_rows
from cads.exports.image_list import image_lines, refuse_synthetic
from cads.exports.writers import Blocks, write_json_lines, write_parquet
from cads.runtime.atomic_files import atomic_file
from cads.selection import Selection, Weights
from cads.tasks.language.tables import COMPRESSIONS

__all__ = ["AddedColumns", "Form", "write_export"]

Form = Literal["jsonl", "parquet", "files"]
"""Rows as JSON lines or Parquet; or a list of image files."""
WRITERS: dict[str, Callable[[Blocks, Path], int]] = {"jsonl": write_json_lines, "parquet": write_parquet}


def write_export(
    selection: Selection | Path | str,
    output: Path,
    to: Form,
    paths: Sequence[Path],
    *,
    weights: Weights,
    seed: int,
    added: AddedColumns,
    overwrite: bool,
) -> int:
    """Write an export, whose arguments are those of `cads.export`; returns the number of rows or lines.

    Raises:
        CadsError: as `cads.export`.
    """
    _check(output, to, added, overwrite)
    if not isinstance(selection, Selection):
        folder = Path(selection)
        selection = Selection.load(folder)
        if to == "files":
            refuse_synthetic(folder)
    counts = selection.row_counts(weights, seed, "an export has")
    if to == "files":
        return _write_list(selection, counts, output, paths, weighted=weights == "column" and selection.unequal)
    recorded = () if selection.origin is None else selection.origin.files
    pool_files = [*paths, *(Path(file.location) for file in recorded)]
    if output.exists() and any(path.exists() and os.path.samefile(output, path) for path in pool_files):
        raise ConfigError(f"output = {output} is a file of the pool itself: name another")
    rows = chosen_rows(selection, counts, paths, added)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial:
        return WRITERS[to](rows.blocks, partial)


def _write_list(
    selection: Selection, counts: np.ndarray, output: Path, paths: Sequence[Path], *, weighted: bool
) -> int:
    lines = image_lines(selection, counts, paths, weighted=weighted)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    return int(counts.sum())


def _check(output: Path, to: str, added: AddedColumns, overwrite: bool) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        ConfigError: naming the setting.
    """
    if to not in get_args(Form):
        raise ConfigError(f"to = {to!r}: choose from {list(get_args(Form))}")
    if output.is_dir():
        raise ConfigError(f"output = {output} is a folder: name a file in it")
    if output.exists() and not overwrite:
        raise ConfigError(f"output = {output} exists: name another, or replace it by --overwrite true")
    if output.suffix.lower() in COMPRESSIONS:
        raise ConfigError(
            f"output = {output}: exports are not compressed: leave out {output.suffix!r}, and do so after"
        )
    if added.weight is not None and added.weight == added.source:
        raise ConfigError(f"weight_column = source_column = {added.weight!r}: give them different names")
