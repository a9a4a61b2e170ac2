"""CADS as it trains against all that is free, at equal total cost: every shipped world, budgets from half a pass to 64.

    python -m experiments.online --out runs/online
    python -m experiments.online --out runs/online --worlds noise complementary --passes 1 4 --seeds 5

A cell is a world, a size of the target, a budget, a seed (of data and training) and a method. Finished cells are in
`OUT/cells.jsonl`; the same command goes on from there, the cheapest budgets first. `experiments.online_report` makes
the tables and figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.errors import BudgetError
from cads.registry import build_selector
from cads.task import Task
from cads.training import final
from experiments.worlds import SHIPPED, World, read_world, shipped

PASSES = (0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
TARGETS = (500, 50)


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: in tables. selector: installed name. options: of the selector.
        balanced: train with classes in even turns, whatever the selector says.
        hidden: make the selection without the sources of the pool.
        counted: whether the budget must be told to cover selection.
    """

    name: str
    selector: str
    options: dict[str, Any]
    balanced: bool = False
    hidden: bool = False


def methods(task: Task) -> list[Method]:
    """The free references, those that cost a cut, and `cads` with sources given and hidden."""
    plain = [
        Method("full", "full", {}),
        Method("joint .3", "joint", {"target_fraction": 0.3}),
        Method("joint .5", "joint", {"target_fraction": 0.5}),
        Method("target-only", "target-only", {}),
        Method("random half", "random", {"fraction": 0.5}),
    ]
    sources = [Method(f"only {name}", "source", {"name": name}) for name in task.pool.source_names]
    balanced = [replace(m, name=f"{m.name}, balanced", balanced=True) for m in plain]
    cuts = [Method(f"cut {share:.0%}", "loss", {"fraction": share}) for share in (0.6, 0.8)]
    by_size = Method("joint by size, balanced", "joint", {"target_fraction": "by size", "balanced": True})
    online = [Method("cads", "cads", {}), Method("cads, hidden", "cads", {}, hidden=True)]
    ablations = [
        Method("cads, granularity source", "cads", {"granularity": "source"}),
    ]
    return [*online, *plain, *balanced, by_size, *cuts, *ablations, *sources]


def run(task: Task, method: Method, passes: float, seed: int) -> dict[str, Any]:
    """Train by one method, and measure it: accuracy, FLOPs of selection and of training, seconds."""
    started = time.perf_counter()
    budget = Budget.parse(f"{passes} epochs", count_selection=True)
    if method.hidden:
        task = without_sources(task)
    ledger = Ledger()
    try:
        selection = build_selector(method.selector, method.options).select(task, budget, seed=seed, ledger=ledger)
        if method.balanced:
            selection = replace(selection, balanced=True)
        trained = final.train(task, selection, budget, seed=seed)
    except BudgetError as error:
        return {"error": str(error)}
    return {
        "accuracy": trained.metrics["accuracy"],
        "select": trained.ledger.total(SELECT).flops,
        "train": trained.ledger.total(TRAIN).flops,
        "budget": budget.flops(task),
        "seconds": time.perf_counter() - started,
    }


def without_sources(task: Task) -> Task:
    """The same task, whose pool has no sources."""
    import copy

    from cads.data.pool import Pool

    hidden = copy.copy(task)
    hidden.pool = Pool(task.pool.ids, task.pool.examples, name=task.pool.name)
    return hidden


def cells(
    worlds: Sequence[World], targets: Sequence[int], passes: Sequence[float], seeds: int
) -> Iterator[tuple[World, int, float, int]]:
    """All cells but the method, the cheapest budgets first."""
    for amount in sorted(passes):
        for seed in range(seeds):
            for world in worlds:
                for n_target in targets:
                    yield world, n_target, amount, seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", nargs="+", default=list(SHIPPED))
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS))
    parser.add_argument("--passes", nargs="+", type=float, default=list(PASSES))
    parser.add_argument("--methods", nargs="+", default=None, help="only those whose names begin so")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    done = {tuple(row["key"]) for row in map(json.loads, path.read_text().splitlines())} if path.exists() else set()
    tasks: dict[tuple[str, int, int], Task] = {}
    worlds = [read_world(p) for p in shipped(options.worlds)]
    with path.open("a") as file:
        for world, n_target, passes, seed in cells(worlds, options.targets, options.passes, options.seeds):
            at = (world.name, n_target, seed)
            if at not in tasks:
                tasks[at] = replace(world, task=replace(world.task, n_target=n_target, data_seed=seed)).build()
            for method in methods(tasks[at]):
                if options.methods and not method.name.startswith(tuple(options.methods)):
                    continue
                key = (world.name, n_target, passes, seed, method.name)
                if key in done:
                    continue
                row = {"key": key, **run(tasks[at], method, passes, seed)}
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
