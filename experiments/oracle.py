"""Regret of selectors in small worlds where the value of every subset of sources is known.

    python -m experiments.oracle --world experiments/configs/worlds/noise.yaml --budgets 1,4,16,64 \
        --methods full,search,halving --seeds 5 --json runs/oracle.json [--results experiments/results/oracle.md]

A world is a data set cut into sources. With at most 6 sources all subsets are trained, which gives the truth; with more
a search gives a bound. The choice of each selector is compared with the best subset. Budgets are passes over the pool.
Finished cells are kept under --cache, so that a run that was stopped resumes.
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
from cads.training.final import final_training_flops, train
from experiments.bound import bound
from experiments.oracle_report import Cell, Reference, draw, markdown, tables
from experiments.truth import ENUMERATED, MEASURED_ON, TRUTH_VERSION, Truth, truth, worth, write_whole
from experiments.worlds import SHIPPED, World, read_world, shipped

ORACLE_VERSION = 1
"""Part of every cell's key: raise it when the contents of a cell change their meaning."""
LATER = {"alpha": None, "policy_steps": 60, "target_fraction": 0.0}
"""Options that are newer than cells in use, with the values that those cells were run with.

An option with this value is no part of a cell's key, so that older cells stay valid.
"""
WIDTH = 132
"""Width of the tables in characters where the output is no terminal."""


@dataclass
class Contender:
    """One line of the comparison: a selector with its options, under a label."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    count_selection: bool = False


def contenders(labels: Sequence[str], settings: Sequence[str]) -> list[Contender]:
    """The contenders that `--methods` names, with the options that `--options` gives.

    Args:
        labels: of the contenders.
        settings: each `LABEL={name: value, ...}` in YAML. The values are options of the selector, and two more:
            `method`, the selector's name where the label is not; `count_selection`, whether the budget covers
            selection too.

    Raises:
        ConfigError: if a setting does not parse or belongs to no label, or a method or option is unknown.
    """
    options_by_label: dict[str, dict[str, Any]] = {}
    for text in settings:
        label, _, yaml_text = text.partition("=")
        try:
            values = yaml.safe_load(yaml_text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options {text!r} does not parse: {error}") from error
        if not isinstance(values, dict) or label not in labels:
            raise ConfigError(f"--options {text!r}: write LABEL={{name: value}}, with a label of --methods {labels}")
        options_by_label[label] = values
    parsed = []
    for label in labels:
        options = dict(options_by_label.get(label, {}))
        parsed.append(
            Contender(label, options.pop("method", label), count_selection=options.pop("count_selection", False))
        )
        parsed[-1].options = options
        build_selector(parsed[-1].method, options)
    return parsed


def settings_of(selector: Selector) -> dict[str, str]:
    """All options of a selector for a cell's key, defaults included: a cell is run again when a default changes."""
    return {name: repr(value) for name, value in vars(selector).items() if (name, value) not in LATER.items()}


def chosen_of(selection: Selection, task: Task) -> list[float]:
    """The mean weight of the examples of each source, shape (S,).

    It is 0 or 1 in a selection of whole sources, and the share that is selected in one of single examples.
    """
    weight = selection.selected * (selection.probability if selection.weighted else 1.0)
    assert task.pool.sources is not None
    mean = np.bincount(task.pool.sources, weights=weight) / task.pool.source_sizes
    return [float(x) for x in mean]


def value_of(
    task: Task, selection: Selection, budget: Budget, ground_truth: Truth, seeds: int, cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated test loss and accuracy of models trained on `selection`, with the truth's seeds to measure on.

    Subsets of sources are looked up in the truth; all other selections are trained. Where selection has trained the
    model already, that model is measured.
    """
    if selection.trained is not None:
        metrics = train(task, selection, budget, seed=selection.seed).metrics
        return np.array([metrics["calibrated_loss"]]), np.array([metrics["accuracy"]])
    flops = final_training_flops(task, budget, selection)
    weights = np.array(chosen_of(selection, task))
    mask = weights == 1
    as_in_truth = not selection.weighted and selection.target_fraction == 0 and flops == ground_truth.flops
    if as_in_truth and np.isin(weights, (0, 1)).all() and (row := ground_truth.row(mask)) is not None:
        return ground_truth.losses[row, MEASURED_ON], ground_truth.accuracy[row, MEASURED_ON]
    return worth(task, selection, flops, range(seeds)[MEASURED_ON], cache)


class Oracle:
    """Runs cells, and keeps them.

    Args:
        cache: folder of the cells. truth_cache: folder of the truth. truth_seeds: number of its seeds, at least two.
        bound_seconds: time for the search in worlds with many sources.
        fresh: labels of contenders whose kept cells are run again.
    """

    def __init__(
        self, cache: Path, truth_cache: Path, truth_seeds: int, bound_seconds: float, fresh: Sequence[str] = ()
    ) -> None:
        if truth_seeds < 2:
            raise ConfigError(f"truth_seeds = {truth_seeds}: one to choose the best subset on, and one to measure it")
        self.cache, self.truth_cache = cache, truth_cache
        self.truth_seeds, self.bound_seconds, self.fresh = truth_seeds, bound_seconds, set(fresh)

    def truth(self, task: Task, budget: Budget) -> Truth:
        """The values of all subsets, or of those that a search finds."""
        if len(task.pool.source_names) <= ENUMERATED:
            return truth(task, budget, self.truth_seeds, self.truth_cache)
        return bound(task, budget, self.truth_seeds, self.truth_cache, seconds=self.bound_seconds)

    def cell(
        self, world: World, task: Task, ground_truth: Truth, contender: Contender, passes: float, seed: int
    ) -> Cell:
        """The cell of one contender: its choice and the value of that; read from the cache if it was run before."""
        selector = build_selector(contender.method, contender.options)
        key_fields = [
            ORACLE_VERSION,
            TRUTH_VERSION,
            world.settings(),
            passes,
            asdict(contender),
            seed,
            self.truth_seeds,
        ]
        key_fields.append(settings_of(selector))
        digest = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()[:12]
        file = self.cache / f"{world.name}-{passes:g}-{contender.label.replace('/', '_')}-{seed}-{digest}.json"
        if contender.label in self.fresh or not file.exists():
            budget = Budget(passes, "epochs", count_selection=contender.count_selection)
            ledger, started = Ledger(), time.perf_counter()
            selection = selector.select(task, budget, seed=seed, ledger=ledger)
            seconds = time.perf_counter() - started
            losses, accuracy = value_of(task, selection, budget, ground_truth, self.truth_seeds, self.truth_cache)
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
        regret_val, regret_acc = ground_truth.regret_of(record["losses"], record["accuracy"])
        return Cell(world.name, passes, contender.label, seed, regret_val=regret_val, regret_acc=regret_acc, **record)


def reference(world: World, passes: float, ground_truth: Truth) -> Reference:
    """Values of the best subset and of the full pool in the truth."""
    full = ground_truth.row(np.ones(ground_truth.masks.shape[1], dtype=bool))
    assert full is not None
    regret_val, regret_acc = ground_truth.regret(ground_truth.masks[full])
    best = ground_truth.best[1]
    floor = ground_truth.floor
    return Reference(
        world=world.name,
        budget=passes,
        sources=[spec.name for spec in world.task.sources],
        best=ground_truth.masks[best].astype(float).tolist(),
        best_accuracy=float(ground_truth.accuracy[best, MEASURED_ON].mean()),
        uniform_regret_val=regret_val,
        uniform_regret_acc=regret_acc,
        floor_val=floor[0],
        floor_acc=floor[1],
        exhaustive=ground_truth.exhaustive,
        subsets=len(ground_truth.masks),
    )


def run(
    worlds: Sequence[World],
    budgets: Sequence[float],
    selectors: Sequence[Contender],
    seeds: int,
    oracle: Oracle,
    console: Console,
) -> tuple[list[Cell], list[Reference]]:
    """All cells, world by world and budget by budget.

    Raises:
        ConfigError: if a label in `oracle.fresh` is no contender's.
    """
    labels = [contender.label for contender in selectors]
    if unknown := sorted(oracle.fresh - set(labels)):
        raise ConfigError(f"--fresh {unknown}: choose from {labels}")
    cells, references = [], []
    for world in worlds:
        task = world.build()
        for passes in budgets:
            ground_truth = oracle.truth(task, Budget(passes, "epochs"))
            references.append(reference(world, passes, ground_truth))
            for contender in selectors:
                contender_cells = [
                    oracle.cell(world, task, ground_truth, contender, passes, seed) for seed in range(seeds)
                ]
                cells += contender_cells
                console.print(
                    f"{world.name}, {passes:g} passes: {contender.label:24s} regret "
                    f"{100 * np.mean([c.regret_acc for c in contender_cells]):6.2f} points, "
                    f"{np.mean([c.selection_over_C for c in contender_cells]):.2f} C",
                    highlight=False,
                )
    return cells, references


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world",
        type=Path,
        action="append",
        help=f"YAML file of a world; repeat for more (default: {', '.join(SHIPPED)})",
    )
    parser.add_argument("--budgets", default="1,4,16,64", help="passes over the pool, separated by commas")
    parser.add_argument("--methods", default="full,search", help="selectors, or labels that --options explains")
    parser.add_argument("--options", action="append", default=[], help="LABEL={name: value, ...}; repeat for more")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="number of seeds of the truth")
    parser.add_argument("--bound-seconds", type=float, default=600.0, help="time to search worlds of many sources")
    parser.add_argument("--json", type=Path, required=True, help="JSON file for everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables (NAME.md) and the figure (NAME.png)")
    parser.add_argument("--cache", type=Path, default=Path("runs/oracle"), help="folder where cells are kept")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder where the truth is kept")
    parser.add_argument(
        "--fresh", action="append", default=[], help="label of a contender whose kept cells are run again"
    )
    args = parser.parse_args(argv)
    args.world = args.world or shipped(SHIPPED)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        labels = [label.strip() for label in args.methods.split(",")]
        selectors = contenders(labels, args.options)
        budgets = [Budget.parse(f"{b.strip()} epochs").amount for b in args.budgets.split(",")]
        worlds = [read_world(path) for path in args.world]
        if args.seeds < 1:
            raise ConfigError(f"--seeds {args.seeds}: at least one is needed")
        oracle = Oracle(args.cache, args.truth, args.truth_seeds, args.bound_seconds, args.fresh)
        cells, references = run(worlds, budgets, selectors, args.seeds, oracle, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    table_console = console if console.is_terminal else Console(width=WIDTH)
    for table in tables(cells, references):
        table_console.print(table)
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    command = f"python -m experiments.oracle {shlex.join(arguments)}"
    record = {
        "command": command,
        "contenders": [asdict(c) for c in selectors],
        "cells": [asdict(c) for c in cells],
        "truth": [asdict(r) for r in references],
    }
    write_whole(args.json, record)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        draw(cells, references, args.results.with_suffix(".png"))
        args.results.write_text(
            f"# Regret in worlds whose truth is known\n\n    {command}\n\n{markdown(cells, references)}"
        )
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
