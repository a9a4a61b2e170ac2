"""What the policy gradient is worth: steps on and off, against searches that take none, in worlds of many sources.

    python -m experiments.policy_gradient --out runs/policy-gradient
    python -m experiments.policy_gradient --out runs/policy-gradient --results experiments/results/policy_gradient.md

A world holds 20, 60, 150 or 280 sources, or 10,000 single examples, all drawn from the seed. The final model of every
method trains for C, on the choice and on the target as one more source. A search may spend an allowance on top; `cads`
has none, as it chooses while that model trains. Finished cells are in `OUT/cells.jsonl`, and the same command goes on
from there, seed by seed. `--results` writes the tables of the cells that are there
(`experiments.policy_gradient_report`).
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from baselines.full import Full
from baselines.halving import Halving
from baselines.search.source_search import threshold
from baselines.source import Source
from baselines.target_only import TargetOnly
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.pool import Pool
from cads.data.target_share import MAX_TARGET
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.selector import Selector
from cads.selectors.cads_e.penalty_form import PenalizedExamples
from cads.selectors.online.selector import Cads
from cads.task import Task
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.datasets import FASHION_CLASSES
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.tasks.vision.task import VisionTask
from cads.training import final
from experiments.online import Changed, without_sources
from experiments.policy_gradient_report import (
    ALLOWANCES,
    BY_POLICY,
    CHARGED,
    EXAMPLES,
    FULL,
    NO_STEPS,
    OFF,
    ONLINE,
    PREFIX,
    PROBE_ONLY,
    RIGHT,
    SOURCES,
    STEPS,
    TARGET_ONLY,
    write_report,
)
from experiments.policy_gradient_rivals import (
    SignalPrefix,
    ThompsonSampling,
    Traced,
    UnchargedSteps,
    affordable_live_penalty,
    affordable_penalty,
)

POOL, PASSES = 4800, 4.0
"""Examples in the pool of a world of sources, and passes over it that C buys."""
SINGLE, SINGLE_PASSES = 10_000, 2.0
"""The same of the world of single examples: its C is about that of the others."""
KINDS = (
    ("clean", 0.25),
    ("noise of 10 to 30 %", 0.05),
    ("noise of 50 to 90 %", 0.40),
    ("2 to 4 classes", 0.15),
    ("inverted or rotated", 0.10),
    ("each example 8 times", 0.05),
)
"""Kinds of sources, and their share of all."""
SPREAD, SMALLEST_SOURCE = 0.5, 8
"""Standard deviation of the log of the sizes of sources, and the smallest size."""
USED = 0.5
"""Share of the largest weight from which a source or example counts as chosen."""


@dataclass
class Given:
    """The examples at given positions."""

    positions: np.ndarray

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select them."""
        selected = np.zeros(len(task.pool), dtype=bool)
        selected[self.positions] = True
        return Selection.from_pool(
            task.pool, selected=selected, method="given", seed=seed, budget=budget, ledger=ledger
        )


Build = Callable[[Task, Budget, float], "Selector | Given | None"]


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: in tables.
        build: its selector, for a task, C and an allowance; None where the allowance does not buy it.
        searches: whether it has an allowance.
        then: what is made of its selection.
    """

    name: str
    build: Build
    searches: bool = False
    then: Callable[[Selection], Selection] = field(default=lambda selection: selection)


def uncharged_steps(_: Task, __: Budget, allowance: float) -> Selector:
    """`search` whose steps of the policy cost nothing."""
    return UnchargedSteps(allowance=allowance, guard=False)


def by_policy(selection: Selection) -> Selection:
    """The sources with a probability above 1/2, or the likeliest, in place of the best draw that was tried."""
    if not selection.source_probability or selection.sources is None:
        return selection
    names, p = zip(*selection.source_probability.items(), strict=True)
    mask = dict(zip(names, threshold(np.array(p)), strict=True))
    by_code = np.array([mask[name] for name in selection.sources.dictionary.to_pylist()])
    selected = by_code[selection.sources.indices.to_numpy()]
    return replace(selection, selected=selected > 0, probability=selected, weighted=False)


def source_methods(right: Sequence[str]) -> list[Method]:
    """The methods of a world of sources; `right` names those without wrong labels or shifted images."""
    return [
        Method(FULL, lambda *_: Full()),
        Method(TARGET_ONLY, lambda *_: TargetOnly()),
        Method(RIGHT, lambda *_: Source(list(right))),
        Method(ONLINE, lambda *_: Cads()),
        Method(PROBE_ONLY, lambda *_: Changed(changed={"learning_passes": 0.0})),
        Method(NO_STEPS, lambda *_: Changed(granularity="source", changed={"sharpness": 0.0})),
        Method(STEPS, uncharged_steps, searches=True),
        Method(BY_POLICY, uncharged_steps, searches=True, then=by_policy),
        Method(CHARGED, lambda _, __, a: Traced(allowance=a, guard=False), searches=True),
        Method(OFF, lambda _, __, a: Traced(allowance=a, guard=False, policy_steps=0), searches=True),
        Method(PREFIX, lambda _, __, a: SignalPrefix(allowance=a), searches=True),
        Method("thompson", lambda _, __, a: ThompsonSampling(allowance=a), searches=True),
        Method("halving", lambda _, __, a: Halving(allowance=a), searches=True),
        Method("live-penalty", affordable_live_penalty, searches=True),
        Method("cads-s-penalty", affordable_penalty, searches=True),
    ]


def example_methods(right: Callable[[], np.ndarray]) -> list[Method]:
    """The methods of the world of single examples; `right` gives the positions of the right ones."""
    return [
        Method(FULL, lambda *_: Full()),
        Method(TARGET_ONLY, lambda *_: TargetOnly()),
        Method(RIGHT, lambda *_: Given(right())),
        Method(ONLINE, lambda *_: Cads()),
        Method(NO_STEPS, lambda *_: Cads(granularity="source")),
        Method("cads-e-penalty", lambda _, __, a: PenalizedExamples(allowance=a), searches=True),
    ]


def sources_of(n_sources: int, seed: int, n_pool: int = POOL) -> list[SyntheticSource]:
    """Sources of all kinds in their shares, in random order and of random sizes that sum to about `n_pool`."""
    rng = np.random.default_rng((n_sources, seed))
    ends = np.round(np.cumsum([share for _, share in KINDS]) * n_sources).astype(int)
    kinds = rng.permutation(np.searchsorted(ends, np.arange(n_sources), side="right"))
    sizes = np.exp(SPREAD * rng.normal(size=n_sources))
    sizes = np.maximum(SMALLEST_SOURCE, np.round(sizes / sizes.sum() * n_pool)).astype(int)
    pairs = zip(kinds.tolist(), sizes.tolist(), strict=True)
    return [_source(f"s{i:03d}", kind, size, rng) for i, (kind, size) in enumerate(pairs)]


def _source(name: str, kind: int, size: int, rng: np.random.Generator) -> SyntheticSource:
    match kind:
        case 1:
            return SyntheticSource(name, size, label_noise=float(rng.uniform(0.1, 0.3)))
        case 2:
            return SyntheticSource(name, size, label_noise=float(rng.uniform(0.5, 0.9)))
        case 3:
            held = rng.choice(len(FASHION_CLASSES), size=int(rng.integers(2, 5)), replace=False)
            return SyntheticSource(name, size, classes=[FASHION_CLASSES[c] for c in held])
        case 4:
            return SyntheticSource(name, size, transform="invert" if rng.random() < 0.5 else "rotate")
        case 5:
            return SyntheticSource(name, size, duplicates=8)
        case _:
            return SyntheticSource(name, size)


def is_right(source: SyntheticSource) -> bool:
    """Whether a source has at most 30 % wrong labels, and images like those of the target."""
    return source.label_noise <= 0.3 and source.transform == "none"


SINGLE_SOURCES = (
    SyntheticSource("clean", SINGLE * 40 // 100),
    SyntheticSource("noisy", SINGLE * 30 // 100, label_noise=0.6),
    SyntheticSource("random", SINGLE * 15 // 100, label_noise=0.9),
    SyntheticSource("rotated", SINGLE * 15 // 100, transform="rotate"),
)
"""What the single examples are drawn from; no method sees it."""


def build_task(sources: Sequence[SyntheticSource], seed: int) -> VisionTask:
    """Fashion-MNIST of 14 x 14 pixels, an MLP of 128 units, 200 target examples and 5,000 to test on."""
    config = VisionConfig(
        dataset="fashion-mnist",
        image_size=14,
        hidden=128,
        n_target=200,
        n_test=5000,
        sources=list(sources),
        data_seed=seed,
    )
    return config.build(TrainConfig(batch_size=64, learning_rate=2e-3))


class Cell:
    """A world of one seed: it runs methods, and makes equal searches and trainings once.

    Args:
        name: "20" and so on, the number of sources, or `EXAMPLES`, whose sources are hidden.
        sources: that the pool is made of.
        build: makes the task, once a method needs it.
        passes: over the pool, that C buys.
    """

    def __init__(
        self, name: str, sources: Sequence[SyntheticSource], build: Callable[[], VisionTask], passes: float, seed: int
    ) -> None:
        self.name, self.seed = name, seed
        self._sources, self._build, self._budget = sources, build, Budget(passes, "epochs")
        self._selected: dict[tuple[Build, float], Selection] = {}
        self._trained: dict[bytes, dict[str, float]] = {}

    @classmethod
    def of(cls, name: str, seed: int) -> Cell:
        """The world of a name and a seed."""
        sources = SINGLE_SOURCES if name == EXAMPLES else sources_of(int(name), seed)
        passes = SINGLE_PASSES if name == EXAMPLES else PASSES
        return cls(name, sources, partial(build_task, sources, seed), passes, seed)

    @property
    def methods(self) -> list[Method]:
        """All methods of this world."""
        if self.name == EXAMPLES:
            return example_methods(lambda: np.flatnonzero(~self.wrong))
        return source_methods([source.name for source in self._sources if is_right(source)])

    @cached_property
    def _task(self) -> VisionTask:
        return self._build()

    @cached_property
    def task(self) -> Task:
        """The task as methods see it."""
        return without_sources(self._task) if self.name == EXAMPLES else self._task

    @cached_property
    def wrong(self) -> np.ndarray:
        """Whether an example has a wrong label or a shifted image, bool, shape (N,)."""
        truth = self._task.truth
        assert truth is not None
        shifted = np.array([source.transform != "none" for source in self._sources])
        return np.asarray(truth.corrupted | shifted[truth.sources])

    def run(self, method: Method, allowance: float) -> dict[str, Any]:
        """Choose and train: accuracy, loss, costs in units of C, the choice, and the share of what is wrong in it."""
        started = time.perf_counter()
        budget = self._budget
        task = _one_source(self.task) if method.name == NO_STEPS and self.name == EXAMPLES else self.task
        key = (method.build, allowance)
        if key not in self._selected:
            selector = method.build(task, budget, allowance)
            if selector is None:
                return {"error": "the allowance does not buy it"}
            self._selected[key] = selector.select(task, budget, seed=self.seed, ledger=Ledger())
        selection = method.then(self._selected[key])
        compute = selection.ledger.total(SELECT).flops
        metrics = self._train(task, selection, budget)
        weight = selection.weights
        row = {
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "select": compute / budget.flops(task),
            "train": metrics["train"] / budget.flops(task),
            "policy": _charged(selection, "policy") / budget.flops(task),
            "rungs": sum(s.startswith("short runs") and "measuring" not in s for _, s in selection.ledger.entries),
            "chosen": _chosen(self.task, weight),
            "from": [selection.notes.get(name) for name in ("later trials", "chosen")],
            "seconds": time.perf_counter() - started,
        }
        return row | ({"wrong": float(weight[self.wrong].sum())} if weight.any() else {})

    def _train(self, task: Task, selection: Selection, budget: Budget) -> dict[str, float]:
        """Train the final model on the choice, and on the target as one more source."""
        if selection.trained is None and selection.target_fraction < 1:
            weight = selection.weights
            n_kept = weight.sum() / weight.max()
            share = min(MAX_TARGET, len(task.target) / (len(task.target) + n_kept))
            selection = replace(selection, target_fraction=share)
        key = selection.weights.tobytes() + bytes([selection.weighted, selection.trained is not None])
        if key not in self._trained or selection.trained is not None:
            trained = final.train(task, selection, budget, seed=self.seed)
            self._trained[key] = {**trained.metrics, "train": trained.ledger.total(TRAIN).flops}
        return self._trained[key]


def _charged(selection: Selection, stage: str) -> float:
    """FLOPs that selection charged to a stage."""
    return sum(entry.flops for (_, name), entry in selection.ledger.entries.items() if name == stage)


def _one_source(task: Task) -> Task:
    """The same task, all examples of whose pool come from one source."""
    other, pool = copy.copy(task), task.pool
    other.pool = Pool(pool.ids, pool.examples, np.zeros(len(pool), dtype=np.int32), ["all"], name=pool.name)
    return other


def _chosen(task: Task, weight: np.ndarray) -> str:
    """Which sources or single examples have at least half of the largest weight: bits, in base 64."""
    if task.pool.sources is not None:
        weight = np.bincount(task.pool.sources, weights=weight) / task.pool.source_sizes
    chosen = (weight > 0) & (weight >= USED * weight.max() * (1 - 1e-9))
    return base64.b64encode(np.packbits(chosen).tobytes()).decode()


def cells(worlds: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """World and seed, seed by seed."""
    for seed in seeds:
        for world in worlds:
            yield world, seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells that are not there yet, or report on those that are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished cells")
    parser.add_argument("--worlds", nargs="+", default=[*SOURCES, EXAMPLES], help=f"numbers of sources, or {EXAMPLES}")
    parser.add_argument("--allowances", nargs="+", type=float, default=list(ALLOWANCES), help="in units of C")
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--results", type=Path, default=None, help="Markdown file for the tables")
    options = parser.parse_args(argv)
    if unknown := [w for w in options.worlds if w != EXAMPLES and not (w.isdecimal() and int(w) > 1)]:
        raise ConfigError(f"--worlds {unknown}: numbers of sources above 1, or {EXAMPLES}")
    path = options.out / "cells.jsonl"
    if options.results is not None:
        write_report(path, options.results)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    done = finished(path)
    with path.open("a") as file:
        for world, seed in cells(options.worlds, options.seeds):
            run_cell(Cell.of(world, seed), options, done, file)


def finished(path: Path) -> set[tuple[Any, ...]]:
    """The keys of the rows in a file; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {tuple(json.loads(line)["key"]) for line in lines}


def run_cell(cell: Cell, options: argparse.Namespace, done: set[tuple[Any, ...]], file: TextIO) -> None:
    """Run the methods of a cell that are not `done`, at each allowance."""
    for method in cell.methods:
        for allowance in options.allowances if method.searches else (0.0,):
            key = (cell.name, cell.seed, method.name, allowance)
            if key in done or (options.methods and method.name not in options.methods):
                continue
            file.write(json.dumps({"key": key, **cell.run(method, allowance)}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
