"""Selectors and tasks by name, through entry points, so that any package can add some."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.selector import Selector
from cads.task import Task

SELECTORS, TASKS = "cads.selectors", "cads.tasks"


class TaskConfig(Protocol):
    """A dataclass that describes a task and builds it."""

    def build(self, recipe: TrainConfig) -> Task:
        """Load the data and make the task."""
        ...

    def meta(self, recipe: TrainConfig) -> Task:
        """The task with shapes in place of examples and weights, which suffice to compute all costs."""
        ...


@cache
def names(group: str) -> tuple[str, ...]:
    """The installed names of an entry-point group, sorted."""
    return tuple(sorted({e.name for e in entry_points(group=group)}))


def _load(group: str, kind: str, name: str) -> Any:
    if not isinstance(name, str):
        raise ConfigError(f"{kind} = {name!r}: it must be a name. Installed: {', '.join(names(group))}")
    matches: list[EntryPoint] = list(entry_points(group=group, name=name))
    if not matches:
        close_names = difflib.get_close_matches(name, names(group), n=1)
        hint = f"; did you mean {close_names[0]!r}?" if close_names else "."
        raise ConfigError(f"{kind} {name!r} is unknown{hint} Installed: {', '.join(names(group))}")
    return matches[0].load()


def selector_class(name: str) -> type[Selector]:
    """The selector class called `name`.

    Raises:
        ConfigError: if none is installed under this name.
    """
    loaded: type[Selector] = _load(SELECTORS, "method", name)
    return loaded


def task_config_class(name: str) -> type[TaskConfig]:
    """The configuration class of the kind of task called `name`.

    Raises:
        ConfigError: if none is installed under this name.
    """
    loaded: type[TaskConfig] = _load(TASKS, "kind of task", name)
    return loaded


def build_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector called `name` with `options`.

    Raises:
        ConfigError: if the name or an option is unknown, an option is missing, its value is refused, or the
            installed selector is no dataclass.
    """
    installed = selector_class(name)
    if not (isinstance(installed, type) and is_dataclass(installed)):
        raise ConfigError(
            f"method {name!r} is installed as {installed!r}, which is no dataclass: its package must name one, and its "
            "fields are the options"
        )
    dataclass_type: Any = installed
    option_names = {f.name for f in fields(dataclass_type)}
    if not isinstance(options, Mapping | None):
        raise ConfigError(f"options {options!r} of method {name!r} must map names to values")
    options = dict(options or {})
    unknown = sorted(map(str, set(options) - option_names))
    if unknown:
        raise ConfigError(f"options {unknown} of method {name!r} are unknown: it has {sorted(option_names)}")
    missing = [
        f.name for f in fields(dataclass_type) if f.default is f.default_factory is MISSING and f.name not in options
    ]
    if missing:
        raise ConfigError(f"method {name!r} cannot be made without options {missing}: give --options.{missing[0]}")
    try:
        built: Selector = dataclass_type(**options)
    except TypeError as error:
        raise ConfigError(f"method {name!r} cannot be made: {error}") from error
    return built
