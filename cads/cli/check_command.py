"""The command `cads check`: what the data is, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cads.cli.config import read
from cads.cli.settings import CheckSettings
from cads.data.pool import Pool
from cads.data.token_batches import lengths
from cads.task import Task

PARTS = ("pool", "target", "test")
EXAMPLE_WIDTH = 70
"""Characters of an example that are shown."""


def check(argv: list[str]) -> None:
    """Report on pool, target and test set: sizes, sources, lengths, copies and leaks. No weights are loaded."""
    config = read(CheckSettings, argv)
    task: Task = config.objects.task.build(config.objects.train)
    task.check()
    console = Console()
    console.print(sizes(task))
    if task.pool.sources is not None:
        console.print(sources(task.pool))
    for line in remarks(task):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for part in PARTS:
        pool: Pool = getattr(task, part)
        for text in task.describe(pool, np.zeros(1, dtype=np.int64)) or ():
            line = " ".join(text.split())
            short = line if len(line) <= EXAMPLE_WIDTH else line[: EXAMPLE_WIDTH - 3] + "..."
            console.print(f"{part}, first: {short}", soft_wrap=True, markup=False, highlight=False)
    console.print("Nothing was spent. `cads plan` says what a budget buys.")


def sizes(task: Task) -> Table:
    """Examples of each part, how many different ones, and for texts their lengths in tokens."""
    table = Table(title=task.name, title_justify="left")
    columns = ["examples", "different", *(["median", "longest", "tokens"] if lengths(task.pool) is not None else [])]
    table.add_column("part")
    for column in columns:
        table.add_column(column, justify="right")
    for part in PARTS:
        pool: Pool = getattr(task, part)
        row = [f"{len(pool):,}", f"{int(pool.code_contents().max()) + 1:,}"]
        own = lengths(pool)
        if own is not None:
            row += [f"{np.median(own):,.0f}", f"{own.max():,}", f"{own.sum():,}"]
        table.add_row(part, *row)
    return table


def sources(pool: Pool) -> Table:
    """Examples of each source of the pool, and how many different ones it has."""
    assert pool.sources is not None
    contents = pool.code_contents()
    table = Table(title="sources of the pool", title_justify="left")
    table.add_column("source")
    for column in ("examples", "share", "different"):
        table.add_column(column, justify="right")
    counts = np.bincount(pool.sources, minlength=len(pool.source_names))
    pairs = np.unique(np.stack([pool.sources.astype(np.int64), contents]), axis=1)[0]
    different = np.bincount(pairs, minlength=len(pool.source_names))
    for name, count, kinds in zip(pool.source_names, counts.tolist(), different.tolist(), strict=True):
        table.add_row(name, f"{count:,}", f"{count / len(pool):.1%}", f"{kinds:,}")
    return table


def remarks(task: Task) -> list[str]:
    """What else a user should know: classes, what was left out, and target or test examples that the pool has too."""
    lines = []
    groups = task.groups(task.pool)
    if groups is not None:
        for part in PARTS:
            counts = np.bincount(np.asarray(task.groups(getattr(task, part))), minlength=int(groups.max()) + 1)
            lines.append(f"{part}: {len(counts)} classes, of {counts.min():,} to {counts.max():,} examples")
    lines += left_out(task.counts)
    known = set(task.pool.digests.to_pylist())
    for part in PARTS[1:]:
        shared = sum(digest in known for digest in getattr(task, part).digests.to_pylist())
        lines.append(f"{part}: {shared:,} of {len(getattr(task, part)):,} examples are in the pool too")
    if task.pool.sources is None:
        weighed = "has nothing to weigh" if task.guess_loss is None else "weighs single examples alone"
        lines.append(f"the pool has no sources: `cads` then {weighed}")
    return lines


def left_out(counts: Mapping[str, Any]) -> list[str]:
    """A line for each source of which something was cut or left out, or for each reason; see `Task.counts`."""
    lines = []
    for name, value in counts.items():
        if not isinstance(value, list):
            lines += [f"{name}: {value}"] if value else []
            continue
        for entry in value:
            changed = [f"{count:,} {what.replace('_', ' ')}" for what, count in entry.items() if _is_loss(what, count)]
            if changed:
                lines.append(f"{name}, {entry.get('source')}: {', '.join(changed)} of {entry.get('rows'):,} rows")
    return lines


def _is_loss(what: str, count: Any) -> bool:
    return what not in ("source", "rows") and isinstance(count, int) and count > 0
