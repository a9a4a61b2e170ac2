"""Tables and figure of `experiments.online`, computed from its cells alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from cads.errors import ConfigError
from cads.runtime.atomic_files import whole_file
from cads.study.analysis.points import half_width

mpl.use("Agg")

ONLINE, HIDDEN = "cads", "cads, sources hidden"
UNGROUPED = f"{HIDDEN}, no groups"
ABLATIONS = (
    "cads, no weights of examples",
    "cads, no target first",
    "cads, no weights of sources",
    "cads, nothing moves after the probe",
)
BY_SIZE = "joint by size, balanced"
SINGLE = "only "
"""How the names of single sources begin."""
FREE = (
    "full",
    "joint .3",
    "joint .5",
    "target-only",
    "random half",
    "full, balanced",
    "joint .3, balanced",
    "joint .5, balanced",
    "target-only, balanced",
)
"""References that cost nothing and need no knowledge."""
NEEDED = tuple(method for method in FREE if method.endswith("balanced"))
"""Without these a cell is not reported: each was better than itself without balanced draws, on average over worlds."""
SHOWN = (ONLINE, HIDDEN, UNGROUPED, *FREE, "random half, balanced", BY_SIZE, "cut 60%", "cut 80%")
"""Methods of the first table, in its order."""

CHOSEN = (
    "Nothing here is held out. The sharpness of the tilt, and how fast visits lose their worth, were chosen among four "
    "pairs on two seeds of the six worlds, after a look at compare-vision at 10 passes; "
    "the shares of classes on noise and complementary, "
    "the length of the first phase on complementary, domains and many. "
    "That the target alone is trained on where three quarters of the budget do not teach it "
    "was decided when all six worlds had been seen. "
    "The groups that stand in for hidden sources were chosen on domains and noise."
)
"""On which worlds the constants of `cads` were chosen."""

Place = tuple[str, int, float]
"""World, size of the target, and budget in passes over the pool."""


@dataclass
class Cells:
    """All measured cells.

    Attributes:
        accuracy: points, by place, method and seed.
        cost: share of the budget that is no training step, by place, method and seed.
    """

    accuracy: dict[Place, dict[str, dict[int, float]]]
    cost: dict[Place, dict[str, dict[int, float]]]

    @classmethod
    def read(cls, path: Path) -> Cells:
        """The cells in a file of JSON lines."""
        accuracy: dict[Place, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        cost: dict[Place, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in map(json.loads, path.read_text().splitlines()):
            world, n_target, passes, seed, method = row["key"]
            if "accuracy" in row:
                accuracy[world, n_target, passes][method][seed] = 100 * row["accuracy"]
                cost[world, n_target, passes][method][seed] = row["select"] / row["budget"]
        return cls(accuracy, cost)

    def complete(self) -> list[Place]:
        """Places at which `cads` has two seeds or more, and the references that are needed have as many."""
        places = []
        for place, by_method in self.accuracy.items():
            seeds = len(by_method.get(ONLINE, {}))
            if seeds > 1 and all(len(by_method.get(m, {})) >= seeds for m in NEEDED):
                places.append(place)
        return sorted(places, key=lambda p: (p[2], -p[1], p[0]))

    def best(self, place: Place, *, hidden: bool = False) -> str:
        """The reference of the highest mean accuracy, known only afterwards; no single source if they are hidden."""
        references = filter(is_reference, self.accuracy[place])
        return max((m for m in references if not (hidden and m.startswith(SINGLE))), key=lambda m: self._mean(place, m))

    def difference(self, place: Place, method: str, other: str) -> tuple[float, float]:
        """Mean paired difference in points, and half a 95 % t-interval, over the seeds that both have."""
        one, two = self.accuracy[place].get(method, {}), self.accuracy[place][other]
        values = np.array([one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())])
        if not len(values):
            return float("nan"), float("nan")
        return float(values.mean()), float(half_width(values)) if len(values) > 1 else float("nan")

    def blind(self, place: Place, method: str) -> float:
        """Mean difference, in points, from the reference that is the best by the other seeds; NaN for fewer than 2."""
        values, differences = self.accuracy[place].get(method, {}), []
        for seed, value in values.items():
            means = {
                reference: np.mean([x for other, x in by_seed.items() if other != seed])
                for reference, by_seed in self.accuracy[place].items()
                if is_reference(reference) and seed in by_seed and len(by_seed) > 1
            }
            if means:
                differences.append(value - self.accuracy[place][max(means, key=lambda m: means[m])][seed])
        return float(np.mean(differences)) if differences else float("nan")

    def references(self, places: Sequence[Place]) -> str:
        """The references that were run, in words."""
        run = {method for place in places for method in self.accuracy[place] if is_reference(method)}
        singles = ["all single sources"] if any(method.startswith(SINGLE) for method in run) else []
        return "; ".join([*(method for method in SHOWN if method in run), *singles])

    def _mean(self, place: Place, method: str) -> float:
        values = self.accuracy[place][method]
        shared = values.keys() & self.accuracy[place][ONLINE].keys()
        return float(np.mean([values[seed] for seed in shared])) if shared else -np.inf


def is_reference(method: str) -> bool:
    """Whether `cads` is held against the method."""
    return not method.startswith("cads") and method != BY_SIZE


def write_report(cells: Path, results: Path, command: str) -> None:
    """Write the tables to `results`, with the command that does so, and beside it the figure and the cells.

    Raises:
        ConfigError: if no cell is complete.
    """
    read = Cells.read(cells)
    places = read.complete()
    if not places:
        raise ConfigError(f"{cells} has no cell with two seeds of `cads` and of all free references: run more of them")
    parts = [_head(read, places, command), _means(read, places), _places(read, places), _ablations(read, places)]
    whole_file(results, "\n\n".join(filter(None, parts)) + "\n")
    whole_file(results.with_suffix(".jsonl"), cells.read_text("utf-8"))
    draw(read, places, results.with_suffix(".png"))


def _head(cells: Cells, places: Sequence[Place], command: str) -> str:
    counts = [len(cells.accuracy[p][ONLINE]) for p in places]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(max(counts))
    worse = [p for p in places if _is_worse(cells, p)]
    named = "; ".join(f"{p[0]}, {p[1]} targets, {p[2]:g} passes" for p in worse) or "none"
    return (
        f"# CADS as it trains: {len(places)} cells, {seeds} seeds\n\n"
        f"    {command.split(' --results', maxsplit=1)[0]}\n    {command}\n\n"
        "Points of test accuracy. The budget covers selection and training, in passes over the pool. A seed is one of "
        "the data and of the training; differences are paired. The best reference of a cell is known only afterwards. "
        f"It is one of: {cells.references(places)}. `balanced`: with classes in even turns; `cut`: what remains of the "
        "pool by a model that is trained on the target.\n\n"
        f"{CHOSEN}\n\n"
        f"Cells in which `cads` is below the best reference by more than a point, with an interval clear of 0: {named}."
    )


def _is_worse(cells: Cells, place: Place) -> bool:
    mean, half = cells.difference(place, ONLINE, cells.best(place))
    return mean < -1 and mean + half < 0


def _means(cells: Cells, places: Sequence[Place]) -> str:
    columns = sorted({(p[1], p[2]) for p in places}, key=lambda c: (-c[0], c[1]))
    lines = ["## Less the best reference of each cell, mean over worlds", ""]
    lines += [_row(["method", *(f"{n}: {passes:g}" for n, passes in columns)]), _row(["---"] * (len(columns) + 1))]
    for method in SHOWN:
        values = [_mean_difference(cells, [p for p in places if p[1:] == column], method) for column in columns]
        if set(values) == {"-"}:
            continue
        lines.append(_row([f"**{method}**" if method == ONLINE else method, *values]))
    no_sources = []
    for column in columns:
        there = [p for p in places if p[1:] == column]
        differences = [cells.difference(p, HIDDEN, cells.best(p, hidden=True))[0] for p in there]
        known = [d for d in differences if np.isfinite(d)]
        no_sources.append(f"{np.mean(known):+.2f}" if known else "-")
    lines.append(_row([f"{HIDDEN}, less the best that needs no sources", *no_sources]))
    for method in (ONLINE, HIDDEN):
        blind = [_mean_blind(cells, [p for p in places if p[1:] == column], method) for column in columns]
        lines.append(_row([f"{method}, less the best by the other seeds", *blind]))
    cost = [_mean_cost(cells, [p for p in places if p[1:] == column]) for column in columns]
    lines.append(_row(["cost of `cads` beside training, % of the budget", *cost]))
    lines += [
        "",
        "Columns: size of the target, and passes. Where a cut is not affordable, its cell is left out. The best of "
        "many references is the best by luck too: so `cads` also stands against the one that has the highest mean in "
        "all seeds but the one that is compared.",
    ]
    return "\n".join(lines)


def _mean_difference(cells: Cells, places: Sequence[Place], method: str) -> str:
    values = [cells.difference(p, method, cells.best(p))[0] for p in places]
    finite = [v for v in values if np.isfinite(v)]
    return f"{np.mean(finite):+.2f}" if finite else "-"


def _mean_blind(cells: Cells, places: Sequence[Place], method: str) -> str:
    finite = [v for v in (cells.blind(p, method) for p in places) if np.isfinite(v)]
    return f"{np.mean(finite):+.2f}" if finite else "-"


def _mean_cost(cells: Cells, places: Sequence[Place]) -> str:
    return f"{100 * np.mean([x for p in places for x in cells.cost[p][ONLINE].values()]):.2f}"


def _places(cells: Cells, places: Sequence[Place]) -> str:
    lines = [
        "## Every cell",
        "",
        _row(["world", "targets", "passes", "cads", "best reference", "cads less it", "hidden less it"]),
    ]
    lines.append(_row(["---"] * 7))
    for place in places:
        best = cells.best(place)
        mean = np.mean(list(cells.accuracy[place][ONLINE].values()))
        row = [place[0], str(place[1]), f"{place[2]:g}", f"{mean:.2f}", best]
        lines.append(_row([*row, *(_with_interval(cells.difference(place, m, best)) for m in (ONLINE, HIDDEN))]))
    return "\n".join(lines)


def _ablations(cells: Cells, places: Sequence[Place]) -> str:
    columns = sorted({(p[1], p[2]) for p in places}, key=lambda c: (-c[0], c[1]))
    lines = ["## What each part earns: less `cads`, mean over worlds", ""]
    lines += [_row(["without", *(f"{n}: {passes:g}" for n, passes in columns)]), _row(["---"] * (len(columns) + 1))]
    if not any(method in cells.accuracy[p] for method in ABLATIONS for p in places):
        return ""
    for method in ABLATIONS:
        row = []
        for column in columns:
            values = [cells.difference(p, method, ONLINE)[0] for p in places if p[1:] == column]
            finite = [v for v in values if np.isfinite(v)]
            row.append(f"{np.mean(finite):+.2f}" if finite else "-")
        lines.append(_row([method.removeprefix("cads, "), *row]))
    return "\n".join(lines)


def draw(cells: Cells, places: Sequence[Place], path: Path) -> None:
    """Accuracy against budget: a panel for each world and size of the target, free references as a grey band."""
    from matplotlib.figure import Figure

    worlds = sorted({p[0] for p in places})
    rows = max(len({p[1] for p in places if p[0] == world}) for world in worlds)
    figure = Figure(figsize=(3.2 * len(worlds), 2.8 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, len(worlds), squeeze=False)
    for column, world in enumerate(worlds):
        sizes = sorted({p[1] for p in places if p[0] == world}, reverse=True)
        for row in range(rows):
            ax = axes[row][column]
            if row >= len(sizes):
                ax.set_axis_off()
                continue
            row_places = [p for p in places if p[:2] == (world, sizes[row])]
            _panel(ax, cells, row_places)
            ax.set_title(f"{world}, {sizes[row]} targets", fontsize=9)
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.supxlabel("budget, passes over the pool", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(ax: Any, cells: Cells, places: Sequence[Place]) -> None:
    passes = [p[2] for p in places]
    run = [m for m in FREE if all(m in cells.accuracy[p] for p in places)]
    free = np.array([[cells._mean(p, m) for m in run] for p in places])
    ax.fill_between(passes, free.min(axis=1), free.max(axis=1), color="0.85", label="free references")
    for method, colour, style in ((ONLINE, "#D55E00", "o-"), (HIDDEN, "#0072B2", "s--")):
        values = [np.mean(list(cells.accuracy[p].get(method, {0: np.nan}).values())) for p in places]
        ax.plot(passes, values, style, color=colour, markersize=3.5, linewidth=1.3, label=method)
    ax.set_xscale("log", base=2)
    ax.set_xticks(passes, [f"{x:g}" for x in passes], fontsize=7)
    ax.tick_params(axis="y", labelsize=7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _with_interval(difference: tuple[float, float]) -> str:
    return "-" if not np.isfinite(difference[0]) else f"{difference[0]:+.2f} ± {difference[1]:.2f}"


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
