"""Ablations of `search` in worlds whose true regrets are known, in one table.

    python -m experiments.ablations --budgets 1,4,16,64 --seeds 3 --json runs/ablations.json \
        [--results experiments/results/ablations.md]

The table has parts. The first line of a part is its reference; each further line changes one option of the reference.
The reference is `search`, but for two kinds of parts: the direct estimator is the reference where its baseline and its
K are varied, the plain penalty where an exact l* (the training loss within reach of the budget) is tried.
The part `estimator` compares three whole selectors. They differ in more than the estimator, such as the search by
trials and the guard.

The cells are those of `experiments.oracle`, under the same --cache. A run that was stopped resumes; a run over
several worlds reads the cells that were run for each world.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from cads.accounting.budget import Budget
from cads.errors import CadsError, ConfigError
from cads.study.analysis.points import half_width
from experiments.oracle import Contender, Oracle, run
from experiments.oracle_report import LONG_FROM, Cell, Reference, Summary, summary_of
from experiments.truth import write_whole
from experiments.worlds import SHORT, read_world, shipped

BASE = Contender("search", "search")
PENALTY = Contender("cads-s-penalty", "cads-s-penalty")
DIRECT_OPTIONS = {"allowance": 2.75, "share": 1 / 8}
"""The direct estimator with the allowance of `search`, which does not pay for inner runs of the whole C."""
UNCAPPED = 20.0
"""An allowance that covers runs of the whole C, which the exact l* takes, and with which nothing is shortened."""
DIRECT = Contender("direct", "bilevel", DIRECT_OPTIONS)


@dataclass(frozen=True)
class Variant:
    """A line of the table; every line of a part is compared with the first.

    Attributes:
        part: the part of the table. value: what the line calls the option's value. who: the selector that is run.
    """

    part: str
    value: str
    who: Contender


def _cads(label: str, **options: object) -> Contender:
    return Contender(f"search, {label}", "search", options)


def _penalty(label: str, **options: object) -> Contender:
    return Contender(f"cads-s-penalty, {label}", "cads-s-penalty", options)


def _direct(label: str, **options: object) -> Contender:
    return Contender(f"direct, {label}", "bilevel", {**DIRECT_OPTIONS, **options})


VARIANTS = (
    Variant("estimator", "regression (`search`)", BASE),
    Variant("estimator", "plain penalty", PENALTY),
    Variant("estimator", "direct, runs of C/8", DIRECT),
    Variant("baseline of direct", "leave-one-out", DIRECT),
    Variant("baseline of direct", "none", _direct("no baseline", baseline="none")),
    Variant("K of direct", "5", DIRECT),
    Variant("K of direct", "2", _direct("K = 2", draws=2)),
    Variant("K of direct", "10", _direct("K = 10", draws=10)),
    Variant("alpha", "c1 and c2 fitted", BASE),
    Variant("alpha", "0, no penalty", _cads("alpha = 0", alpha=0.0)),
    Variant("alpha", "0.1", _cads("alpha = 0.1", alpha=0.1)),
    Variant("alpha", "1", _cads("alpha = 1", alpha=1.0)),
    Variant("policy gradient", "on", BASE),
    Variant("policy gradient", "off, policy held at 1/2", _cads("policy held at 1/2", policy_steps=0)),
    Variant("l*", "fitted", BASE),
    Variant("l*", "extrapolated", _cads("l* extrapolated", reach="extrapolated")),
    Variant("l* of the plain penalty", "extrapolated", _penalty("l* extrapolated", allowance=UNCAPPED)),
    Variant("l* of the plain penalty", "fitted", _penalty("l* fitted", allowance=UNCAPPED, reach="fitted")),
    Variant("l* of the plain penalty", "exact", _penalty("l* exact", allowance=UNCAPPED, reach="exact")),
    Variant("alpha of the plain penalty", "0.1", PENALTY),
    Variant("alpha of the plain penalty", "from 1 to 0.1", _penalty("alpha from 1", first_alpha=1.0)),
    Variant("policy of the plain penalty", "Bernoulli", PENALTY),
    Variant("policy of the plain penalty", "mixture", _penalty("mixture", policy="mixture")),
    Variant("policy", "Bernoulli", BASE),
    Variant("policy", "mixture", _cads("mixture", policy="mixture")),
    Variant("guard", "on", BASE),
    Variant("guard", "off", _cads("no guard", guard=False)),
    Variant("outer", "tempered loss (default)", BASE),
    Variant("outer", "calibrated loss", _cads("outer calibrated loss", outer="calibrated_loss")),
    Variant("outer", "loss", _cads("outer loss", outer="loss")),
    Variant("outer", "error", _cads("outer error", outer="error")),
)
PARTS = tuple(dict.fromkeys(v.part for v in VARIANTS))
OUTER = "outer"

NOTE = (
    "Regret in points of test accuracy and in nats of calibrated test loss, and selection FLOPs in units of C, as "
    "`experiments.oracle` defines them: means over worlds, budgets and seeds, ± half a 95% t-interval over seeds. The "
    "difference is to the first line of the part, seed by seed. Within a part one option changes, but for `estimator`: "
    "there whole selectors are compared, which differ in their search, guard and cost too. The direct estimator may "
    "spend what `search` may, on runs of C/8; the mean is no line among its baselines, since it gives (K - 1)/K times "
    "the gradient with leave-one-out, and Adam does not see a factor. The plain penalty has no allowance: it spends "
    "what its rounds and runs take. A held alpha is the weight of R and of l* in the regression where the budget "
    "buys R, and 0 elsewhere; the regression on the sources remains in all lines."
)
COLUMNS = (
    "part",
    "variant",
    "regret, points",
    "difference",
    f"from {LONG_FROM} passes on",
    "regret, nats",
    "selection / C",
    "seconds",
    "cells > 0.5 points worse than uniform",
)


def contenders(parts: Sequence[str]) -> list[Contender]:
    """The contenders of these parts, each once.

    Raises:
        ConfigError: if there is no such part.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"--parts {unknown}: choose from {list(PARTS)}")
    return list({v.who.label: v.who for v in VARIANTS if v.part in parts}.values())


def difference(cells: Sequence[Cell], label: str, base: str) -> tuple[float, float]:
    """Regret in accuracy of the contender `label` less that of the contender `base` on the same cells.

    Returns:
        the mean, and half its interval over seeds.
    """
    regrets = {(c.world, c.budget, c.seed, c.method): c.regret_acc for c in cells}
    by_seed: dict[int, list[float]] = {}
    for (world, budget, seed, method), value in regrets.items():
        if method == label:
            by_seed.setdefault(seed, []).append(value - regrets[world, budget, seed, base])
    means = [float(np.mean(values)) for values in by_seed.values()]
    return float(np.mean(means)), half_width(means)


def _points(mean: float, width: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if np.isnan(width) else f" ± {100 * width:.2f}")


def _row(variant: Variant, summary: Summary, cells: Sequence[Cell]) -> list[str]:
    n_settings = len({(c.world, c.budget) for c in summary.cells})
    base = next(v.who.label for v in VARIANTS if v.part == variant.part)
    is_reference = variant.who.label == base
    return [
        variant.part,
        variant.value,
        _points(summary.regret_acc, summary.width_acc),
        "" if is_reference else _points(*difference(cells, variant.who.label, base), sign="+"),
        "-" if np.isnan(summary.long_acc) else _points(summary.long_acc, summary.long_width),
        f"{summary.regret_val:.3f}",
        f"{summary.selection:.2f}",
        f"{summary.seconds:.1f}",
        f"{len(summary.worse)} of {n_settings}",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(cells: Sequence[Cell], references: Sequence[Reference], parts: Sequence[str]) -> str:
    """The table of all parts, and the regret of each outer objective by world."""
    summaries = {summary.method: summary for summary in summary_of(cells, references)}
    rows = [_row(v, summaries[v.who.label], cells) for v in VARIANTS if v.part in parts]
    worlds = list(dict.fromkeys(r.world for r in references))
    budgets = list(dict.fromkeys(r.budget for r in references))
    seeds = len({c.seed for c in cells})
    settings = f"Worlds: {', '.join(worlds)}; passes: {', '.join(f'{b:g}' for b in budgets)}; {seeds} seeds."
    text = f"{NOTE}\n\n{settings}\n\n{_table(COLUMNS, rows)}"
    if OUTER in parts:
        title = "The outer objective of `search`, world by world, regret in points; `*`: the lowest in the world"
        text += f"\n{title}:\n\n{_table((OUTER, *worlds), outer_by_world(cells, worlds))}"
    return text


def outer_by_world(cells: Sequence[Cell], worlds: Sequence[str]) -> list[list[str]]:
    """One row for each outer objective: its name, then its mean regret in each world in points; `*`: the lowest."""
    variants = [v for v in VARIANTS if v.part == OUTER]
    columns = []
    for world in worlds:
        regrets = [[c.regret_acc for c in cells if (c.method, c.world) == (v.who.label, world)] for v in variants]
        texts = [f"{100 * np.mean(values):.2f}" for values in regrets]
        lowest = min(texts, key=float)
        columns.append([f"{text} *" if text == lowest else text for text in texts])
    return [[v.value, *row] for v, row in zip(variants, zip(*columns, strict=True), strict=True)]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, action="append", help="YAML file of a world; repeat for more")
    parser.add_argument("--budgets", default="1,4,16,64", help="passes over the pool, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts of the table, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="number of seeds of the truth")
    parser.add_argument("--json", type=Path, required=True, help="JSON file for everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables here")
    parser.add_argument("--cache", type=Path, default=Path("runs/oracle"), help="folder where cells are kept")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder where the truth is kept")
    parser.add_argument(
        "--fresh", action="append", default=[], help="label of a contender whose kept cells are run again"
    )
    args = parser.parse_args(argv)
    args.world = args.world or shipped(SHORT)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablations."""
    args = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        parts = [part.strip() for part in args.parts.split(",")]
        selectors = contenders(parts)
        budgets = [Budget.parse(f"{b.strip()} epochs").amount for b in args.budgets.split(",")]
        if args.seeds < 1:
            raise ConfigError(f"--seeds {args.seeds}: at least one is needed")
        worlds = [read_world(path) for path in args.world]
        oracle = Oracle(args.cache, args.truth, args.truth_seeds, bound_seconds=600.0, fresh=args.fresh)
        cells, references = run(worlds, budgets, selectors, args.seeds, oracle, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    command = f"python -m experiments.ablations {shlex.join(sys.argv[1:] if argv is None else argv)}"
    text = markdown(cells, references, parts)
    record = {
        "command": command,
        "variants": [asdict(v) for v in VARIANTS if v.part in parts],
        "cells": [asdict(c) for c in cells],
        "truth": [asdict(r) for r in references],
    }
    write_whole(args.json, record)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(f"# What each part of `search` is for\n\n    {command}\n\n{text}")
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
