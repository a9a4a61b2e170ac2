"""One export: what is written, where, and in which form."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cads.errors import ConfigError
from cads.exports.chosen_rows import AddedColumns, ChosenRows, chosen_rows
from cads.exports.hub import upload_rows
from cads.exports.image_list import image_lines, refuse_synthetic
from cads.exports.trainer_files import check_added, write_for_trainer
from cads.exports.trainers import TRAINERS
from cads.exports.writers import Blocks, write_json_lines, write_parquet
from cads.runtime.atomic_files import atomic_file
from cads.runtime.hub_upload import check_repo_id
from cads.selection import Selection, Weights
from cads.tasks.language.tables import COMPRESSIONS

__all__ = ["AddedColumns", "Form", "write_export"]

log = logging.getLogger(__name__)

Form = Literal["jsonl", "parquet", "files", "llamafactory", "axolotl", "trl", "hub"]
"""Rows as JSON lines or Parquet; a list of image files; a folder for a trainer; a data set on the hub."""
WRITERS: dict[str, Callable[[Blocks, Path], int]] = {"jsonl": write_json_lines, "parquet": write_parquet}
FIELDS = ("text", "prompt", "completion", "messages", "tools")
"""Fields of rows that trainers read."""


def write_export(
    selection: Selection | Path | str,
    output: Path | str,
    to: Form,
    paths: Sequence[Path],
    *,
    weights: Weights | None,
    seed: int,
    added: AddedColumns,
    overwrite: bool,
    chat: bool,
    private: bool,
    token: str | None,
) -> int:
    """Write an export, whose arguments are those of `cads.export`; returns the number of rows or lines.

    Raises:
        CadsError: as `cads.export`.
    """
    _check(output, to, added, overwrite, chat)
    if not isinstance(selection, Selection):
        folder = Path(selection)
        selection = Selection.load(folder)
        if to == "files":
            refuse_synthetic(folder)
    trainer = TRAINERS.get(to)
    if weights is None:
        weights = "resample" if trainer is not None and selection.unequal else "column"
    if weights == "resample":
        added = replace(added, weight=None)
    # A trainer that mixes by shares gets the rows of each source by their weights, and the shares in its configuration.
    over_all = "column" if trainer is not None and trainer.mixes else weights
    counts = selection.row_counts(over_all, seed, "an export has")
    if to == "files":
        weighted = weights == "column" and selection.unequal
        return _write_list(selection, counts, Path(output), paths, weighted=weighted)
    if to == "hub" and selection.origin is None:
        log.warning("the pool's examples are in no files of rows: the Selection alone is uploaded, with ids and scores")
        selection.push_to_hub(str(output), private=private, token=token)
        return 0
    rows = chosen_rows(selection, counts, paths, added)
    if to == "hub":
        return upload_rows(rows, str(output), private=private, token=token)
    output = Path(output)
    _keep_pool(output, selection, paths)
    if trainer is not None:
        return write_for_trainer(rows, output, trainer, weights=weights, seed=seed, chat=chat)
    return _write_rows(rows, output, to)


def _write_rows(rows: ChosenRows, output: Path, to: Form) -> int:
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


def _keep_pool(output: Path, selection: Selection, paths: Sequence[Path]) -> None:
    """Refuse to write over a file of the pool, or over a folder that holds one.

    Raises:
        ConfigError: naming the output.
    """
    recorded = () if selection.origin is None else selection.origin.files
    for path in [*paths, *(Path(file.location) for file in recorded)]:
        if not (output.exists() and path.exists()):
            continue
        if os.path.samefile(output, path):
            raise ConfigError(f"output = {output} is a file of the pool itself: name another")
        if output.resolve() in path.resolve().parents:
            raise ConfigError(f"output = {output} holds {path.name}, a file of the pool: name another folder")


def _check(output: Path | str, to: str, added: AddedColumns, overwrite: bool, chat: bool) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        ConfigError: naming the setting.
    """
    if to not in get_args(Form):
        raise ConfigError(f"to = {to!r}: choose from {list(get_args(Form))}")
    if added.weight is not None and added.weight == added.source:
        raise ConfigError(f"weight_column = source_column = {added.weight!r}: give them different names")
    if to == "hub":
        check_repo_id(str(output))
        return
    if not chat and to not in TRAINERS:
        raise ConfigError(f"chat = false is for {', '.join(TRAINERS)}: --to {to} writes rows as they stand in files")
    output = Path(output)
    if to in TRAINERS:
        check_added(added, FIELDS)
        _check_folder(output, to, overwrite)
        return
    if output.is_dir():
        raise ConfigError(f"output = {output} is a folder: name a file in it")
    if output.exists() and not overwrite:
        raise ConfigError(f"output = {output} exists: name another, or replace it by --overwrite true")
    if output.suffix.lower() in COMPRESSIONS:
        raise ConfigError(
            f"output = {output}: exports are not compressed: leave out {output.suffix!r}, and do so after"
        )


def _check_folder(output: Path, to: str, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier export, or that may not be replaced."""
    if output.is_file():
        raise ConfigError(f"output = {output} is a file: --to {to} writes a folder")
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    own = {"data", "dataset_info.json", *(f"{name}.yaml" for name in TRAINERS)}
    foreign = [name for name in present if name not in own]
    if foreign:
        raise ConfigError(f"output = {output} holds {foreign[:3]}: name a folder of its own")
    if present and not overwrite:
        raise ConfigError(f"output = {output} exists: name another, or replace it by --overwrite true")
