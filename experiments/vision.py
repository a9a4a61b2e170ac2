"""A grid of methods, budgets and seeds on an image task: select, train, test, tabulate and draw.

    python -m experiments.vision experiments/configs/fashion-mnist-noise.yaml [--out DIR] [--results FILE.md]

Finished cells are kept in the run directory, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from scipy import stats

from cads.budget import SELECT, TRAIN, Budget, Ledger
from cads.errors import CadsError, ConfigError
from cads.monitor import Monitor
from cads.outcome import train_on
from cads.registry import build_selector
from cads.task import Task
from cads.tasks.vision import VisionConfig
from cads.trainer import TrainConfig

mpl.use("Agg")

CONFIDENCE = 0.95
SHOWN_POINTS = 25
"""Points of accuracy below the best that the figure shows; what lies lower is in the table."""
NOTE = (
    "FLOPs of selection and of training; * marks the best of each budget. The budget is that of the training, and "
    "selection comes on top; for methods marked 'all in' it covers both."
)


@dataclass
class Entry:
    """One row of the grid: a method, its options, and whether the budget covers its selection too."""

    method: str
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    count_selection: bool = False

    @property
    def name(self) -> str:
        """How the row is called in tables and figures."""
        return self.label or (f"{self.method}, all in" if self.count_selection else self.method)


@dataclass
class Grid:
    """What is run: every method at every budget with every seed."""

    methods: list[Entry]
    budgets: list[str]
    seeds: int = 3
    task: VisionConfig = field(default_factory=VisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Cell:
    """What came out of one method at one budget with one seed."""

    method: str
    budget: str
    seed: int
    accuracy: float
    selection_flops: float
    training_flops: float
    selected: float
    seconds: float
    sources: dict[str, float]
    notes: dict[str, Any]


def read_grid(path: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        ConfigError: if it cannot be read, or a key, value, method or option is unknown.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("methods"), list):
        raise ConfigError(f"{path} must map names to values, `methods` to a list of methods among them")
    given["methods"] = [{"method": m} if isinstance(m, str) else m for m in given["methods"]]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Grid, None)
    try:
        grid = Grid(**vars(parser.instantiate(parser.parse_object(given))))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    for entry in grid.methods:
        build_selector(entry.method, entry.options)
    return grid


def run_cell(grid: Grid, task: Task, entry: Entry, budget: str, seed: int, out: Path, console: Console) -> Cell:
    """Select, train and test once; leaves the Selection and TensorBoard's files in `out`."""
    started = time.perf_counter()
    allowed = Budget.parse(budget, count_selection=entry.count_selection)
    ledger = Ledger()
    selector = build_selector(entry.method, entry.options)
    bar = console if sys.stderr.isatty() else None
    with Monitor(out / "tensorboard", bar) as monitor, monitor.named(f"{entry.name}, {budget}, seed {seed}:"):
        selection = selector.select(task, allowed, seed=seed, ledger=ledger, monitor=monitor)
        outcome = train_on(task, selection, allowed, seed=seed, monitor=monitor)
        total = outcome.ledger.total(SELECT).flops + outcome.ledger.total(TRAIN).flops
        monitor.hparams(
            {"method": entry.name, "budget": budget, "seed": seed},
            {"accuracy": outcome.metrics["accuracy"], "total_flops": total},
        )
    selection.save(out / "selection")
    return Cell(
        method=entry.name,
        budget=budget,
        seed=seed,
        accuracy=outcome.metrics["accuracy"],
        selection_flops=outcome.ledger.total(SELECT).flops,
        training_flops=outcome.ledger.total(TRAIN).flops,
        selected=float(selection.selected.mean()),
        seconds=time.perf_counter() - started,
        sources=selection.source_probability,
        notes=selection.notes,
    )


def run_grid(grid: Grid, out: Path, console: Console) -> list[Cell]:
    """All cells, seed by seed; those already in `out` are read, not run."""
    cells = []
    for seed in range(grid.seeds):
        task: Task | None = None
        for budget in grid.budgets:
            for entry in grid.methods:
                place = out / "cells" / f"{_key(grid, entry, budget)}-{seed}"
                record = place / "cell.json"
                if not record.exists():
                    if task is None:
                        task = VisionConfig(**{**vars(grid.task), "data_seed": seed}).build(grid.train)
                        task.check()
                    cell = run_cell(grid, task, entry, budget, seed, place, console)
                    partial = place / ".cell.json"
                    partial.write_text(json.dumps(asdict(cell), indent=2) + "\n")
                    os.replace(partial, record)
                    console.print(
                        f"seed {seed}, {budget}: {entry.name:12s} {100 * cell.accuracy:6.2f} % in {cell.seconds:.1f} s",
                        highlight=False,
                    )
                cells.append(Cell(**json.loads(record.read_text())))
    return cells


def _key(grid: Grid, entry: Entry, budget: str) -> str:
    """What a cell's result depends on, besides the seed."""
    settings = [asdict(entry), budget, asdict(grid.task), asdict(grid.train)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{entry.name}-{budget}-{digest[:8]}".replace(" ", "-").replace("%", "").replace("/", "-")


@dataclass
class Row:
    """One method at one budget: means over seeds, and the half width of the accuracy's interval."""

    method: str
    budget: str
    selection_flops: float
    training_flops: float
    accuracy: float
    half_width: float
    selected: float


def summarise(cells: Iterable[Cell]) -> list[Row]:
    """Means over seeds, with t-intervals."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.budget, cell.method].append(cell)
    rows = []
    for (budget, method), group in groups.items():
        accuracy = np.array([c.accuracy for c in group])
        n = len(accuracy)
        width = np.nan
        if n > 1:
            width = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * accuracy.std(ddof=1) / np.sqrt(n))
        rows.append(
            Row(
                method,
                budget,
                float(np.mean([c.selection_flops for c in group])),
                float(np.mean([c.training_flops for c in group])),
                float(accuracy.mean()),
                width,
                float(np.mean([c.selected for c in group])),
            )
        )
    return rows


COLUMNS = ("budget", "method", "selection", "training", "accuracy, %", "selected")


def _texts(row: Row, best: float) -> list[str]:
    return [
        row.budget,
        row.method,
        f"{row.selection_flops:.3g}",
        f"{row.training_flops:.3g}",
        f"{'*' if row.accuracy == best else ''}{100 * row.accuracy:.2f} ± {100 * row.half_width:.2f}",
        f"{row.selected:.0%}",
    ]


def _best(rows: list[Row]) -> dict[str, float]:
    best: dict[str, float] = {}
    for row in rows:
        best[row.budget] = max(best.get(row.budget, 0.0), row.accuracy)
    return best


def terminal_table(rows: list[Row], title: str) -> Table:
    """The summary for the terminal, a section a budget; the best accuracy is marked."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    best = _best(rows)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].budget != row.budget
        table.add_row(*_texts(row, best[row.budget]), end_section=last)
    return table


def markdown_table(rows: list[Row]) -> str:
    """The same as Markdown."""
    best = _best(rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(_texts(row, best[row.budget]) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Accuracy against total FLOPs, selection included, one line a method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    methods = list(dict.fromkeys(row.method for row in rows))
    for i, method in enumerate(methods):
        line = [row for row in rows if row.method == method]
        ours = method.startswith("cads")
        axes.errorbar(
            [row.selection_flops + row.training_flops for row in line],
            [100 * row.accuracy for row in line],
            yerr=[100 * row.half_width for row in line],
            marker="o" if ours else "s",
            linewidth=2.2 if ours else 1.2,
            linestyle="-" if ours else "--",
            capsize=2,
            color=colours(i % 20),
            label=method,
        )
    axes.set_xscale("log")
    best = 100 * max(row.accuracy for row in rows)
    lowest = min(100 * (row.accuracy - np.nan_to_num(row.half_width)) for row in rows)
    axes.set_ylim(max(lowest - 1, best - SHOWN_POINTS), best + 2)
    axes.set_xlabel("total FLOPs (selection and training)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the grid of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="run directory (default: runs/NAME of the config)")
    parser.add_argument("--results", type=Path, help="also write table and figure here, as NAME.md and NAME.png")
    given = parser.parse_args(argv)
    out = given.out or Path("runs") / given.config.stem
    console = Console()
    started = time.perf_counter()
    try:
        grid = read_grid(given.config)
        cells = run_grid(grid, out, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    rows = summarise(cells)
    title = f"{given.config.stem}: {grid.seeds} seeds, {CONFIDENCE:.0%} t-intervals"
    console.print(terminal_table(rows, title))
    console.print(NOTE, soft_wrap=True)
    figure = out / "accuracy.png"
    draw(rows, figure, title)
    (out / "cells.json").write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, given.results.with_suffix(".png"), title)
        command = f"python -m experiments.vision {given.config} --results {given.results}"
        given.results.write_text(f"# {title}\n\n    {command}\n\n{NOTE}\n\n{markdown_table(rows)}")
    console.print(f"figure       {figure}")
    console.print(f"selections   {out}/cells/*/selection")
    console.print(f"TensorBoard  tensorboard --logdir {out}/cells", soft_wrap=True)
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
