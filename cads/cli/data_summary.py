"""What data is: sizes, sources, lengths, copies, leaks and what was left out; of a task, or of rows without tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from cads.data.origin import row_hashes
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.task import Task
from cads.tasks.language.columns import COLUMNS, LABELS
from cads.tasks.language.rows import source_codes
from cads.tasks.language.splits import Parts, Split

PARTS = ("pool", "target", "test")
EXAMPLE_WIDTH = 70
"""Characters of an example that are shown."""
MAX_SOURCES = 30
"""Sources that are shown; the largest, if there are more."""


@dataclass(frozen=True)
class PartSummary:
    """Pool, target or test set.

    Attributes:
        contents: a hash of the inputs of each example, shape (N,).
        lengths: of each example, int64, shape (N,); None if examples have none.
    """

    contents: pa.Array
    lengths: np.ndarray | None

    @property
    def n_different(self) -> int:
        """Examples that are no copies of others in it."""
        return int(pc.count_distinct(self.contents).as_py())


@dataclass(frozen=True)
class DataSummary:
    """What pool, target and test set are.

    Attributes:
        title: of the data. parts: by name, see `PARTS`. unit: of lengths.
        sources: the source of each example of the pool, as an index into `source_names`; None without sources.
        remarks: what else is to be said of the data.
    """

    title: str
    parts: dict[str, PartSummary]
    unit: str = "tokens"
    sources: np.ndarray | None = None
    source_names: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Tables and remarks."""
        console.print(self.sizes())
        if self.sources is not None:
            console.print(self.source_table())
        for line in [*self.remarks, *self.leaks()]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def sizes(self) -> Table:
        """Examples of each part, how many different ones, and their lengths."""
        has_lengths = self.parts["pool"].lengths is not None
        table = Table(title=self.title, title_justify="left")
        table.add_column("part")
        for column in ("examples", "different", *(["median", "longest", self.unit] if has_lengths else [])):
            table.add_column(column, justify="right")
        for name, part in self.parts.items():
            row = [f"{len(part.contents):,}", f"{part.n_different:,}"]
            if part.lengths is not None:
                row += [f"{np.median(part.lengths):,.0f}", f"{part.lengths.max():,}", f"{part.lengths.sum():,}"]
            table.add_row(name, *row)
        return table

    def source_table(self) -> Table:
        """Examples of each source of the pool, and how many different ones it has."""
        assert self.sources is not None
        contents = np.asarray(self.parts["pool"].contents.dictionary_encode().indices)
        pairs = np.unique(np.stack([self.sources.astype(np.int64), contents]), axis=1)[0]
        counts, different = (np.bincount(x, minlength=len(self.source_names)) for x in (self.sources, pairs))
        shown = np.arange(len(counts))
        title = "sources of the pool"
        if len(shown) > MAX_SOURCES:
            shown = np.sort(np.argsort(-counts, kind="stable")[:MAX_SOURCES])
            title += f": the largest {MAX_SOURCES} of {len(counts)}"
        table = Table(title=title, title_justify="left")
        table.add_column("source")
        for column in ("examples", "share", "different"):
            table.add_column(column, justify="right")
        for i in shown.tolist():
            share = counts[i] / len(self.sources)
            table.add_row(self.source_names[i], f"{counts[i]:,}", f"{share:.1%}", f"{different[i]:,}")
        return table

    def leaks(self) -> list[str]:
        """A line for target and for test set: how many of its examples the pool has too."""
        known = self.parts["pool"].contents
        lines = []
        for name in PARTS[1:]:
            contents = self.parts[name].contents
            shared = int(pc.sum(pc.is_in(contents, value_set=known)).as_py())
            lines.append(f"{name}: {shared:,} of {len(contents):,} examples are in the pool too")
        return lines


def task_summary(task: Task) -> DataSummary:
    """What the data of a task is; for texts in tokens."""
    remarks = []
    groups = task.groups(task.pool)
    if groups is not None:
        for name in PARTS:
            counts = np.bincount(np.asarray(task.groups(getattr(task, name))), minlength=int(groups.max()) + 1)
            remarks.append(f"{name}: {len(counts)} classes, of {counts.min():,} to {counts.max():,} examples")
    if lengths(task.pool) is None:
        shapes = task.pool.batch(np.zeros(1, dtype=np.int64)).shape
        remarks += [f"{name}: {' x '.join(map(str, shape))} each" for name, shape in shapes]
    remarks += left_out(task.counts)
    if task.pool.sources is None:
        ways = ["single examples"] if task.guess_loss is not None else []
        ways += ["groups by how much they are like the target"] if task.descriptor_flops else []
        weighed = f"weighs {' and '.join(ways)}" if ways else "has nothing to weigh"
        remarks.append(f"the pool has no sources: `cads` then {weighed}")
    parts = {name: _part(getattr(task, name)) for name in PARTS}
    pool = task.pool
    return DataSummary(task.name, parts, "tokens", pool.sources, pool.source_names, remarks)


def split_summary(split: Split, title: str) -> DataSummary:
    """What rows are that are not yet tokens; in characters."""
    parts = {name: _rows_part(getattr(split, name)) for name in PARTS}
    codes, names = source_codes(split.pool)
    if not split.named and split.pool[0].sources is None:
        return DataSummary(title, parts, "characters")
    return DataSummary(title, parts, "characters", codes, tuple(names))


def left_out(counts: Mapping[str, Any]) -> list[str]:
    """A line for each source of which something was cut or left out, or for each reason; see `Task.counts`."""
    lines = []
    for name, value in counts.items():
        if isinstance(value, Mapping) and "number" in value:
            lines.append(f"{name}: {value['number']:,}, such as {', '.join(value.get('names', [])[:3])}")
            continue
        if not isinstance(value, list):
            lines += [f"{name}: {value}"] if value else []
            continue
        for entry in value:
            changed = [f"{count:,} {what.replace('_', ' ')}" for what, count in entry.items() if _is_loss(what, count)]
            if changed:
                lines.append(f"{name}, {entry.get('source')}: {', '.join(changed)} of {entry.get('rows'):,} rows")
    return lines


def first_examples(task: Task) -> list[str]:
    """The beginning of the first example of each part, for examples that are text."""
    lines = []
    for name in PARTS:
        for text in task.describe(getattr(task, name), np.zeros(1, dtype=np.int64)) or ():
            line = " ".join(text.split())
            short = line if len(line) <= EXAMPLE_WIDTH else line[: EXAMPLE_WIDTH - 3] + "..."
            lines.append(f"{name}, first: {short}")
    return lines


def _part(pool: Pool) -> PartSummary:
    return PartSummary(pool.digests, lengths(pool))


def _rows_part(parts: Parts) -> PartSummary:
    hashes, characters = [], []
    for rows in parts:
        for ids, table in rows.shards():
            # The same roles in the same order, so that files with different columns can be compared.
            present = {role: table[role].to_pylist() for role in table.column_names}
            missing = [None] * len(ids)
            columns = [present.get(role, missing) for role in COLUMNS if role not in LABELS]
            hashes.append(row_hashes(columns))
            characters += [sum(map(_characters, row)) for row in zip(*columns, strict=True)]
    return PartSummary(pa.array(np.concatenate(hashes)), np.array(characters, dtype=np.int64))


def _characters(value: Any) -> int:
    """Characters of all text in a value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return len(value)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(inner) for key, inner in value.items() if key not in ("role", "from"))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _is_loss(what: str, count: Any) -> bool:
    return what not in ("source", "rows") and isinstance(count, int) and count > 0
