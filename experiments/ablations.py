"""What each part of CADS-S is for: one part at a time replaced, in worlds whose truth is known; one table.

    python -m experiments.ablations --budgets 1,4,16,64 --seeds 3 --json runs/ablations.json \
        [--results experiments/results/ablations.md]

The cells are those of `experiments.oracle`, under the same --cache: a run that was stopped goes on where it was, and
one that names several worlds reads what was run for each.
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

from cads.budget import Budget
from cads.errors import CadsError, ConfigError
from cads.study.summary import half_width
from experiments.oracle import BUILT_IN, Contender, Oracle, run
from experiments.oracle_report import LONG_FROM, Cell, Reference, Summary, summary_of
from experiments.truth import write_whole
from experiments.worlds import read_world

WORLDS = ("complementary", "domains", "noise", "redundant")
BASE = Contender("cads-s", "cads-s")
"""What every other line is compared with."""
PENALTY = Contender("cads-s-penalty", "cads-s-penalty")
DIRECT_OPTIONS = {"allowance": 2.75, "share": 1 / 8}
"""The direct estimator at what CADS-S may spend: whole runs would not fit."""
DIRECT = Contender("direct", "bilevel", DIRECT_OPTIONS)


@dataclass(frozen=True)
class Variant:
    """A line of the table: which part, what stands in its place, and who does that."""

    part: str
    value: str
    who: Contender


def _cads(label: str, **options: object) -> Contender:
    return Contender(f"cads-s, {label}", "cads-s", options)


def _penalty(label: str, **options: object) -> Contender:
    return Contender(f"cads-s-penalty, {label}", "cads-s-penalty", options)


def _direct(label: str, **options: object) -> Contender:
    return Contender(f"direct, {label}", "bilevel", {**DIRECT_OPTIONS, **options})


VARIANTS = (
    Variant("estimator", "corrected (CADS-S)", BASE),
    Variant("estimator", "plain penalty", PENALTY),
    Variant("estimator", "direct, runs of C/8", DIRECT),
    Variant("baseline of direct", "leave-one-out", DIRECT),
    Variant("baseline of direct", "mean", _direct("mean", baseline="mean")),
    Variant("baseline of direct", "none", _direct("no baseline", baseline="none")),
    Variant("K of direct", "2", _direct("K = 2", draws=2)),
    Variant("K of direct", "5", DIRECT),
    Variant("K of direct", "10", _direct("K = 10", draws=10)),
    Variant("alpha", "fitted (CADS-S)", BASE),
    Variant("alpha", "0.1 (plain penalty)", PENALTY),
    Variant("alpha", "1 (plain penalty)", _penalty("alpha = 1", alpha=1.0)),
    Variant("l*", "fitted (CADS-S)", BASE),
    Variant("l*", "extrapolated (CADS-S)", _cads("l* extrapolated", reach="extrapolated")),
    Variant("l*", "fitted (plain penalty)", PENALTY),
    Variant("l*", "extrapolated (plain penalty)", _penalty("l* extrapolated", reach="extrapolated")),
    Variant("l*", "exact (plain penalty)", _penalty("l* exact", reach="exact")),
    Variant("policy", "Bernoulli", BASE),
    Variant("policy", "mixture", _cads("mixture", policy="mixture")),
    Variant("guard", "on", BASE),
    Variant("guard", "off", _cads("no guard", guard=False)),
    Variant("outer", "calibrated loss", BASE),
    Variant("outer", "loss", _cads("outer loss", outer="loss")),
    Variant("outer", "error", _cads("outer error", outer="error")),
)
PARTS = tuple(dict.fromkeys(v.part for v in VARIANTS))
OUTER = "outer"

NOTE = (
    "Regret in points of test accuracy and in nats of calibrated test loss, and selection FLOPs in units of C, as "
    "`experiments.oracle` defines them: means over worlds, budgets and seeds, ± half a 95% t-interval over seeds. The "
    "difference is to CADS-S as it is by default, seed by seed. The direct estimator may spend what CADS-S may, on "
    "runs of C/8; with its baseline `mean` the gradient is (K - 1)/K times that with leave-one-out, and Adam does not "
    "see a factor. The plain penalty has no allowance: it spends what its rounds and runs take."
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
    """Everyone in these parts once, and CADS-S as it is first.

    Raises:
        ConfigError: if there is no such part.
    """
    if stray := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"--parts {stray}: choose from {list(PARTS)}")
    who = {BASE.label: BASE} | {v.who.label: v.who for v in VARIANTS if v.part in parts}
    return list(who.values())


def difference(cells: Sequence[Cell], label: str) -> tuple[float, float]:
    """Regret in accuracy of a contender less that of CADS-S on the same cells, and half its interval over seeds."""
    regret = {(c.world, c.budget, c.seed, c.method): c.regret_acc for c in cells}
    by_seed: dict[int, list[float]] = {}
    for (world, budget, seed, method), value in regret.items():
        if method == label:
            by_seed.setdefault(seed, []).append(value - regret[world, budget, seed, BASE.label])
    means = [float(np.mean(values)) for values in by_seed.values()]
    return float(np.mean(means)), half_width(means)


def _points(mean: float, width: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if np.isnan(width) else f" ± {100 * width:.2f}")


def _row(variant: Variant, row: Summary, cells: Sequence[Cell]) -> list[str]:
    places = len({(c.world, c.budget) for c in row.cells})
    own = variant.who.label == BASE.label
    return [
        variant.part,
        variant.value,
        _points(row.regret_acc, row.width_acc),
        "" if own else _points(*difference(cells, variant.who.label), sign="+"),
        "-" if np.isnan(row.long_acc) else _points(row.long_acc, row.long_width),
        f"{row.regret_val:.3f}",
        f"{row.selection:.2f}",
        f"{row.seconds:.1f}",
        f"{len(row.worse)} of {places}",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(cells: Sequence[Cell], references: Sequence[Reference], parts: Sequence[str]) -> str:
    """The table of all parts, and the outer objectives world by world."""
    summary = {row.method: row for row in summary_of(cells, references)}
    rows = [_row(v, summary[v.who.label], cells) for v in VARIANTS if v.part in parts]
    worlds = list(dict.fromkeys(r.world for r in references))
    budgets = list(dict.fromkeys(r.budget for r in references))
    seeds = len({c.seed for c in cells})
    where = f"Worlds: {', '.join(worlds)}; passes: {', '.join(f'{b:g}' for b in budgets)}; {seeds} seeds."
    text = f"{NOTE}\n\n{where}\n\n{_table(COLUMNS, rows)}"
    if OUTER in parts:
        lines: list[list[str]] = []
        for variant in (v for v in VARIANTS if v.part == OUTER):
            here = [[c.regret_acc for c in cells if (c.method, c.world) == (variant.who.label, w)] for w in worlds]
            lines.append([variant.value, *(f"{100 * np.mean(values):.2f}" for values in here)])
        text += (
            f"\nThe outer objective of CADS-S, world by world, regret in points:\n\n{_table((OUTER, *worlds), lines)}"
        )
    return text


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, action="append", help="a YAML file; again for more")
    parser.add_argument("--budgets", default="1,4,16,64", help="passes over the pool, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to replace")
    parser.add_argument("--seeds", type=int, default=3, help="of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="of the truth")
    parser.add_argument("--json", type=Path, required=True, help="everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables here")
    parser.add_argument("--cache", type=Path, default=Path("runs/oracle"), help="folder of the cells")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder of the truth")
    given = parser.parse_args(argv)
    given.world = given.world or [BUILT_IN / f"{name}.yaml" for name in WORLDS]
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablations."""
    given = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        parts = [part.strip() for part in given.parts.split(",")]
        who = contenders(parts)
        budgets = [Budget.parse(f"{b.strip()} epochs").amount for b in given.budgets.split(",")]
        if given.seeds < 1:
            raise ConfigError(f"--seeds {given.seeds}: at least one is needed")
        worlds = [read_world(path) for path in given.world]
        oracle = Oracle(given.cache, given.truth, given.truth_seeds, bound_seconds=600.0)
        cells, references = run(worlds, budgets, who, given.seeds, oracle, console)
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
    write_whole(given.json, record)
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(f"# What each part of CADS-S is for\n\n    {command}\n\n{text}")
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
