"""The summary of a study as a table: for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cads.accounting.ledger import GLOSSARY
from cads.study.analysis.points import CONFIDENCE, MethodPoint, best_of, complete, in_percent, score_text
from cads.study.analysis.verdicts import shown_name

WIDTH = 80
"""Columns of tables where there is no terminal."""


def plain_console(*, quiet: bool = False) -> Console:
    """A console that is `WIDTH` columns wide where there is no terminal."""
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def header(points: Sequence[MethodPoint]) -> list[str]:
    """Names of the columns."""
    metric = points[0].metric + (", %" if in_percent(points[0].metric) else "")
    varying = [name for name in ("task", "model") if len({getattr(p, name) for p in points}) > 1]
    return [*varying, "budget", "method", "selection", "training", metric, "selected"]


def texts(points: Sequence[MethodPoint]) -> list[list[str]]:
    """One row for each point, budget by budget. A star marks the best point of each budget.

    Intervals are t-intervals over seeds. A point with fewer seeds than others is marked, and is never the best.
    """
    columns = header(points)
    blocks: dict[tuple[str, str, str], list[MethodPoint]] = {}
    for p in points:
        blocks.setdefault((p.task, p.model, p.budget), []).append(p)
    rows = []
    for block in blocks.values():
        ranked = complete(block)
        best = best_of(ranked)
        for p in block:
            score = ("*" if p.mean == best.mean and p in ranked else "") + score_text(p.mean, p.metric)
            if not math.isnan(p.half_width):
                score += f" ± {score_text(p.half_width, p.metric)}"
            if p not in ranked:
                score += f" ({len(p.seeds)} of {len(best.seeds)} seeds)"
            selected = "-" if p.selected is None else f"{p.selected:.0%}"
            labels = [getattr(p, name) for name in columns if name in ("task", "model")]
            rows.append(
                [*labels, p.budget, shown_name(p.method), f"{p.selection:.3g}", f"{p.train_flops:.3g}", score, selected]
            )
    return rows


def terminal_table(points: Sequence[MethodPoint], title: str) -> Table:
    """The table for the terminal, at most 80 columns wide: a heading for each budget, and a row for each method."""
    table = Table(title=f"{title}: {intervals(points)}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_justify = f"FLOPs; * is the best of a budget. Terms: {GLOSSARY}", "left"
    columns = header(points)
    n_keys = columns.index("budget") + 1
    table.add_column("method", overflow="fold")
    for name in columns[n_keys + 1 :]:
        table.add_column(name, justify="right", no_wrap=True)
    heading: list[str] = []
    for row in texts(points):
        if row[:n_keys] != heading:
            heading = row[:n_keys]
            table.add_row(Text(", ".join(filter(None, heading)), style="bold"))
        table.add_row(Text(f"  {row[n_keys]}"), *row[n_keys + 1 :])
    return table


def markdown_table(points: Sequence[MethodPoint]) -> str:
    """The table as Markdown."""
    columns = header(points)
    lines = [columns, ["---"] * len(columns), *([x.replace("|", "\\|") for x in row] for row in texts(points))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def intervals(points: Sequence[MethodPoint]) -> str:
    """The number of seeds and the kind of the intervals, in words."""
    n_seeds = max(len(p.seeds) for p in points)
    return f"{n_seeds} seeds, {CONFIDENCE:.0%} t-intervals" if n_seeds > 1 else "one seed"
