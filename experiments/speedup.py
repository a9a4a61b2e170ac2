"""What selection costs to reach a given regret: CADS-S against bilevel methods, by budget and by number of sources.

    python -m experiments.speedup --budgets 1,4,16,64 --sources 3,5,8,13 --seeds 3 --json runs/speedup.json \
        [--results experiments/results/speedup.md]

Every method is given a sweep of allowances in worlds whose truth is known. The first part runs the worlds at each
budget; the second takes more and more sources of one world, at one budget. Finished cells are kept under --cache:
the same command goes on where it was, and one that names several worlds reads what was run for each.
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

from baselines.bilevel import Bilevel
from baselines.search.source_search import SourceSearch, kept
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CadsError, ConfigError
from cads.monitor import Monitor
from cads.policies.bernoulli import BernoulliPolicy
from cads.registry import build_selector
from cads.search.source_selection import source_selection
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
"""Part of every cell's key: raise it when what a cell holds changes its meaning."""
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
"""Sources of the second part: each number of sources takes the first so many, good and bad ones from the start."""
GRID = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.75, 4.0, 5.5, 8.0, 11.0, 16.5, 22.0, 27.5, 33.0)
"""Allowances at which a course of outer steps is looked at, in units of C; five runs for C, measured, take 5.5."""


@dataclass(frozen=True)
class Method:
    """A selector and its sweep.

    Attributes:
        name: of the selector. options: of it. allowances: in units of C.
        course: whether it goes from outer step to outer step, all alike: then the run with the largest allowance
            holds those with smaller ones.
    """

    name: str
    allowances: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    course: bool = False

    def selector(self, allowance: float) -> Selector:
        """With that allowance."""
        options = {**self.options, "allowance": allowance}
        return Unrolled(**options) if self.name == Unrolled.method else build_selector(self.name, options)


def _up_to(most: float) -> tuple[float, ...]:
    return tuple(a for a in GRID if a <= most)


METHODS = {
    "cads-s": Method("cads-s", (0.35, 0.7, 1.4, 2.75, 5.5)),
    "bilevel": Method("bilevel", _up_to(33), course=True),
    "bilevel, C/8": Method("bilevel", _up_to(8), {"share": 1 / 8}, course=True),
    "unrolled": Method("unrolled", _up_to(11), course=True),
    "unrolled, C/4": Method("unrolled", _up_to(5.5), {"share": 1 / 4}, course=True),
    "unrolled, C/4, rate 0.03": Method("unrolled", _up_to(5.5), {"share": 1 / 4, "rate": 0.03}, course=True),
    "unrolled, C/4, rate 0.3": Method("unrolled", _up_to(5.5), {"share": 1 / 4, "rate": 0.3}, course=True),
}
"""By label: what the tables call it. The first is what the others are measured against. Whether another rate of the
inner SGD would serve `unrolled` better is asked where its runs are cheap."""


class Steps(Monitor):
    """Remembers the probabilities of the sources after each outer step, and when that was.

    Attributes:
        seen: probabilities (S,), wall-clock seconds and seconds of CPU time since the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[np.ndarray, float, float]] = []
        self._start = time.perf_counter(), time.process_time()

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """Remember them."""
        wall, cpu = self._start
        self.seen.append((np.array(values), time.perf_counter() - wall, time.process_time() - cpu))


@dataclass(frozen=True)
class Choice:
    """What an allowance came to: the selection, its cost in units of C, seconds by the wall and of CPU time."""

    allowance: float
    selection: Selection
    cost: float
    seconds: float
    cpu_seconds: float


def choices(method: Method, task: Task, budget: Budget, seed: int) -> list[Choice]:
    """What each allowance of the sweep buys."""
    if method.course:
        return _course(method, task, budget, seed)
    made = []
    for allowance in method.allowances:
        ledger, clock = Ledger(), Steps()
        selection = method.selector(allowance).select(task, budget, seed=seed, ledger=ledger, monitor=clock)
        clock.probabilities((), np.empty(0), 0)
        cost = ledger.total(SELECT).flops / budget.flops(task)
        made.append(Choice(allowance, selection, cost, *clock.seen[-1][1:]))
    return made


def _course(method: Method, task: Task, budget: Budget, seed: int) -> list[Choice]:
    """One run with the largest allowance; a smaller one ends at the last outer step that it buys."""
    selector = method.selector(max(method.allowances))
    assert isinstance(selector, Bilevel | Unrolled)
    ledger, steps = Ledger(), Steps()
    selector.select(task, budget, seed=seed, ledger=ledger, monitor=steps)
    each = ledger.total(SELECT).flops / budget.flops(task) / max(1, len(steps.seen))
    made = []
    for allowance in method.allowances:
        count = min(len(steps.seen), int(allowance / each * (1 + 1e-9))) if steps.seen else 0
        if count:
            probabilities, seconds, cpu_seconds = steps.seen[count - 1]
            selection = _kept_selection(task, probabilities, budget, selector, seed)
            made.append(Choice(allowance, selection, count * each, seconds, cpu_seconds))
        else:
            full = full_pool_selection(task, budget, method=selector.method, seed=seed, ledger=Ledger(), notes={})
            made.append(Choice(allowance, full, 0.0, 0.0, 0.0))
    return made


def _kept_selection(
    task: Task, probabilities: np.ndarray, budget: Budget, selector: SourceSearch, seed: int
) -> Selection:
    """The sources that a course would end with here."""
    return source_selection(
        task,
        SubsetSpace(task.pool),
        kept(probabilities),
        BernoulliPolicy(probabilities),
        budget=budget,
        method=selector.method,
        seed=seed,
        ledger=Ledger(),
        config=asdict(selector),
        notes={},
    )


def nested_world(world: World, count: int) -> World:
    """The world with the first `count` of its `NESTED` sources.

    Raises:
        ConfigError: if there are not so many, or the world has others.
    """
    specs = {spec.name: spec for spec in world.task.sources}
    if not 2 <= count <= len(NESTED) or set(specs) != set(NESTED):
        raise ConfigError(f"--sources {count}: between 2 and {len(NESTED)}, in a world of the sources {list(NESTED)}")
    return World(f"{world.name}-{count}", replace(world.task, sources=[specs[n] for n in NESTED[:count]]), world.train)


def cell(world: World, task: Task, known: Truth, label: str, passes: float, seed: int, oracle: Oracle) -> list[Point]:
    """The sweep of one method; read from the cache if it was done before."""
    method = METHODS[label]
    about: list[Any] = [SPEEDUP_VERSION, TRUTH_VERSION, world.settings(), passes, asdict(method), seed]
    about += [oracle.truth_seeds, settings_of(method.selector(1.0))]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    file = oracle.cache / f"{world.name}-{passes:g}-{label.replace('/', '_')}-{seed}-{digest}.json"
    if label in oracle.fresh or not file.exists():
        budget = Budget(passes, "epochs")
        record = []
        for choice in choices(method, task, budget, seed):
            measured = value_of(task, choice.selection, budget, known, oracle.truth_seeds, oracle.truth_cache)
            record.append(
                {
                    "allowance": choice.allowance,
                    "cost": choice.cost,
                    "seconds": choice.seconds,
                    "cpu_seconds": choice.cpu_seconds,
                    "chosen": chosen_of(choice.selection, task),
                    "losses": measured[0].tolist(),
                    "accuracy": measured[1].tolist(),
                }
            )
        write_whole(file, record)
    points = []
    for row in json.loads(file.read_text()):
        regret_val, regret_acc = known.regret_of(row.pop("losses"), row.pop("accuracy"))
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
    """All cells of some worlds."""
    points = []
    for world in worlds:
        task = world.build()
        for passes in budgets:
            known = oracle.truth(task, Budget(passes, "epochs"))
            for label in labels:
                here = [p for seed in range(seeds) for p in cell(world, task, known, label, passes, seed, oracle)]
                points += here
                text = "; ".join(summary_lines(here))
                console.print(f"{world.name}, {passes:g} passes, {label}: {text}", highlight=False, soft_wrap=True)
    return points


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise ConfigError(f"{text!r}: write numbers, separated by commas") from error


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, action="append", help="of the first part; again for more")
    parser.add_argument("--budgets", default="1,4,16,64", help="of the first part, in passes; '' to leave it out")
    parser.add_argument("--sources", default="3,5,8,13", help="of the second part; '' to leave it out")
    parser.add_argument("--sources-passes", default="4", help="budget of the second part")
    parser.add_argument("--sources-world", type=Path, default=BUILT_IN / f"{NESTED_WORLD}.yaml")
    parser.add_argument("--methods", default=";".join(METHODS), help="labels, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3, help="of the selectors")
    parser.add_argument("--truth-seeds", type=int, default=5, help="of the truth")
    parser.add_argument("--bound-seconds", type=float, default=600.0, help="to search worlds of many sources")
    parser.add_argument("--json", type=Path, required=True, help="everything that was measured")
    parser.add_argument("--results", type=Path, help="also write the tables (NAME.md) and the figure (NAME.png)")
    parser.add_argument("--cache", type=Path, default=Path("runs/speedup"), help="folder of the cells")
    parser.add_argument("--truth", type=Path, default=Path("runs/truth"), help="folder of the truth")
    parser.add_argument("--fresh", action="append", default=[], help="a label whose kept cells are run again")
    given = parser.parse_args(argv)
    given.world = given.world or shipped(SHORT)
    return given


def _settings(given: argparse.Namespace) -> tuple[list[str], list[float], list[int], list[float]]:
    """Labels, budgets, numbers of sources, and the budget of those.

    Raises:
        ConfigError: if one of them makes no sense.
    """
    labels = [label.strip() for label in given.methods.split(";")]
    if stray := sorted(set(labels) - set(METHODS)) + sorted(set(given.fresh) - set(labels)):
        raise ConfigError(f"--methods or --fresh {stray}: choose from {list(METHODS)}")
    if given.seeds < 1:
        raise ConfigError(f"--seeds {given.seeds}: at least one is needed")
    counts = [int(n) for n in _numbers(given.sources)]
    budgets, passes = ([Budget(b, "epochs").amount for b in _numbers(x)] for x in (given.budgets, given.sources_passes))
    return labels, budgets, counts, passes


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts."""
    given = _arguments(argv)
    console = Console()
    started = time.perf_counter()
    try:
        labels, budgets, counts, passes = _settings(given)
        oracle = Oracle(given.cache, given.truth, given.truth_seeds, given.bound_seconds, given.fresh)
        worlds = [read_world(path) for path in given.world] if budgets else []
        nested = [nested_world(read_world(given.sources_world), n) for n in counts]
        by_budget = run(worlds, budgets, labels, given.seeds, oracle, console)
        by_sources = run(nested, passes, labels, given.seeds, oracle, console)
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
    write_whole(given.json, record)
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        draw(by_budget, by_sources, given.results.with_suffix(".png"))
        given.results.write_text(
            f"# What selection costs to reach a given regret\n\n    {command}\n\n{markdown(by_budget, by_sources)}"
        )
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
