"""The cost of selection to reach a given regret: `search` against bilevel methods, by budget and by number of sources.

    python -m experiments.speedup --budgets 1,4,16,64 --sources 3,5,8,13 --seeds 3 --json runs/speedup.json \
        [--results experiments/results/speedup.md]

Every method is run with a sweep of allowances, in worlds whose truth is known. The first part runs the worlds at each
budget; the second takes more and more sources of one world, at one budget. Finished cells are kept under --cache: a run
that was stopped resumes; a run over several worlds reads the cells that were run for each world.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from baselines.search.source_search import SourceSearch, threshold
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CadsError, ConfigError
from cads.monitor import Monitor
from cads.policies.bernoulli import BernoulliPolicy
from cads.registry import build_selector
from cads.search.source_choice import source_choice
from cads.search.space import SubsetSpace
from cads.selection import Selection
from cads.selector import Selector, full_pool_selection
from cads.task import Task
from experiments.oracle import Oracle, chosen_of, settings_of, value_of
from experiments.speedup_report import Point, draw, markdown, summary_lines
from experiments.truth import TRUTH_VERSION, Truth, write_whole
from experiments.unrolled import Unrolled
from experiments.worlds import BUILT_IN, SHORT, World, read_world, shipped

SPEEDUP_VERSION = 1
"""Part of every cell's key: raise it when the contents of a cell change their meaning."""
NESTED_WORLD = "many"
NESTED = (
    "clean",
    "noise 60 %",
    "6-9",
    "inverted",
    "noise 90 %",
    "0-2",
    "noise 20 %",
    "blurred",
    "3-5",
    "repeated",
    "rotated",
    "noise 40 %",
    "5-9 noisy",
)
"""Sources of the second part, in order: n sources are the first n. Good and bad ones are mixed from the start."""
GRID = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.75, 4.0, 5.5, 8.0, 11.0, 16.5, 22.0, 27.5, 33.0)
"""Allowances at which the state of a course of outer steps is evaluated, in units of C.

One outer step with five runs for C each takes 5.5 C, measurements included.
"""


@dataclass(frozen=True)
class Method:
    """A selector and its sweep.

    Attributes:
        name: of the selector. options: of the selector. allowances: in units of C.
        course: whether all outer steps are alike, whatever the allowance. If so, the run with the largest allowance
            contains the runs with smaller ones.
    """

    name: str
    allowances: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    course: bool = False

    def selector(self, allowance: float) -> Selector:
        """The selector with that allowance."""
        options = {**self.options, "allowance": allowance}
        return Unrolled(**options) if self.name == Unrolled.method else build_selector(self.name, options)


def _up_to(maximum: float) -> tuple[float, ...]:
    return tuple(a for a in GRID if a <= maximum)


METHODS = {
    "search": Method("search", (0.35, 0.7, 1.4, 2.75, 5.5)),
    # Its learning rate falls to 0 at the end of its allowance, so that no run contains another.
    "bilevel": Method("bilevel", (5.5, 11.0, 33.0)),
    "bilevel, C/8": Method("bilevel", (1.4, 2.75, 5.5, 11.0), {"share": 1 / 8}),
    "unrolled": Method("unrolled", _up_to(11), course=True),
    "unrolled, C/4": Method("unrolled", _up_to(5.5), {"share": 1 / 4}, course=True),
    "unrolled, C/4, rate 0.03": Method("unrolled", _up_to(5.5), {"share": 1 / 4, "rate": 0.03}, course=True),
    "unrolled, C/4, rate 0.3": Method("unrolled", _up_to(5.5), {"share": 1 / 4, "rate": 0.3}, course=True),
}
"""The methods by their labels in the tables. The others are compared with the first. Other learning rates of the inner
SGD of `unrolled` are tried where its runs are cheap."""


class Steps(Monitor):
    """Records the probabilities of the sources after each outer step, and the time.

    Attributes:
        records: of each outer step the probabilities (S,), wall-clock seconds and CPU seconds since the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[np.ndarray, float, float]] = []
        self._start = time.perf_counter(), time.process_time()

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """Record them, and the time."""
        wall, cpu = self._start
        self.records.append((np.array(values), time.perf_counter() - wall, time.process_time() - cpu))


@dataclass(frozen=True)
class Choice:
    """The result of an allowance: the selection, its cost in units of C, wall-clock seconds and CPU seconds."""

    allowance: float
    selection: Selection
    cost: float
    seconds: float
    cpu_seconds: float


def choices(method: Method, task: Task, budget: Budget, seed: int) -> list[Choice]:
    """The result of each allowance of the sweep."""
    if method.course:
        return _course(method, task, budget, seed)
    results = []
    for allowance in method.allowances:
        ledger, clock = Ledger(), Steps()
        selection = method.selector(allowance).select(task, budget, seed=seed, ledger=ledger, monitor=clock)
        clock.probabilities((), np.empty(0), 0)
        cost = ledger.total(SELECT).flops / budget.flops(task)
        results.append(Choice(allowance, selection, cost, *clock.records[-1][1:]))
    return results


def _course(method: Method, task: Task, budget: Budget, seed: int) -> list[Choice]:
    """Run the largest allowance once; the result of a smaller one is the state after the last step that it pays for."""
    selector = method.selector(max(method.allowances))
    assert isinstance(selector, Unrolled)
    ledger, steps = Ledger(), Steps()
    selector.select(task, budget, seed=seed, ledger=ledger, monitor=steps)
    step_cost = ledger.total(SELECT).flops / budget.flops(task) / max(1, len(steps.records))
    results = []
    for allowance in method.allowances:
        count = min(len(steps.records), int(allowance / step_cost * (1 + 1e-9))) if steps.records else 0
        if count:
            probabilities, seconds, cpu_seconds = steps.records[count - 1]
            selection = _selection_of(task, probabilities, budget, selector, seed)
            results.append(Choice(allowance, selection, count * step_cost, seconds, cpu_seconds))
        else:
            full_pool = full_pool_selection(task, budget, method=selector.method, seed=seed, ledger=Ledger(), notes={})
            results.append(Choice(allowance, full_pool, 0.0, 0.0, 0.0))
    return results


def _selection_of(
    task: Task, probabilities: np.ndarray, budget: Budget, selector: SourceSearch, seed: int
) -> Selection:
    """The selection of a course that ends with these probabilities of the sources."""
    choice = source_choice(SubsetSpace(task.pool), threshold(probabilities), BernoulliPolicy(probabilities), {})
    return choice.selection(
        task.pool, method=selector.method, seed=seed, budget=budget, ledger=Ledger(), config=asdict(selector)
    )


def nested_world(world: World, count: int) -> World:
    """The world with the first `count` of its `NESTED` sources.

    Raises:
        ConfigError: if `count` is below 2 or above the number of `NESTED`, or the world has other sources.
    """
    specs = {spec.name: spec for spec in world.task.sources}
    if not 2 <= count <= len(NESTED) or set(specs) != set(NESTED):
        raise ConfigError(f"--sources {count}: between 2 and {len(NESTED)}, in a world of the sources {list(NESTED)}")
    return World(f"{world.name}-{count}", replace(world.task, sources=[specs[n] for n in NESTED[:count]]), world.train)


def cell(
    world: World, task: Task, ground_truth: Truth, label: str, passes: float, seed: int, oracle: Oracle
) -> list[Point]:
    """The sweep of one method with one seed; read from the cache if it was run before."""
    method = METHODS[label]
    key_fields: list[Any] = [SPEEDUP_VERSION, TRUTH_VERSION, world.settings(), passes, asdict(method), seed]
    key_fields += [oracle.truth_seeds, settings_of(method.selector(1.0))]
    digest = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()[:12]
    file = oracle.cache / f"{world.name}-{passes:g}-{label.replace('/', '_')}-{seed}-{digest}.json"
    if label in oracle.fresh or not file.exists():
        budget = Budget(passes, "epochs")
        record = []
        for choice in choices(method, task, budget, seed):
            values = value_of(task, choice.selection, budget, ground_truth, oracle.truth_seeds, oracle.truth_cache)
            record.append(
                {
                    "allowance": choice.allowance,
                    "cost": choice.cost,
                    "seconds": choice.seconds,
                    "cpu_seconds": choice.cpu_seconds,
                    "chosen": chosen_of(choice.selection, task),
                    "losses": values[0].tolist(),
                    "accuracy": values[1].tolist(),
                }
            )
        write_whole(file, record)
    points = []
    for row in json.loads(file.read_text()):
        regret_val, regret_acc = ground_truth.regret_of(row.pop("losses"), row.pop("accuracy"))
        points.append(
            Point(
                world=world.name,
                sources=len(task.pool.source_names),
                budget=passes,
                method=label,
                seed=seed,
                regret_val=regret_val,
                regret_acc=regret_acc,
                **row,
            )
        )
    return points


def run(
    worlds: Sequence[World],
    budgets: Sequence[float],
    labels: Sequence[str],
    seeds: int,
    oracle: Oracle,
    console: Console,
) -> list[Point]:
    """The points of all methods, seeds and budgets in these worlds."""
    points = []
    for world in worlds:
        task = world.build()
        for passes in budgets:
            ground_truth = oracle.truth(task, Budget(passes, "epochs"))
            for label in labels:
                method_points = [
                    p for seed in range(seeds) for p in cell(world, task, ground_truth, label, passes, seed, oracle)
                ]
                points += method_points
                text = "; ".join(summary_lines(method_points))
                console.print(f"{world.name}, {passes:g} passes, {label}: {text}", highlight=False, soft_wrap=True)
    return points


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise ConfigError(f"{text!r}: write numbers, separated by commas") from error


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world", type=Path, action="append", help="YAML file of a world of the first part; repeat for more"
    )
    parser.add_argument(
        "--budgets", default="1,4,16,64", help="budgets of the first part, in passes; '' to leave it out"
    )
    parser.add_argument(
        "--sources", default="3,5,8,13", help="numbers of sources of the second part; '' to leave it out"
    )
    parser.add_argument("--sources-passes", default="4", help="budget of the second part")
    parser.add_argument("--sources-world", type=Path, default=BUILT_IN / f"{NESTED_WORLD}.yaml")
    parser.add_argument("--methods", default=";".join(METHODS), help="labels, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="number of seeds of the truth")
    parser.add_argument("--bound-seconds", type=float, default=600.0, help="time to search worlds of many sources")
    parser.add_argument("--json", type=Path, required=True, help="JSON file for everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables (NAME.md) and the figure (NAME.png)")
    parser.add_argument("--cache", type=Path, default=Path("runs/speedup"), help="folder where cells are kept")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder where the truth is kept")
    parser.add_argument("--fresh", action="append", default=[], help="label of a method whose kept cells are run again")
    args = parser.parse_args(argv)
    args.world = args.world or shipped(SHORT)
    return args


def _settings(args: argparse.Namespace) -> tuple[list[str], list[float], list[int], list[float]]:
    """Labels of methods, budgets of the first part, numbers of sources and budgets of the second part.

    Raises:
        ConfigError: if a label is unknown, or a number is out of range.
    """
    labels = [label.strip() for label in args.methods.split(";")]
    if unknown := sorted(set(labels) - set(METHODS)) + sorted(set(args.fresh) - set(labels)):
        raise ConfigError(f"--methods or --fresh {unknown}: choose from {list(METHODS)}")
    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds}: at least one is needed")
    counts = [int(n) for n in _numbers(args.sources)]
    budgets, passes = ([Budget(b, "epochs").amount for b in _numbers(x)] for x in (args.budgets, args.sources_passes))
    return labels, budgets, counts, passes


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts."""
    args = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        labels, budgets, counts, passes = _settings(args)
        oracle = Oracle(args.cache, args.truth, args.truth_seeds, args.bound_seconds, args.fresh)
        worlds = [read_world(path) for path in args.world] if budgets else []
        nested = [nested_world(read_world(args.sources_world), n) for n in counts]
        by_budget = run(worlds, budgets, labels, args.seeds, oracle, console)
        by_sources = run(nested, passes, labels, args.seeds, oracle, console)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    command = f"python -m experiments.speedup {shlex.join(sys.argv[1:] if argv is None else argv)}"
    record = {
        "command": command,
        "methods": {label: asdict(METHODS[label]) for label in labels},
        "by_budget": [asdict(p) for p in by_budget],
        "by_sources": [asdict(p) for p in by_sources],
    }
    write_whole(args.json, record)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        draw(by_budget, by_sources, args.results.with_suffix(".png"))
        args.results.write_text(
            f"# What selection costs to reach a given regret\n\n    {command}\n\n{markdown(by_budget, by_sources)}"
        )
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
