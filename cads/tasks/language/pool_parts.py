"""The pool of a language task file by file: one file is read, encoded and forgotten after the other."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cads.accounting.costs import Costs
from cads.data.origin import FileOrigin
from cads.errors import ConfigError
from cads.runtime.file_listing import DataFile, list_files, local_copy
from cads.scoring.sharded import PoolPart
from cads.tasks.language.rows import Rows, TextSource, load_rows
from cads.tasks.language.settings import LanguageSettings
from cads.tasks.language.source_names import names_and_prefixes
from cads.tasks.language.splits import Parts, Split, split_held_out
from cads.tasks.language.tables import COMPRESSIONS, SUFFIXES
from cads.tasks.language.task import LanguageTask

log = logging.getLogger(__name__)

ENDINGS = (
    *SUFFIXES,
    *(text + packed for text in (".json", ".jsonl", ".ndjson", ".csv", ".tsv") for packed in COMPRESSIONS),
)
"""How names of files end that are read."""


@dataclass(frozen=True)
class TextFile:
    """A file of the pool.

    Attributes:
        file: where it is. entry: of the pool, whose name and columns hold for it. prefix: of the ids of rows that are
            numbered.
    """

    file: DataFile
    entry: TextSource
    prefix: str

    @property
    def name(self) -> str:
        """What it is called in the folder of a run: unique in its pool."""
        return self.prefix


class TextParts:
    """The files of a pool, and a task for each. Target and test set are those of all, and are given.

    Args:
        config: of the task; the entries of its pool are files, folders or addresses. build: the task on some rows.

    Raises:
        ConfigError: if the pool cannot be read file by file.
    """

    def __init__(self, config: LanguageSettings, build: Callable[[Split], LanguageTask]) -> None:
        self._config, self._build = config, build
        self._costs: list[Costs] | None = None
        if not config.target:
            raise ConfigError("shards need a target of their own: give task.target, which is not drawn from the pool")
        if config.n_pool is not None or any(entry.limit is not None for entry in config.pool):
            raise ConfigError("n_pool and limit draw from the whole pool: leave them out where it is read in shards")
        hub = [entry.location for entry in config.pool if entry.path is None]
        if hub:
            raise ConfigError(
                f"{hub[0]} is a data set of the hub: for shards name its files, as hf://datasets/{hub[0]}"
            )

    @cached_property
    def files(self) -> list[TextFile]:
        """All files, in the order of the entries and by name.

        Raises:
            DataError: if a folder cannot be listed, or holds no file of data.
            ConfigError: if a file is in two entries.
        """
        files: list[TextFile] = []
        for entry, (name, prefix) in zip(self._config.pool, names_and_prefixes(self._config.pool), strict=True):
            listed = list_files(entry.location, ENDINGS)
            alone = len(listed) == 1 and entry.location.endswith(listed[0].name)
            named = replace(entry, name=name)
            files += [TextFile(file, named, prefix if alone else f"{prefix}/{file.name}") for file in listed]
        names: set[str] = set()
        for text_file in files:
            if text_file.name in names:
                raise ConfigError(f"{text_file.file.location} is in the pool twice: give each file once")
            names.add(text_file.name)
        return files

    @contextmanager
    def part(self, text_file: TextFile) -> Iterator[PoolPart]:
        """The task of one file; a remote one is copied to this machine while the block runs.

        Raises:
            DataError: if the file cannot be read, or leaks into target or test set.
        """
        with local_copy(text_file.file) as path:
            task = self._task(self._rows(text_file, path))
            task.check()
            self._share_costs(task)
            yield PoolPart(task, path, len(self.files))

    @contextmanager
    def sample(self, rows: list[dict[str, Any]]) -> Iterator[LanguageTask]:
        """A task whose pool are some rows of the files, as JSON values; they are read as those of the first file."""
        layouts = {(entry.format, tuple(sorted(entry.columns.items()))) for entry in self._config.pool}
        if len(layouts) > 1:
            raise ConfigError(
                "rows of all files are needed at once, and the entries of task.pool differ in their columns"
            )
        with tempfile.TemporaryDirectory(prefix="cads-") as folder:
            path = Path(folder) / "sample.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            source = replace(self.files[0].entry, path=str(path))
            yield self._task(load_rows(source, self._config.data_seed, given_sources=False))

    def _share_costs(self, task: LanguageTask) -> None:
        """Price all files by the costs of the first: counting FLOPs takes longer than a small file."""
        if self._costs is None:
            self._costs = [each.costs for each in (task, task.proxy) if each is not None]
            return
        for each, costs in zip((task, task.proxy), self._costs, strict=False):
            if each is not None:
                vars(each)["costs"] = costs

    def _rows(self, text_file: TextFile, path: Path) -> Rows:
        source = replace(text_file.entry, path=str(path))
        single = len(self._config.pool) == 1
        rows = load_rows(source, self._config.data_seed, given_sources=single, prefix=text_file.prefix)
        location = text_file.file.location
        if rows.origin is None or rows.origin.location == location:
            return rows
        read = rows.origin
        return replace(rows, origin=FileOrigin(location, read.rows, read.columns, read.digest, read.id_column))

    def _task(self, rows: Rows) -> LanguageTask:
        targets, tests = self._held_out
        split = Split([rows], targets, tests, named=len(self._config.pool) > 1)
        return self._build(split)

    @cached_property
    def _held_out(self) -> tuple[Parts, Parts]:
        config = self._config
        return split_held_out(config.target, config.test, config.n_target, config.n_test, config.data_seed)
