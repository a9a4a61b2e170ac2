"""The page of `experiments.leaderboard`, computed from its cells alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cads.runtime.atomic_files import whole_file
from experiments.online_report import CHOSEN, ONLINE, Cells, Place, _row

PACKAGES = "packages.json"
OWN = {
    "log-linear": "ours, from the paper",
    "mixmin": "ours, from the paper",
    "aligned batches": "ours, after OPUS",
    "adapt": "ours, after ADAPT",
    "blade": "ours, after BLADE",
}
"""Rivals that are written from papers."""
FREE = ("datacull, RCAP",)
"""Rivals that choose by what training computes anyway, in every run."""


def write_leaderboard(out: Path, results: Path, methods: Sequence[str]) -> None:
    """Write the page of the cells in `out` to `results`, and the cells beside it.

    Args:
        methods: names of all methods, in the order of the tables.
    """
    path = out / "cells.jsonl"
    runs = common(path)
    cells = complete(Cells.read(path), runs)
    versions = json.loads((out / PACKAGES).read_text())
    measured = [m for m in methods if any(m in by_method for by_method in cells.accuracy.values())]
    parts = [
        _head(cells, [m for m in methods if m not in measured]),
        _regrets(cells, measured, versions | OWN, seconds_of(path)),
        _worlds(cells, measured),
        _unaffordable(path, runs),
    ]
    whole_file(results, "\n\n".join(part for part in parts if part) + "\n")
    whole_file(results.with_suffix(".jsonl"), path.read_text())


def common(path: Path) -> dict[Place, set[int]]:
    """The seeds that all methods have at each place, those that the budget did not buy included; none is empty."""
    runs: dict[Place, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in map(json.loads, path.read_text().splitlines()):
        world, n_target, passes, seed, method = row["key"]
        runs[world, n_target, passes][method].add(seed)
    names = {method for by_method in runs.values() for method in by_method}
    seeds = {place: set.intersection(*(by_method[name] for name in names)) for place, by_method in runs.items()}
    return {place: those for place, those in seeds.items() if those}


def complete(cells: Cells, runs: Mapping[Place, set[int]]) -> Cells:
    """The cells of these places and seeds."""

    def those(values: Mapping[Place, Mapping[str, Mapping[int, float]]]) -> dict[Place, dict[str, dict[int, float]]]:
        return {
            place: {name: {s: x for s, x in by_seed.items() if s in seeds} for name, by_seed in values[place].items()}
            for place, seeds in runs.items()
        }

    return Cells(those(cells.accuracy), those(cells.cost))


def best(cells: Cells, place: Place) -> str:
    """The method of the highest mean accuracy at a place: known only afterwards."""
    means = {name: float(np.mean(list(by_seed.values()))) for name, by_seed in cells.accuracy[place].items() if by_seed}
    return max(means, key=lambda name: means[name])


def regret(cells: Cells, place: Place, method: str) -> float:
    """Points of accuracy below the best of the place, over the seeds that both have; NaN without any."""
    return -cells.difference(place, method, best(cells, place))[0]


def seconds_of(path: Path) -> dict[str, list[float]]:
    """Seconds of every finished cell, by method."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in map(json.loads, path.read_text().splitlines()):
        if "seconds" in row:
            seconds[row["key"][4]].append(row["seconds"])
    return seconds


def _head(cells: Cells, missing: Sequence[str]) -> str:
    places = cells.accuracy
    seeds = sorted({len(by_method[ONLINE]) for by_method in places.values()})
    worlds = sorted({place[0] for place in places})
    named = f" Without a result here: {', '.join(missing)}." if missing else ""
    return (
        f"# Leaderboard: {len(places)} cells, {' to '.join(map(str, sorted({seeds[0], seeds[-1]})))} seeds\n\n"
        f"A cell is a world ({', '.join(worlds)}), a size of the target and a budget. "
        f"Only seeds that all methods have are counted.{named}\n\n"
        "    pip install 'cads-select[rivals]'\n"
        "    python -m experiments.leaderboard --out runs/leaderboard\n"
        "    python -m experiments.leaderboard --out runs/leaderboard --results experiments/results/leaderboard.md\n\n"
        "The budget covers selection and training, in passes over the pool. Every pass of a model over the pool, the "
        "target or a part of them is paid from it; so are similarities. Other arithmetic of the packages, such as that "
        "of Gaussian processes or of the curvature, is in the seconds alone. These are of one thread on a machine that "
        "did other work too, and a few runs hold an import. "
        "Regret is how many points of test accuracy a method is below the best of its cell, which is known only "
        "afterwards. The final training of every rival draws 30 % of each batch from the target, and takes classes in "
        "even turns unless it weighs the sources. Where the share that selection may take buys no scores or trials, a "
        "rival returns the full pool, and is then the same as `joint .3, balanced`. "
        '"Selects in": in how many of its runs it did select.\n\n'
        f"{CHOSEN} Of the rivals one number was tuned: the passes of bergson's model over the target, of which 4 "
        "are better on average than 16. optuna, botorch, log-linear and mixmin may spend "
        "what the searches of this package may, the others up to a third of the budget, and the rules that choose "
        "while the final model trains (aligned batches, adapt, blade, datacull's RCAP) what they need for it. "
        "adapt and blade are written from summaries of their papers: their modules in `experiments/rivals` say what is "
        "theirs and what is ours."
    )


def _regrets(cells: Cells, methods: Sequence[str], packages: dict[str, str], seconds: dict[str, list[float]]) -> str:
    columns = sorted({place[1:] for place in cells.accuracy}, key=lambda c: (-c[0], c[1]))
    names = [f"{n}: {passes:g} ({_size(cells, (n, passes))})" for n, passes in columns]
    header = ["method", "package", *names, "mean", "selects in", "selection, % of the budget", "seconds"]
    lines = ["## Mean regret, points", "", _row(header), _row(["---"] * len(header))]
    rows = []
    for method in methods:
        regrets = [regret(cells, p, method) for p in cells.accuracy]
        values = [_mean([regret(cells, p, method) for p in cells.accuracy if p[1:] == column]) for column in columns]
        share = [x for by_method in cells.cost.values() for x in by_method.get(method, {}).values()]
        name = f"**{method}**" if method == ONLINE else method
        chose = np.array(share) > 0 if method not in FREE else np.ones(1)
        selects = f"{100 * np.mean(chose):.0f} %" if method in packages else "-"
        end = [_mean(regrets), selects, f"{100 * np.mean(share):.1f}", f"{np.mean(seconds[method]):.1f}"]
        rows.append((float(np.nanmean(regrets)), _row([name, packages.get(method, "-"), *values, *end])))
    lines += [row for _, row in sorted(rows)]
    lines += [
        "",
        "Columns: size of the target, and passes; in brackets the number of worlds, and of seeds. A method that a "
        "budget did not buy in a cell is left out of the means there.",
    ]
    return "\n".join(lines)


def _size(cells: Cells, column: tuple[int, float]) -> str:
    """The worlds and seeds of a column."""
    places = [place for place in cells.accuracy if place[1:] == column]
    seeds = sorted({len(cells.accuracy[place][ONLINE]) for place in places})
    return f"{len(places)} × {'-'.join(map(str, seeds))}"


def _worlds(cells: Cells, methods: Sequence[str]) -> str:
    worlds = sorted({place[0] for place in cells.accuracy})
    lines = ["## By world, mean over targets and budgets", "", _row(["method", *worlds])]
    lines.append(_row(["---"] * (len(worlds) + 1)))
    for method in methods:
        means = [_mean([regret(cells, p, method) for p in cells.accuracy if p[0] == world]) for world in worlds]
        lines.append(_row([f"**{method}**" if method == ONLINE else method, *means]))
    return "\n".join(lines)


def _unaffordable(path: Path, runs: Mapping[Place, set[int]]) -> str:
    """How many of these runs of each method its budget did not buy."""
    counts: dict[str, int] = defaultdict(int)
    for row in map(json.loads, path.read_text().splitlines()):
        world, n_target, passes, seed, method = row["key"]
        counts[method] += "error" in row and seed in runs.get((world, n_target, passes), ())
    named = "; ".join(f"{name}: {count}" for name, count in counts.items() if count)
    return f"Runs that the budget did not buy, and which no mean holds: {named}." if named else ""


def _mean(values: Sequence[float]) -> str:
    finite = [v for v in values if np.isfinite(v)]
    return f"{np.mean(finite):.2f}" if finite else "-"
