"""The grid of a comparison: methods x budgets x seeds x model sizes x tasks, read from one file and checked."""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from cads.accounting.budget import Budget
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.registry import TaskConfig, build_selector, selector_class, task_config_class
from cads.runtime.checkpoint import CheckpointConfig
from cads.scoring.ranker import Ranker
from cads.task import Task

EACH = "each"
"""The rule by which every run pays for its whole selection."""


@dataclass
class GridEntry:
    """A method, its options, and whether the budget covers its selection too."""

    method: str
    """Name of an installed selector."""
    label: str | None = None
    """What tables and figures call it; null: the name of the method."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the selector."""
    count_selection: bool | None = None
    """Whether the budget covers selection; null: as the grid says."""


@dataclass
class Variant:
    """A size of the model: what it changes in the task and in the recipe."""

    label: str
    """What tables and figures call it."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task that differ."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ."""


@dataclass
class TaskEntry:
    """One of several tasks; what it leaves out is taken from the grid."""

    label: str
    """What tables and figures call it."""
    kind: str | None = None
    """Kind of task; null: the grid's, whose `task` and `train` then hold here too."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe."""


@dataclass
class Grid:
    """What is run: every method at every budget with every seed, on every task at every size."""

    methods: list[GridEntry]
    """Names, or entries with options."""
    budgets: list[str]
    """FLOPs, usages, epochs or tokens."""
    seeds: int = 3
    """Seeds 0, 1, ...; each draws its own data, too."""
    kind: str = "vision"
    """Kind of task."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the training recipe."""
    models: list[Variant] = field(default_factory=lambda: [Variant("")])
    """Sizes of the model; empty label: the task's own."""
    tasks: list[TaskEntry] = field(default_factory=list)
    """Several tasks; empty: the one that `kind`, `task` and `train` describe."""
    count_selection: bool = True
    """Budgets cover selection and training (equal total FLOPs), or training alone."""
    charge: str = EACH
    """`each`: every run pays for its selection; `amortised: T`: T tasks share each ranking (a search serves one
    training alone, and is paid for whole)."""
    metric: str | None = None
    """The metric of the test set that is compared; null: accuracy, or else the task's own."""
    evaluations: list[str] = field(default_factory=list)
    """Further evaluations of each trained model, as those of `cads train --eval`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often what is under way is written down, to go on from; it changes no result."""

    def name(self, entry: GridEntry) -> str:
        """How a method is called in tables and figures."""
        if entry.label:
            return entry.label
        if entry.count_selection in (None, self.count_selection):
            return entry.method
        return f"{entry.method}, {'all in' if entry.count_selection else 'on top'}"

    @property
    def sharing(self) -> float:
        """Number of tasks that share the cost of one ranking.

        Raises:
            ConfigError: if `charge` is no rule.
        """
        if self.charge == EACH:
            return 1.0
        match = re.fullmatch(r"amortised:\s*([0-9.eE+]+)", self.charge)
        try:
            shared = float(match[1]) if match else 0.0
        except ValueError:
            shared = 0.0
        if not 1 <= shared < math.inf:
            raise ConfigError(f"charge = {self.charge!r}: write 'each', or 'amortised: T' with T >= 1 tasks")
        return shared


@dataclass(frozen=True)
class Setting:
    """What all methods and budgets share: one task at one model size with one seed."""

    task: str
    model: str
    seed: int
    kind: str
    config: TaskConfig
    train: TrainConfig

    def build(self) -> Task:
        """Load the data and make the task."""
        return self.config.build(self.train)

    def describe(self) -> dict[str, Any]:
        """All that the results depend on, besides the data, the method and the budget."""
        config: Any = self.config
        task = config.result_fields() if hasattr(config, "result_fields") else asdict(config)
        return {"kind": self.kind, "task": task, "train": self.train.result_fields(), "seed": self.seed}


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a method with one budget in one setting."""

    setting: Setting
    label: str
    entry: GridEntry
    budget: Budget
    sharing: float
    evaluations: tuple[str, ...] = ()

    def key(self, contents: Mapping[str, str], version: str) -> str:
        """The name of the cell: readable, and ending in a hash of all that its result depends on.

        Args:
            contents: content hashes of pool, target and test. version: of the package.
        """
        parts = {
            **self.setting.describe(),
            "method": self.entry.method,
            "options": self.entry.options,
            "budget": asdict(self.budget),
            "sharing": self.sharing,
            "contents": dict(contents),
            "version": version,
        }
        if self.evaluations:
            parts["evaluations"] = self.evaluations
        where = [self.setting.task, self.setting.model, self.label, str(self.budget), str(self.setting.seed)]
        return f"{readable('-'.join(filter(None, where)))}-{content_key(parts)}"


def content_key(parts: object) -> str:
    """A short hash of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def readable(name: str) -> str:
    """`name` as part of a file name, on any system."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:80]


def read_grid(path: Path | str) -> Grid:
    """The grid in a YAML file.

    Raises:
        ConfigError: if it cannot be read; if a key, value, method, option or budget is unknown or refused; or if
            two of its cells are the same.
    """
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("methods"), list):
        raise ConfigError(f"{path} must map names to values, `methods` to a list of methods among them")
    given["methods"] = [{"method": m} if isinstance(m, str) else m for m in given["methods"]]
    if isinstance(given.get("budgets"), list):
        given["budgets"] = [str(b) for b in given["budgets"]]
    if isinstance(charge := given.get("charge"), dict) and len(charge) == 1:
        given["charge"] = "".join(f"{rule}: {n_tasks}" for rule, n_tasks in charge.items())
    grid: Grid = filled(Grid, given, f"{path} cannot be used")
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Refuse a grid before anything is loaded or spent.

    Raises:
        ConfigError: naming what is unknown, empty or given twice.
    """
    for name in ("methods", "budgets", "models"):
        if not getattr(grid, name):
            raise ConfigError(f"{name} is empty: give at least one")
    if grid.seeds < 1:
        raise ConfigError(f"seeds = {grid.seeds}: run at least one")
    budgets = [str(Budget.parse(text)) for text in grid.budgets]
    _refuse_twice("budget", grid.budgets, budgets)
    names = [grid.name(e) for e in grid.methods]
    _refuse_twice("method", names, names)
    selectors: list[Any] = [build_selector(e.method, e.options) for e in grid.methods]
    same = [content_key([e.method, asdict(s), _counted(grid, e)]) for e, s in zip(grid.methods, selectors, strict=True)]
    _refuse_twice("method", names, same)
    for what, labels in (("model", [m.label for m in grid.models]), ("task", [t.label for t in grid.tasks])):
        _refuse_twice(what, labels, labels)
    first = [setting for setting in settings(grid) if setting.seed == 0]
    places = [" ".join(filter(None, [s.task, s.model])) for s in first]
    _refuse_twice("setting", places, [content_key(s.describe()) for s in first])
    cells(grid, first[0])


def settings(grid: Grid) -> Iterator[Setting]:
    """Every task, size and seed, with the configurations filled and checked.

    Raises:
        ConfigError: if a field of a task or recipe is unknown, or its value is refused.
    """
    for task, model, seed in itertools.product(grid.tasks or [TaskEntry("")], grid.models, range(grid.seeds)):
        kind = task.kind or grid.kind
        inherited = (grid.task, grid.train) if task.kind in (None, grid.kind) else ({}, {})
        where = " ".join(filter(None, [f"task {task.label!r}" * bool(task.label), f"model {model.label!r}"]))
        config = filled(task_config_class(kind), {**inherited[0], **task.task, **model.task}, f"{where}: task")
        train = filled(TrainConfig, {**inherited[1], **task.train, **model.train}, f"{where}: train")
        if "data_seed" in {f.name for f in fields(config)}:
            config = replace(config, data_seed=config.data_seed + seed)
        yield Setting(task.label, model.label, seed, kind, config, train)


def cells(grid: Grid, setting: Setting) -> list[Cell]:
    """Every budget and method in one setting."""
    made = []
    for budget, entry in itertools.product(grid.budgets, grid.methods):
        counted = Budget.parse(budget, count_selection=_counted(grid, entry))
        sharing = grid.sharing if issubclass(selector_class(entry.method), Ranker) else 1.0
        made.append(Cell(setting, grid.name(entry), entry, counted, sharing, tuple(grid.evaluations)))
    return made


def _counted(grid: Grid, entry: GridEntry) -> bool:
    return grid.count_selection if entry.count_selection is None else entry.count_selection


def _refuse_twice(what: str, names: list[str], keys: list[str]) -> None:
    seen: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        if key in seen:
            raise ConfigError(f"{what} {seen[key]!r} and {what} {name!r} are the same cells: drop one, or label it")
        seen[key] = name


def filled(cls: Any, given: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain values; unknown names are errors."""
    known = [f.name for f in fields(cls)]
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ConfigError(f"{where}: {unknown} are unknown: choose from {known}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    try:
        # Parsing writes into what it is given.
        return cls(**vars(parser.instantiate(parser.parse_object(copy.deepcopy(dict(given))))))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
