"""The task that files of texts are: their formats and columns, and settings that they need."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cads.cli.recognition import Inputs
from cads.tasks.language.rows import Rows, TextSource, load_rows, repeated_ids
from cads.tasks.language.tables import read_file, stem_of, text_column

SOURCE_COLUMNS = ("dataset", "subset", "domain", "category", "topic", "task", "origin", "source_dataset", "corpus")
"""Columns that are taken for the source of each row where no column is called so; case does not matter."""
MAX_SOURCES = 300
"""Different values of a column of sources."""


@dataclass
class FoundFile:
    """A file of texts.

    Attributes:
        entry: its settings, as an item of the task's pool, target or test. part: which of them.
        rows: as they were read.
    """

    entry: dict[str, Any]
    part: str
    rows: Rows

    @property
    def read_as(self) -> str:
        """The roles of its columns, and the columns where their names differ."""
        return ", ".join(role if role == name else f"{role} = {name}" for role, name in self.rows.columns.items())


@dataclass
class TextFiles:
    """All files of a task of texts; `said`: what was guessed."""

    files: list[FoundFile]
    said: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        """The format of most rows of the pool."""
        counts: Counter[str] = Counter()
        for file in self.files:
            if file.part == "pool":
                counts[file.rows.format] += len(file.rows)
        return counts.most_common(1)[0][0]

    def task(self) -> dict[str, Any]:
        """Pool, target and test set, as fields of the task."""
        parts = {part: [file.entry for file in self.files if file.part == part] for part in ("pool", "target", "test")}
        return {part: entries for part, entries in parts.items() if entries}


def read_texts(inputs: Inputs) -> TextFiles:
    """Read all files, and find settings with which they go together.

    A column that looks like that of sources is named, where the pool is one file without a column called `source`. Ids
    that several files share are given the names of their files.

    Raises:
        DataError: if a file cannot be read, or its columns are not recognised.
    """
    alone = len(inputs.texts["pool"]) == 1
    files, said = [], []
    for part, paths in inputs.texts.items():
        for path in paths:
            entry: dict[str, Any] = {"path": path}
            given_sources = part == "pool" and alone
            rows = load_rows(TextSource(**entry), 0, given_sources=given_sources)
            if given_sources and rows.sources is None and (column := _source_column(path, rows)) is not None:
                entry["columns"] = {"source": column}
                rows = load_rows(TextSource(**entry), 0, given_sources=True)
                said.append(f"{path}: its column {column!r} is taken for the source of each row")
            files.append(FoundFile(entry, part, rows))
    _keep_ids_apart(files, said)
    return TextFiles(files, said)


def _source_column(path: str, rows: Rows) -> str | None:
    """An unused column of a file whose name and few values say that it holds sources."""
    named = {column.lower(): column for column in reversed(rows.unused)}
    for name in SOURCE_COLUMNS:
        column = named.get(name)
        if column is None or Path(path).is_dir():
            continue
        values = text_column(read_file(Path(path))[column])
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if is_text and not values.null_count and 2 <= len(pc.unique(values)) <= min(MAX_SOURCES, len(values) // 2):
            return column
    return None


def _keep_ids_apart(files: list[FoundFile], said: list[str]) -> None:
    """Put the name of each file before its ids, if two files share one."""
    with_ids = [file for file in files if "id" in file.rows.columns]
    if len(with_ids) < 2 or not repeated_ids(pa.chunked_array([file.rows.ids for file in with_ids])):
        return
    names = Counter(stem_of(Path(file.entry["path"])) for file in with_ids)
    for number, file in enumerate(with_ids):
        stem = stem_of(Path(file.entry["path"]))
        prefix = (stem if names[stem] == 1 else f"{stem}-{number}").replace("{", "{{").replace("}", "}}")
        template = f"{prefix}-{{{file.rows.columns['id']}}}"
        file.entry["columns"] = {**file.entry.get("columns", {}), "id": template}
    said.append("files share ids: the name of each file is put before its ids")
