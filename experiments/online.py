"""CADS as it trains against all that is free, at equal total cost: every shipped world, budgets from half a pass to 64.

    python -m experiments.online --out runs/online
    python -m experiments.online --out runs/online --results experiments/results/online.md
    python -m experiments.online --out runs/try --worlds noise domains --passes 1 4 --seeds 0 1

A cell is a world, a size of the target, a budget, a seed (of data and training) and a method; the budget covers
selection and training. Finished cells are in `OUT/cells.jsonl`, and the same command goes on from there, the cheapest
budgets first. `--results` writes the tables and the figure of the cells that are there (`experiments.online_report`),
and the cells themselves as `.jsonl`: as `OUT/cells.jsonl`, they go on elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.pool import Pool
from cads.errors import BudgetError, ConfigError
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.selector import Selector
from cads.selectors.online.schedule import OnlineConstants
from cads.selectors.online.selector import Cads
from cads.task import Task
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training import final
from experiments.online_report import ABLATIONS, HIDDEN, ONLINE, UNGROUPED, write_report
from experiments.worlds import SHIPPED, World, read_world, shipped

PASSES = (0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
TARGETS = (500, 50)
COMPARE_VISION = "compare-vision"
"""The world of `experiments/configs/compare-vision.yaml`: a CNN, 27,500 images."""
LARGER = 5
"""How many times larger its target is than those of the other worlds."""


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: in tables. selector: installed name. options: of the selector.
        balanced: whether classes come in even turns, whatever the selector says.
        hidden: whether the pool comes without its sources.
        on_top: whether the budget is that of training alone, and selection comes on top.
        changed: constants of `cads` that an ablation changes.
    """

    name: str
    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    balanced: bool = False
    hidden: bool = False
    on_top: bool = False
    changed: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Selector:
        """The selector."""
        if self.changed:
            return Changed(**self.options, changed=self.changed)
        return build_selector(self.selector, self.options)


@dataclass
class Changed(Cads):
    """`cads` with other constants."""

    changed: Mapping[str, Any] = field(default_factory=dict)

    def constants(self, task: Task) -> OnlineConstants:
        """Those of the task, with the changes."""
        return replace(super().constants(task), **self.changed)


def methods(sources: Sequence[str]) -> list[Method]:
    """`cads` with sources given and hidden, what is free, what costs a cut, each single source, and the ablations."""
    plain = [
        Method("full", "full"),
        Method("joint .3", "joint", {"target_fraction": 0.3}),
        Method("joint .5", "joint", {"target_fraction": 0.5}),
        Method("target-only", "target-only"),
        Method("random half", "random", {"fraction": 0.5}),
    ]
    return [
        Method(ONLINE, "cads"),
        Method(HIDDEN, "cads", hidden=True),
        Method(UNGROUPED, "cads", hidden=True, changed={"most_comparing": 0.0}),
        *plain,
        *(replace(m, name=f"{m.name}, balanced", balanced=True) for m in plain),
        Method("joint by size, balanced", "joint", {"target_fraction": "by size"}, balanced=True),
        *(Method(f"cut {share:.0%}", "loss", {"fraction": share}) for share in (0.6, 0.8)),
        *(Method(f"only {name}", "source", {"name": name}) for name in sources),
        Method(ABLATIONS[0], "cads", {"granularity": "source"}),
        Method(ABLATIONS[1], "cads", changed={"first_passes": 0.0}),
        Method(ABLATIONS[2], "cads", changed={"sharpness": 0.0}),
        Method(ABLATIONS[3], "cads", changed={"learning_passes": 0.0}),
    ]


def run(task: Task, method: Method, passes: float, seed: int) -> dict[str, Any]:
    """Train by one method: accuracy, FLOPs of selection, of training and of the budget, shares drawn, and seconds."""
    started = time.perf_counter()
    budget = Budget.parse(f"{passes} epochs", count_selection=not method.on_top)
    task = without_sources(task) if method.hidden else task
    try:
        selection = method.build().select(task, budget, seed=seed, ledger=Ledger())
        trained = final.train(
            task, replace(selection, balanced=True) if method.balanced else selection, budget, seed=seed
        )
    except BudgetError as error:
        return {"error": str(error)}
    return {
        "accuracy": trained.metrics["accuracy"],
        "select": trained.ledger.total(SELECT).flops,
        "train": trained.ledger.total(TRAIN).flops,
        "budget": budget.flops(task),
        "shares": {name: round(share, 3) for name, share in selection.shares.items()},
        "target": round(selection.target_fraction, 3),
        "seconds": time.perf_counter() - started,
    }


def without_sources(task: Task) -> Task:
    """The same task, whose pool has no sources."""
    hidden = copy.copy(task)
    hidden.pool = Pool(task.pool.ids, task.pool.examples, name=task.pool.name)
    return hidden


def world_named(name: str) -> World:
    """A shipped world, that of compare-vision, or one in a YAML file of its own.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name != COMPARE_VISION:
        return read_world(Path(name) if name.endswith(".yaml") else shipped([name])[0])
    path = Path(__file__).parent / "configs" / f"{name}.yaml"
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    sources = [SyntheticSource(**source) for source in settings["task"].pop("sources")]
    return World(name, VisionConfig(**settings["task"], sources=sources), TrainConfig(**settings["train"]))


def cells(
    worlds: Sequence[str], targets: Sequence[int], passes: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[str, int, float, int]]:
    """All cells but the method, the cheapest budgets first."""
    for amount in sorted(passes):
        for seed in seeds:
            for world in worlds:
                for n_target in targets:
                    yield world, n_target * (LARGER if world == COMPARE_VISION else 1), amount, seed


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a comparison of methods on worlds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished cells")
    parser.add_argument("--worlds", nargs="+", default=list(SHIPPED), help="names, or YAML files")
    parser.add_argument(
        "--targets", nargs="+", type=int, default=list(TARGETS), help="five times as many in compare-vision"
    )
    parser.add_argument("--passes", nargs="+", type=float, default=list(PASSES))
    parser.add_argument("--methods", nargs="+", default=None, help="only those of these names, as in the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--results", type=Path, default=None, help="Markdown file; its figure stands beside it")
    return parser.parse_args(argv)


def run_missing(
    options: argparse.Namespace,
    methods_of: Callable[[Sequence[str]], Sequence[Method]],
    world_of: Callable[[str], World] = world_named,
) -> None:
    """Run all cells that are not in `OUT/cells.jsonl` yet.

    Args:
        options: as `parse` gives them. methods_of: the methods for a world with these sources.
        world_of: the world of a name.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    done = {tuple(json.loads(line)["key"]) for line in path.read_text().splitlines()} if path.exists() else set()
    tasks: dict[tuple[str, int, int], Task] = {}
    with path.open("a") as file:
        for name, n_target, passes, seed in cells(options.worlds, options.targets, options.passes, options.seeds):
            world = world_of(name)
            for method in methods_of([source.name for source in world.task.sources]):
                key = (world.name, n_target, passes, seed, method.name)
                if key in done or (options.methods and method.name not in options.methods):
                    continue
                at = (world.name, n_target, seed)
                if at not in tasks:
                    tasks[at] = replace(world, task=replace(world.task, n_target=n_target, data_seed=seed)).build()
                file.write(json.dumps({"key": key, **run(tasks[at], method, passes, seed)}) + "\n")
                file.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells that are not there yet, or report on those that are."""
    options = parse(__doc__, argv)
    if options.results is not None:
        command = shlex.join(["python", "-m", "experiments.online", *(argv or sys.argv[1:])])
        write_report(options.out / "cells.jsonl", options.results, command)
    else:
        run_missing(options, methods)


if __name__ == "__main__":
    main()
