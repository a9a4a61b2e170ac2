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
from cads.runtime.trackers import Track
from cads.scoring.ranker import Ranker
from cads.study.analysis.verdicts import shown_name
from cads.task import Task

EACH = "each"
"""The value of `charge` with which every run pays for its whole selection."""
FIRST_REVISION = 1
"""The `revision` of a selector that does not name one. A higher one says that another selector had this name before:
finished cells of that one are not its own."""


@dataclass
class GridEntry:
    """A method, its options, and whether the budget covers its selection too."""

    method: str
    """Name of an installed selector."""
    label: str | None = None
    """Name in tables and figures; null: the name of the method."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the selector."""
    count_selection: bool | None = None
    """Whether the budget covers selection; null: as the grid says."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Options with several values: a method for every combination, labelled with its values. A null leaves the option
    and its label out."""

    def swept(self) -> list[GridEntry]:
        """An entry for every combination of the values in `sweep`.

        Raises:
            ConfigError: if an option has no values, or is among `options` too.
        """
        for name, values in self.sweep.items():
            if not values or name in self.options:
                reason = "among its options too" if values else "empty"
                raise ConfigError(f"{self.label or self.method}: {name} in sweep is {reason}")
        entries = []
        for combination in itertools.product(*self.sweep.values()):
            given = {name: x for name, x in zip(self.sweep, combination, strict=True) if x is not None}
            label = ", ".join([self.label or self.method, *(f"{name} {x}" for name, x in given.items())])
            entries.append(
                GridEntry(self.method, label if given else self.label, self.options | given, self.count_selection)
            )
        return entries


@dataclass
class Variant:
    """A size of the model: the fields of the task and of the recipe that it changes."""

    label: str
    """Name in tables and figures."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task that differ."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ."""


@dataclass
class TaskEntry:
    """One of several tasks. Fields that it leaves out are those of the grid."""

    label: str
    """Name in tables and figures."""
    kind: str | None = None
    """Kind of task; null: the grid's. With the grid's kind, the grid's `task` and `train` hold here too."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe."""


@dataclass
class Grid:
    """All runs of a comparison: every method at every budget with every seed, on every task at every model size."""

    methods: list[GridEntry]
    """Names, or entries with options."""
    budgets: list[str]
    """FLOPs, usages, epochs or tokens."""
    seeds: int = 3
    """Number of seeds: 0, 1, ... Each seed draws its own data too."""
    kind: str = "vision"
    """Kind of task."""
    task: dict[str, Any] = field(default_factory=dict)
    """Fields of the task."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the training recipe."""
    models: list[Variant] = field(default_factory=lambda: [Variant("")])
    """Sizes of the model. The default, with an empty label, is the task's own."""
    tasks: list[TaskEntry] = field(default_factory=list)
    """Several tasks; empty: the one that `kind`, `task` and `train` describe."""
    count_selection: bool = True
    """Budgets cover selection and training (equal total FLOPs), or training alone."""
    charge: str = EACH
    """`each`: every run pays for its selection; `amortised: T`: T tasks share the cost of each ranking (a search
    serves one training alone, which pays for all of it)."""
    metric: str | None = None
    """The metric of the test set that is compared; null: accuracy, or else the task's own."""
    evaluations: list[str] = field(default_factory=list)
    """Further evaluations of each trained model, as those of `cads train --eval`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often a cell that is under way writes a checkpoint to resume from; it changes no result."""
    track: Track = "tensorboard"
    """Where the curves of each cell are kept, one or a list: tensorboard, wandb, mlflow; null: nowhere."""

    def __post_init__(self) -> None:
        self.methods = [entry for swept in self.methods for entry in swept.swept()]

    def name(self, entry: GridEntry) -> str:
        """The name of a method in tables and figures."""
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
    """One task at one model size with one seed, shared by all methods and budgets."""

    task: str
    model: str
    seed: int
    kind: str
    config: TaskConfig
    train: TrainConfig

    def build(self) -> Task:
        """Load the data and build the task."""
        return self.config.build(self.train)

    def describe(self) -> dict[str, Any]:
        """Everything that results depend on, except the data, the method and the budget."""
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
        """The name of the cell: readable, with a hash at its end of everything that its result depends on.

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
        if (revision := getattr(selector_class(self.entry.method), "revision", FIRST_REVISION)) != FIRST_REVISION:
            parts["revision"] = revision
        if self.evaluations:
            parts["evaluations"] = self.evaluations
        labels = [self.setting.task, self.setting.model, self.label, str(self.budget), str(self.setting.seed)]
        return f"{readable('-'.join(filter(None, labels)))}-{content_key(parts)}"


def content_key(parts: object) -> str:
    """A short hash of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def readable(name: str) -> str:
    """`name` as part of a file name, on any system."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:80]


def read_grid(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Grid:
    """The grid in a YAML file.

    Args:
        overrides: fields that win over those of the file; those of `task`, `train` and `checkpoint` one by one.

    Raises:
        ConfigError: if it cannot be read; if a key, value, method, option or budget is unknown or refused; or if
            two of its cells are equal.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if isinstance(content, dict):
        for name, value in (overrides or {}).items():
            is_section = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if is_section else value
    if not isinstance(content, dict) or not isinstance(content.get("methods"), list):
        raise ConfigError(
            f"{path} must map names to values, `methods` to a list of methods among them: `cads init --template grid` "
            "writes such a file"
        )
    content["methods"] = [{"method": m} if isinstance(m, str) else m for m in content["methods"]]
    if isinstance(content.get("budgets"), list):
        content["budgets"] = [str(b) for b in content["budgets"]]
    if isinstance(charge := content.get("charge"), dict) and len(charge) == 1:
        content["charge"] = "".join(f"{rule}: {n_tasks}" for rule, n_tasks in charge.items())
    grid: Grid = filled(Grid, content, f"{path} cannot be used")
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Refuse an invalid grid before data is loaded or compute is spent.

    Raises:
        ConfigError: naming the entry that is unknown, empty or given twice.
    """
    for name in ("methods", "budgets", "models"):
        if not getattr(grid, name):
            raise ConfigError(f"{name} is empty: give at least one")
    if grid.seeds < 1:
        raise ConfigError(f"seeds = {grid.seeds}: run at least one")
    budgets = [str(Budget.parse(text)) for text in grid.budgets]
    _refuse_twice("budget", grid.budgets, budgets)
    names = [grid.name(e) for e in grid.methods]
    _refuse_twice("method", names, [shown_name(name) for name in names])
    selectors: list[Any] = [build_selector(e.method, e.options) for e in grid.methods]
    keys = [content_key([e.method, asdict(s), _counted(grid, e)]) for e, s in zip(grid.methods, selectors, strict=True)]
    _refuse_twice("method", names, keys)
    for entry_kind, labels in (("model", [m.label for m in grid.models]), ("task", [t.label for t in grid.tasks])):
        _refuse_twice(entry_kind, labels, labels)
    first_seed = [setting for setting in settings(grid) if setting.seed == 0]
    labels = [" ".join(filter(None, [s.task, s.model])) for s in first_seed]
    _refuse_twice("setting", labels, [content_key(s.describe()) for s in first_seed])
    cells(grid, first_seed[0])


def settings(grid: Grid) -> Iterator[Setting]:
    """Every task, model size and seed, each with its checked task configuration and recipe.

    Raises:
        ConfigError: if a field of a task or recipe is unknown, or its value is refused.
    """
    for task, model, seed in itertools.product(grid.tasks or [TaskEntry("")], grid.models, range(grid.seeds)):
        kind = task.kind or grid.kind
        inherited = (grid.task, grid.train) if task.kind in (None, grid.kind) else ({}, {})
        context = " ".join(filter(None, [f"task {task.label!r}" * bool(task.label), f"model {model.label!r}"]))
        config = filled(task_config_class(kind), {**inherited[0], **task.task, **model.task}, f"{context}: task")
        train = filled(TrainConfig, {**inherited[1], **task.train, **model.train}, f"{context}: train")
        if "data_seed" in {f.name for f in fields(config)}:
            config = replace(config, data_seed=config.data_seed + seed)
        yield Setting(task.label, model.label, seed, kind, config, train)


def cells(grid: Grid, setting: Setting) -> list[Cell]:
    """Every budget and method in one setting."""
    result = []
    for text, entry in itertools.product(grid.budgets, grid.methods):
        budget = Budget.parse(text, count_selection=_counted(grid, entry))
        sharing = grid.sharing if issubclass(selector_class(entry.method), Ranker) else 1.0
        result.append(Cell(setting, grid.name(entry), entry, budget, sharing, tuple(grid.evaluations)))
    return result


def _counted(grid: Grid, entry: GridEntry) -> bool:
    """Whether the budget of an entry covers its selection."""
    return grid.count_selection if entry.count_selection is None else entry.count_selection


def _refuse_twice(entry_kind: str, names: list[str], keys: list[str]) -> None:
    """Refuse entries with equal keys, under their names.

    Raises:
        ConfigError: naming both entries.
    """
    seen: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        if key in seen:
            raise ConfigError(
                f"{entry_kind} {seen[key]!r} and {entry_kind} {name!r} are the same cells: drop one, or label it"
            )
        seen[key] = name


def filled(cls: Any, values: Mapping[str, Any], context: str) -> Any:
    """An instance of a dataclass from plain values; unknown names are errors.

    Args:
        context: start of the error message.

    Raises:
        ConfigError: naming the unknown names, or the value that is refused.
    """
    names = [f.name for f in fields(cls)]
    if unknown := sorted(map(str, set(values) - set(names))):
        raise ConfigError(f"{context}: {unknown} are unknown: choose from {names}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    try:
        # Parsing writes into its argument.
        return cls(**vars(parser.instantiate(parser.parse_object(copy.deepcopy(dict(values))))))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{context}: {error}") from error
