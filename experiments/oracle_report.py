"""Tables and figure of the known-answer benchmark, computed from its cells alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.table import Table

from cads.study.analysis.points import CONFIDENCE, half_width

mpl.use("Agg")

WORSE = 0.005
"""Loss of accuracy against uniform from which a cell counts as worse than uniform."""
LONG_FROM = 4
"""Passes over the pool from which a budget counts as long in the summary."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart; markers distinguish the methods too."""
MARKERS = "osD^vP*X<>hp"

NOTE = (
    "Regret: what the best subset of sources comes to, less what the choice comes to, in points of test accuracy and "
    "in nats of calibrated test loss. The best is chosen on half of the seeds of the truth and measured on the other "
    "half, as is every choice; so a regret can be negative. The floor is how much better the best subset on the half "
    "to measure on is: no difference smaller than that means much. Uniform is the full pool. ± is half a "
    f"{CONFIDENCE:.0%} t-interval over the seeds of the selector. Selection is in units of C, the training budget; "
    "selected is the mean weight of each source's examples, in the order of the world file."
)


@dataclass
class Cell:
    """The choice of one method with one seed, and its value.

    Attributes:
        world, budget, method, seed: what was run; the budget in passes over the pool.
        chosen: mean weight of the examples of each source, shape (S,).
        target_fraction: share of each batch that is drawn from the target.
        regret_val: regret in calibrated test loss, nats. regret_acc: regret in test accuracy, between 0 and 1.
        selection_over_C: FLOPs of selection in units of the budget. seconds: that selection took.
        losses, accuracy: of the models trained on the choice, one for each seed of the truth.
        notes: of the selection.
    """

    world: str
    budget: float
    method: str
    seed: int
    chosen: list[float]
    regret_val: float
    regret_acc: float
    selection_over_C: float
    seconds: float
    losses: list[float]
    accuracy: list[float]
    target_fraction: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reference:
    """The truth of a world at a budget, which cells are compared with.

    Attributes:
        best: the best subset. best_accuracy: its accuracy on the seeds to measure on.
        uniform_regret_val, uniform_regret_acc: regret of the full pool, in nats and in accuracy.
        floor_val, floor_acc: see `experiments.truth.Truth.floor`.
        exhaustive: whether `best` is the best of all subsets, or the best that a search found.
        subsets: number of subsets that were trained.
    """

    world: str
    budget: float
    sources: list[str]
    best: list[float]
    best_accuracy: float
    uniform_regret_val: float
    uniform_regret_acc: float
    floor_val: float
    floor_acc: float
    exhaustive: bool
    subsets: int


@dataclass
class Row:
    """One method in one table: means, and half-widths of their intervals over seeds."""

    method: str
    regret_acc: float
    width_acc: float
    regret_val: float
    width_val: float
    selection: float
    seconds: float
    cells: list[Cell]


@dataclass
class Summary(Row):
    """One method over all worlds and budgets.

    Attributes:
        long_acc, long_width, long_val: as in `Row`, over long budgets alone; NaN where there are none.
        worse: worlds and budgets where the method is worse than uniform, with the loss in points.
    """

    long_acc: float = np.nan
    long_width: float = np.nan
    long_val: float = np.nan
    worse: list[str] = field(default_factory=list)


def rows_of(cells: Iterable[Cell]) -> list[Row]:
    """One row for each method, lowest regret first; `cells` are of one world and budget."""
    rows = []
    for method, group in _by(cells, lambda c: c.method).items():
        acc, val = [c.regret_acc for c in group], [c.regret_val for c in group]
        rows.append(Row(method, *_mean_and_width(acc), *_mean_and_width(val), *_costs(group), group))
    return sorted(rows, key=lambda row: row.regret_acc)


def summary_of(cells: Sequence[Cell], references: Sequence[Reference]) -> list[Summary]:
    """One row for each method over all worlds and budgets, lowest regret first.

    Intervals are over seeds; the regret of a seed is the mean over its cells.
    """
    uniform = {(r.world, r.budget): r.uniform_regret_acc for r in references}
    rows = []
    for method, group in _by(cells, lambda c: c.method).items():
        long = [c for c in group if c.budget >= LONG_FROM]
        losses = {
            setting: np.mean([c.regret_acc for c in cells_there]) - uniform[setting]
            for setting, cells_there in _by(group, lambda c: (c.world, c.budget)).items()
        }
        row = Summary(
            method,
            *_mean_and_width(_by_seed(group, "regret_acc")),
            *_mean_and_width(_by_seed(group, "regret_val")),
            *_costs(group),
            group,
            worse=[f"{world} {budget:g} ({100 * losses[world, budget]:+.1f})" for world, budget in losses],
        )
        row.worse = [text for text, loss in zip(row.worse, losses.values(), strict=True) if loss > WORSE]
        if long:
            row.long_acc, row.long_width = _mean_and_width(_by_seed(long, "regret_acc"))
            row.long_val = float(np.mean([c.regret_val for c in long]))
        rows.append(row)
    return sorted(rows, key=lambda row: row.regret_acc)


def _by(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _by_seed(cells: Iterable[Cell], name: str) -> list[float]:
    return [float(np.mean([getattr(c, name) for c in group])) for group in _by(cells, lambda c: c.seed).values()]


def _mean_and_width(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), half_width(values)


def _costs(cells: Sequence[Cell]) -> tuple[float, float]:
    return float(np.mean([c.selection_over_C for c in cells])), float(np.mean([c.seconds for c in cells]))


def weights(chosen: Sequence[float]) -> str:
    """Weights of sources in short form: 1 0 .31."""
    return " ".join("1" if w > 0.995 else "0" if w == 0 else f"{w:.2f}".lstrip("0") for w in chosen)


COLUMNS = ("method", "regret, points", "regret, nats", "selection / C", "seconds", "selected (most often)")
SUMMARY = (
    "method",
    "regret, points",
    f"from {LONG_FROM} passes on",
    "regret, nats",
    "selection / C",
    "seconds",
    "cells > 0.5 points worse than uniform",
)


def _points(mean: float, width: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{100 * mean:.2f}" + ("" if np.isnan(width) else f" ± {100 * width:.2f}")


def _texts(row: Row) -> list[str]:
    choice, count = Counter(weights(c.chosen) for c in row.cells).most_common(1)[0]
    return [
        row.method,
        _points(row.regret_acc, row.width_acc),
        f"{row.regret_val:.3f}" + ("" if np.isnan(row.width_val) else f" ± {row.width_val:.3f}"),
        f"{row.selection:.2f}",
        f"{row.seconds:.1f}",
        f"{choice} ({count} of {len(row.cells)})",
    ]


def _summary_texts(row: Summary) -> list[str]:
    n_settings = len({(c.world, c.budget) for c in row.cells})
    worse = f"{len(row.worse)} of {n_settings}" + (f": {', '.join(row.worse)}" if row.worse else "")
    return [
        row.method,
        _points(row.regret_acc, row.width_acc),
        _points(row.long_acc, row.long_width),
        f"{row.regret_val:.3f}",
        f"{row.selection:.2f}",
        f"{row.seconds:.1f}",
        worse,
    ]


def _heading(r: Reference) -> str:
    kind = f"best of all {r.subsets} subsets" if r.exhaustive else f"best that a search over {r.subsets} subsets found"
    return (
        f"{r.world}, {r.budget:g} passes: {kind} is {weights(r.best)} with {100 * r.best_accuracy:.2f} %; "
        f"uniform loses {100 * r.uniform_regret_acc:.2f} points, {r.uniform_regret_val:.3f} nats; "
        f"floor {100 * r.floor_acc:.2f} points, {r.floor_val:.3f} nats"
    )


Section = tuple[str, Sequence[str], list[list[str]]]
"""Title, columns and rows of a table."""


def _sections(cells: Sequence[Cell], references: Sequence[Reference]) -> list[Section]:
    """Every table, the summary first."""
    counts = f"{len({r.world for r in references})} worlds, {len({r.budget for r in references})} budgets"
    uniform = [100 * r.uniform_regret_acc for r in references]
    long = [100 * r.uniform_regret_acc for r in references if r.budget >= LONG_FROM]
    title = f"{counts}; uniform loses {np.mean(uniform):.2f} points"
    title += f", {np.mean(long):.2f} from {LONG_FROM} passes on" if long else ""
    title += f"; floor {100 * np.mean([r.floor_acc for r in references]):.2f}"
    sections: list[Section] = [(title, SUMMARY, [_summary_texts(row) for row in summary_of(cells, references)])]
    for r in references:
        own_cells = [c for c in cells if (c.world, c.budget) == (r.world, r.budget)]
        sections.append((_heading(r), COLUMNS, [_texts(row) for row in rows_of(own_cells)]))
    return sections


def tables(cells: Sequence[Cell], references: Sequence[Reference]) -> list[Table]:
    """Tables for the terminal: one for each world and budget, then the summary."""
    rendered = []
    for title, columns, rows in reversed(_sections(cells, references)):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="left" if i in (0, len(columns) - 1) else "right", no_wrap=i + 1 < len(columns)
            )
        for row in rows:
            table.add_row(*row)
        rendered.append(table)
    return rendered


def markdown(cells: Sequence[Cell], references: Sequence[Reference]) -> str:
    """The same tables as Markdown, the summary first."""
    parts = [NOTE + "\n"]
    for title, columns, rows in _sections(cells, references):
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


def _range(cells: Sequence[Cell]) -> tuple[float, float]:
    """Limits of the axis of regret in points: they contain every mean, but not every interval."""
    means = [100 * row.regret_acc for group in _by(cells, lambda c: c.budget).values() for row in rows_of(group)]
    return min(-0.5, 1.5 * min(means)), max(2.0, 1.5 * max(means))


def draw(cells: Sequence[Cell], references: Sequence[Reference], path: Path) -> None:
    """Mean regret over the worlds against selection FLOPs: a panel for each budget, and one for all budgets."""
    import matplotlib.pyplot as plt

    budgets = sorted({r.budget for r in references})
    panels: list[tuple[str, list[float]]] = [(f"{b:g} passes", [b]) for b in budgets]
    if len(budgets) > 1:
        panels.append(("all budgets", budgets))
    methods = list(dict.fromkeys(c.method for c in cells))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 2, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, panel_budgets) in zip(grid[0], panels, strict=True):
        for i, method in enumerate(methods):
            group = [c for c in cells if c.method == method and c.budget in panel_budgets]
            if not group:
                continue
            regret, width = _mean_and_width([100 * x for x in _by_seed(group, "regret_acc")])
            axes.errorbar(
                _costs(group)[0],
                regret,
                yerr=np.nan_to_num(width),
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                markersize=9 if method.startswith(("cads", "search")) else 6,
                linestyle="none",
                capsize=2,
                label=method,
            )
        uniform = np.mean([100 * r.uniform_regret_acc for r in references if r.budget in panel_budgets])
        axes.axhline(uniform, color="#999999", linestyle="--", linewidth=1, label="uniform")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(-0.03, 2 * max(1.0, *(c.selection_over_C for c in cells)))
        axes.set_yscale("symlog", linthresh=2)
        axes.set_ylim(*_range(cells))
        axes.set_xlabel("selection FLOPs / C")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("regret (points of accuracy), mean over worlds")
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
