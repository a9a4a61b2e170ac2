"""Regret of selectors in small worlds whose truth is known.

    python -m experiments.oracle --world experiments/configs/worlds/noise.yaml --budgets 1,4,16,64 \
        --methods full,cads-s,halving --seeds 5 --json runs/oracle.json [--results experiments/results/oracle.md]

A world is a data set cut into sources; all subsets of at most 6 sources are trained (above, a search gives a
bound), and what each selector chooses is compared with the best of them. Budgets are passes over the pool.
Finished cells are kept under --cache, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CadsError, ConfigError
from cads.registry import build_selector
from cads.selection import Selection
from cads.selector import Selector
from cads.task import Task
from cads.training.final import train, training_flops
from experiments.bound import bound
from experiments.oracle_report import Cell, Reference, draw, markdown, tables
from experiments.truth import ENUMERATED, MEASURED_ON, TRUTH_VERSION, Truth, truth, worth, write_whole
from experiments.worlds import SHIPPED, World, read_world, shipped

ORACLE_VERSION = 1
"""Part of every cell's key: raise it when what a cell holds changes its meaning."""
LATER = {"alpha": None, "policy_steps": 60}
"""Options younger than kept cells, at what was done before they came: these are no part of a key."""
WIDTH = 132
"""Columns of the tables where there is no terminal to ask."""


@dataclass
class Contender:
    """One line of the comparison: a selector with its options, under a name of its own."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    count_selection: bool = False


def contenders(labels: Sequence[str], settings: Sequence[str]) -> list[Contender]:
    """The contenders that `--methods` names, as `--options` describes them.

    Args:
        settings: each `LABEL={name: value, ...}` in YAML: options of the selector; `method`, if the label is not
            its name; `count_selection`, whether the budget covers selection too.

    Raises:
        ConfigError: if a setting does not parse or belongs to no label, or a method or option is unknown.
    """
    given: dict[str, dict[str, Any]] = {}
    for text in settings:
        label, _, rest = text.partition("=")
        try:
            values = yaml.safe_load(rest)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options {text!r} does not parse: {error}") from error
        if not isinstance(values, dict) or label not in labels:
            raise ConfigError(f"--options {text!r}: write LABEL={{name: value}}, with a label of --methods {labels}")
        given[label] = values
    made = []
    for label in labels:
        options = dict(given.get(label, {}))
        made.append(
            Contender(label, options.pop("method", label), count_selection=options.pop("count_selection", False))
        )
        made[-1].options = options
        build_selector(made[-1].method, options)
    return made


def settings_of(selector: Selector) -> dict[str, str]:
    """What a cell's key has of a selector: also options that were not given, since another default is another cell."""
    return {name: repr(value) for name, value in vars(selector).items() if (name, value) not in LATER.items()}


def chosen_of(selection: Selection, task: Task) -> list[float]:
    """The mean weight of the examples of each source: 0 and 1 for subsets, the share kept for examples."""
    weight = selection.selected * (selection.probability if selection.weighted else 1.0)
    assert task.pool.sources is not None
    mean = np.bincount(task.pool.sources, weights=weight) / task.pool.source_sizes
    return [float(x) for x in mean]


def value_of(
    task: Task, selection: Selection, budget: Budget, known: Truth, seeds: int, cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated test loss and accuracy of models trained on `selection`, with the truth's seeds to measure on.

    Subsets of sources are read off the truth; everything else is trained. A run that selection has begun is ended,
    once, with the seed of the selection: it is no other run's beginning.
    """
    if selection.warm_start is not None:
        metrics = train(task, selection, budget, seed=selection.seed).metrics
        return np.array([metrics["calibrated_loss"]]), np.array([metrics["accuracy"]])
    flops = training_flops(task, budget, selection)
    chosen = np.array(chosen_of(selection, task))
    mask = chosen == 1
    plain = not selection.weighted and selection.target_fraction == 0 and flops == known.flops
    if plain and np.isin(chosen, (0, 1)).all() and (row := known.row(mask)) is not None:
        return known.losses[row, MEASURED_ON], known.accuracy[row, MEASURED_ON]
    return worth(task, selection, flops, range(seeds)[MEASURED_ON], cache)


class Oracle:
    """Runs cells, and keeps them.

    Args:
        cache: folder of the truth and the cells. truth_seeds: of the truth, at least two.
        bound_seconds: for the search in worlds with many sources.
        fresh: labels whose kept cells are not to be used.
    """

    def __init__(
        self, cache: Path, truth_cache: Path, truth_seeds: int, bound_seconds: float, fresh: Sequence[str] = ()
    ) -> None:
        if truth_seeds < 2:
            raise ConfigError(f"truth_seeds = {truth_seeds}: one to choose the best subset on, and one to measure it")
        self.cache, self.truth_cache = cache, truth_cache
        self.truth_seeds, self.bound_seconds, self.fresh = truth_seeds, bound_seconds, set(fresh)

    def truth(self, task: Task, budget: Budget) -> Truth:
        """All subsets, or a search among them."""
        if len(task.pool.source_names) <= ENUMERATED:
            return truth(task, budget, self.truth_seeds, self.truth_cache)
        return bound(task, budget, self.truth_seeds, self.truth_cache, seconds=self.bound_seconds)

    def cell(self, world: World, task: Task, known: Truth, who: Contender, passes: float, seed: int) -> Cell:
        """Select, and look up or train what was selected; read from the cache if it was done before."""
        selector = build_selector(who.method, who.options)
        about = [ORACLE_VERSION, TRUTH_VERSION, world.settings(), passes, asdict(who), seed, self.truth_seeds]
        about.append(settings_of(selector))
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        file = self.cache / f"{world.name}-{passes:g}-{who.label.replace('/', '_')}-{seed}-{digest}.json"
        if who.label in self.fresh or not file.exists():
            budget = Budget(passes, "epochs", count_selection=who.count_selection)
            ledger, started = Ledger(), time.perf_counter()
            selection = selector.select(task, budget, seed=seed, ledger=ledger)
            seconds = time.perf_counter() - started
            losses, accuracy = value_of(task, selection, budget, known, self.truth_seeds, self.truth_cache)
            record = {
                "chosen": chosen_of(selection, task),
                "target_fraction": selection.target_fraction,
                "selection_over_C": ledger.total(SELECT).flops / budget.flops(task),
                "seconds": seconds,
                "losses": losses.tolist(),
                "accuracy": accuracy.tolist(),
                "notes": selection.notes,
            }
            write_whole(file, record)
        record = json.loads(file.read_text())
        regret_val, regret_acc = known.regret_of(record["losses"], record["accuracy"])
        return Cell(world.name, passes, who.label, seed, regret_val=regret_val, regret_acc=regret_acc, **record)


def reference(world: World, passes: float, known: Truth) -> Reference:
    """The best subset and the full pool, as the truth knows them."""
    full = known.row(np.ones(known.masks.shape[1], dtype=bool))
    assert full is not None
    regret_val, regret_acc = known.regret(known.masks[full])
    best = known.best[1]
    floor = known.floor
    return Reference(
        world=world.name,
        budget=passes,
        sources=[spec.name for spec in world.task.sources],
        best=known.masks[best].astype(float).tolist(),
        best_accuracy=float(known.accuracy[best, MEASURED_ON].mean()),
        uniform_regret_val=regret_val,
        uniform_regret_acc=regret_acc,
        floor_val=floor[0],
        floor_acc=floor[1],
        exhaustive=known.exhaustive,
        subsets=len(known.masks),
    )


def run(
    worlds: Sequence[World],
    budgets: Sequence[float],
    who: Sequence[Contender],
    seeds: int,
    oracle: Oracle,
    console: Console,
) -> tuple[list[Cell], list[Reference]]:
    """All cells, world by world and budget by budget.

    Raises:
        ConfigError: if a label whose kept cells are not to be used is no contender's.
    """
    labels = [contender.label for contender in who]
    if stray := sorted(oracle.fresh - set(labels)):
        raise ConfigError(f"--fresh {stray}: choose from {labels}")
    cells, references = [], []
    for world in worlds:
        task = world.build()
        for passes in budgets:
            known = oracle.truth(task, Budget(passes, "epochs"))
            references.append(reference(world, passes, known))
            for contender in who:
                here = [oracle.cell(world, task, known, contender, passes, seed) for seed in range(seeds)]
                cells += here
                console.print(
                    f"{world.name}, {passes:g} passes: {contender.label:24s} regret "
                    f"{100 * np.mean([c.regret_acc for c in here]):6.2f} points, "
                    f"{np.mean([c.selection_over_C for c in here]):.2f} C",
                    highlight=False,
                )
    return cells, references


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world", type=Path, action="append", help=f"a YAML file; again for more (default: {', '.join(SHIPPED)})"
    )
    parser.add_argument("--budgets", default="1,4,16,64", help="passes over the pool, separated by commas")
    parser.add_argument("--methods", default="full,cads-s", help="selectors, or labels that --options explains")
    parser.add_argument("--options", action="append", default=[], help="LABEL={name: value, ...}; again for more")
    parser.add_argument("--seeds", type=int, default=5, help="of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="of the truth")
    parser.add_argument("--bound-seconds", type=float, default=600.0, help="to search worlds of many sources")
    parser.add_argument("--json", type=Path, required=True, help="everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables (NAME.md) and the figure (NAME.png)")
    parser.add_argument("--cache", type=Path, default=Path("runs/oracle"), help="folder of the cells")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder of the truth")
    parser.add_argument("--fresh", action="append", default=[], help="a label whose kept cells are run again")
    given = parser.parse_args(argv)
    given.world = given.world or shipped(SHIPPED)
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    given = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        labels = [label.strip() for label in given.methods.split(",")]
        who = contenders(labels, given.options)
        budgets = [Budget.parse(f"{b.strip()} epochs").amount for b in given.budgets.split(",")]
        worlds = [read_world(path) for path in given.world]
        if given.seeds < 1:
            raise ConfigError(f"--seeds {given.seeds}: at least one is needed")
        oracle = Oracle(given.cache, given.truth, given.truth_seeds, given.bound_seconds, given.fresh)
        cells, references = run(worlds, budgets, who, given.seeds, oracle, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    wide = console if console.is_terminal else Console(width=WIDTH)
    for table in tables(cells, references):
        wide.print(table)
    words = [*(sys.argv[1:] if argv is None else argv)]
    command = f"python -m experiments.oracle {shlex.join(words)}"
    record = {
        "command": command,
        "contenders": [asdict(c) for c in who],
        "cells": [asdict(c) for c in cells],
        "truth": [asdict(r) for r in references],
    }
    write_whole(given.json, record)
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        draw(cells, references, given.results.with_suffix(".png"))
        given.results.write_text(
            f"# Regret in worlds whose truth is known\n\n    {command}\n\n{markdown(cells, references)}"
        )
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
