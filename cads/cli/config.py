"""A command's configuration: one YAML file and flags fill dataclasses. One parser for all commands.

The settings depend on the kind of task and on the method. So these two are read first, from file and flags. Then the
parser for them reads all settings.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from cads.accounting.budget import Budget
from cads.api import DEFAULT_METHOD
from cads.cli.data_flags import add_data_flags, names_of_data, near_name, task_of_flags
from cads.cli.parser import KINDS, CommandParser
from cads.cli.settings import CommandSettings, ExportSettings, InitSettings, ReportSettings, SelectSettings
from cads.errors import ConfigError
from cads.launch.launcher import LaunchSettings
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, TASKS, build_selector, names, selector_class, task_config_class
from cads.runtime.checkpoint import CheckpointConfig
from cads.study.grid import Grid, GridEntry

log = logging.getLogger(__name__)

DEFAULT_KIND = "vision"
WRITTEN = "cads.yaml"
"""What `cads init` writes by default."""
SECTIONS = ("task", "train", "options", "selectors", "checkpoint")
"""The parts of a configuration file that are mappings themselves."""


@dataclass
class CommandConfig:
    """The parsed configuration of a command.

    Attributes:
        values: all settings, as they were parsed.
        name: of the run, after the configuration file, or the files of the pool, and the method; the name of its
            folder by default.
        parser: reads and writes them.
        objects: the dataclasses that they describe: `task`, `train`, `options` (the selector), `checkpoint`.
    """

    values: Namespace
    name: str
    parser: ArgumentParser
    objects: Namespace

    def dump(self, values: Namespace | None = None) -> str:
        """All settings as YAML, which replays the command."""
        return cast(str, self.parser.dump(self.values if values is None else values, skip_unset=False))


@dataclass
class _Words:
    """A command line, split before its settings are parsed."""

    files: list[str]
    kind: str | None
    method: str | None
    data: dict[str, Any]
    flags: list[str]
    tensorboard: str | None = None


def read(settings: type[CommandSettings], argv: list[str]) -> CommandConfig:
    """The configuration of a command, from its file (the first argument, or --config) and its flags.

    Raises:
        ConfigError: if a file cannot be read, or names a kind, method or option that is unknown.
        BudgetError: if the budget is none.
        SystemExit: with a message, if a key or value is refused.
    """
    words = _split(settings.command, ["--merge=true" if word == "--merge" else word for word in _joined(argv)])
    settings_read: dict[str, Any] = {}
    for path in words.files:
        settings_read.update(load_yaml(path))
    if settings.command == "check":
        settings_read = _task_of_grid(settings_read)
    elif "budgets" in settings_read:
        raise ConfigError(f"{words.files[-1]} is the file of a grid: `cads compare {words.files[-1]}` runs it")
    _read_old_names(settings_read, words)
    words.kind = words.kind or words.data.pop("kind", None)
    if words.data:
        settings_read["task"] = {**(settings_read.get("task") or {}), **words.data}
    kind = words.kind or settings_read.get("kind", DEFAULT_KIND)
    method = words.method or settings_read.get("method", DEFAULT_METHOD)
    selector_class(method)
    selectors = settings_read.pop("selectors", {})
    for name, options in selectors.items():
        build_selector(name, options)
    if settings.command == "plan" and selectors:
        settings_read["selectors"] = selectors
    options = dict(selectors.get(method) or {})
    if settings_read.get("method", method) == method:
        options.update(settings_read.get("options", {}))
    settings_read = {**settings_read, "kind": kind, "method": method, "options": options}
    _drop_overridden(settings_read, words.flags)
    parser = command_parser(settings, kind, method)
    is_default = set(settings_read) == {"kind", "method", "options"} and not options
    values = parser.parse_args([*([] if is_default else ["--config", yaml.safe_dump(settings_read)]), *words.flags])
    Budget.parse(values.budget)
    for name in ("seed", "validation_points"):
        if values[name] < 0:
            raise ConfigError(f"{name} = {values[name]}: it must be >= 0")
    if not (words.files or words.data or any(word.startswith(("--task", "--kind")) for word in argv)):
        beside = f"; `cads {settings.command} {WRITTEN}` takes the file here" if Path(WRITTEN).exists() else ""
        log.warning("no data is named (a configuration, or --pool): the digits of scikit-learn are used%s", beside)
    of_data = [Path(path).stem for path in words.files[-1:]] or names_of_data(words.data)
    named = [*of_data, *([method] if method != DEFAULT_METHOD else [])]
    return CommandConfig(values, "-".join(named) or method, parser, parser.instantiate(values))


def _task_of_grid(settings_read: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that only a grid has: its data is that of its task."""
    further = [name for name in ("tasks", "models") if settings_read.get(name)]
    if further:
        log.warning("of a grid the data of `task` is looked at, and not what %s change", " and ".join(further))
    own = {field.name for field in fields(Grid)} - {"kind", "task", "train", "checkpoint"}
    return {name: value for name, value in settings_read.items() if name not in own}


def command_parser(settings: type[CommandSettings], kind: str, method: str) -> ArgumentParser:
    """The parser of a command for one kind of task and one method."""
    parser = _parser(settings.command, "[CONFIG] [--pool PATH ... --target PATH] [flags]", settings.description)
    parser.epilog = (
        f"The fields of task are those of kind {kind}, and the options those of method {method}. For others: "
        f"`cads {settings.command} --kind KIND --method NAME --help`. Kinds: {', '.join(names(TASKS))}. "
        f"Methods: {', '.join(names(SELECTORS))}."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it win")
    add_data_flags(parser)
    parser.add_argument("--kind", default=kind, help=f"kind of task: {', '.join(names(TASKS))}")
    parser.add_argument("--method", default=method, help=f"selector: {', '.join(names(SELECTORS))}")
    parser.add_class_arguments(settings, None)
    if settings is SelectSettings:
        parser.add_class_arguments(LaunchSettings, None)
    parser.add_class_arguments(task_config_class(kind), "task")
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(selector_class(method), "options")
    if settings.idle:
        _hide(parser, settings.idle)
        parser.epilog += (
            f" The file may hold all that `cads train` takes; `cads {settings.command}` makes no use of "
            f"{', '.join(settings.idle)}."
        )
    return parser


def _hide(parser: ArgumentParser, idle: tuple[str, ...]) -> None:
    """Leave settings and sections out of the help; they are still read."""
    for action in parser._actions:
        if action.dest.split(".")[0] in idle:
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group._group_actions and all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None


def read_init(argv: list[str]) -> Namespace:
    """The settings of `cads init`: those of `InitSettings`, `paths`, and the flags of data.

    Raises:
        SystemExit: with a message, if a flag or value is refused.
    """
    first_parser = argparse.ArgumentParser(prog="cads init", add_help=False, allow_abbrev=False)
    add_data_flags(first_parser)
    for field in fields(InitSettings):
        first_parser.add_argument(f"--{field.name}")
    first_parser.add_argument("paths", nargs="*")
    parsed, others = first_parser.parse_known_intermixed_args(argv)
    names = [field.name for field in fields(InitSettings) if getattr(parsed, field.name) is not None]
    values = init_parser().parse_args([*(f"--{name}={getattr(parsed, name)}" for name in names), *others])
    values.paths = parsed.paths
    values.pool = getattr(parsed, "pool", [])
    for name in ("target", "test", "model"):
        values[name] = getattr(parsed, name, None)
    return values


def init_parser() -> ArgumentParser:
    """The parser of `cads init`; paths and the flags of data are read before."""
    description = (
        "Look at files or folders, say what they are (columns, sources, sizes, lengths, copies, leaks), and write a "
        "commented configuration that `cads check` and `cads train` take as it is. Nothing is trained."
    )
    parser = _parser("init", "[PATH ...] [--target PATH] [--test PATH] [--model NAME] [flags]", description)
    parser.epilog = (
        "PATH: files of texts (JSON lines, CSV, Parquet, ...), each a source, or a folder of them; or a folder of "
        "images, class/file or source/class/file. Names such as val.jsonl and test/ tell target and test set."
    )
    add_data_flags(parser)
    parser.add_class_arguments(InitSettings, None)
    return parser


def read_grid_flags(argv: list[str]) -> tuple[Path | None, Namespace]:
    """The file of a grid (the first argument, or --config), and what flags set, of the command and of the grid.

    Raises:
        ConfigError: if there are several files, or the file's kind of task is unknown.
        SystemExit: with a message, if a flag or value is refused.
    """
    words = _split("compare", argv)
    if len(words.files) > 1:
        raise ConfigError(f"{len(words.files)} files are given: one grid is run at a time")
    path = words.files[0] if words.files else None
    kind = words.kind
    if kind is None and path is not None and Path(path).is_file():
        kind = load_yaml(path).get("kind")
    flags = words.flags if words.kind is None else ["--kind", words.kind, *words.flags]
    return None if path is None else Path(path), grid_parser(kind or DEFAULT_KIND).parse_args(flags, defaults=False)


def grid_parser(kind: str) -> ArgumentParser:
    """The parser of `cads compare`: its own flags, and every field of a grid whose tasks are of one kind."""
    description = (
        "Run a grid of methods, budgets, seeds, model sizes and tasks; finished cells are never run twice, and what "
        "was under way goes on where it was. Every field of the grid's file can be set by a flag, which wins."
    )
    parser = _parser("compare", "[CONFIG] [flags]", description)
    parser.epilog = (
        f"The fields of task are those of kind {kind}. For others: `cads compare --kind KIND --help`. Kinds: "
        f"{', '.join(names(TASKS))}. Options of a method: `cads select --method NAME --help`."
    )
    parser.add_argument("--out", type=str | None, help="folder of results; null: runs/NAME of the configuration")
    parser.add_argument(
        "--shard", type=str, default="1/1", help="i/n: run the i-th of n parts of the grid; slurm: by SLURM's array"
    )
    parser.add_class_arguments(LaunchSettings, None)
    parser.add_argument("--dry-run", action="store_true", help="print plan and price of every cell; spend nothing")
    parser.add_argument(
        "--import", dest="points", type=str, action="append", help="CSV file of published points; may be repeated"
    )
    parser.add_argument(
        "--methods", type=list[str | GridEntry], help="names, or entries with method, label, options, count_selection"
    )
    parser.add_argument("--budgets", type=list[float | str], help="FLOPs, usages, epochs or tokens")
    parser.add_argument("--kind", type=str, help=f"kind of task: {', '.join(names(TASKS))}")
    parser.add_class_arguments(Grid, None, skip={"methods", "budgets", "kind", "task", "train", "checkpoint"})
    parser.add_class_arguments(task_config_class(kind), "task")
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    return parser


def report_parser() -> ArgumentParser:
    """The parser of `cads report`."""
    parser = _parser("report", "DIR [flags]", "Fits, figures and one page of HTML from the results of a grid.")
    parser.add_argument("folder", type=str, metavar="DIR", help="folder of `cads compare`")
    parser.add_class_arguments(ReportSettings, None)
    return parser


def read_export(argv: list[str]) -> Namespace:
    """The settings of `cads export`: those of `ExportSettings`, `selection` and `files`.

    Raises:
        SystemExit: with a message, if a flag or value is refused.
    """
    # Flags may stand between the Selection and the files, where argparse would end the list of files.
    first_parser = argparse.ArgumentParser(prog="cads export", add_help=False, allow_abbrev=False)
    for field in fields(ExportSettings):
        first_parser.add_argument(f"--{field.name}")
    first_parser.add_argument("words", nargs="*")
    parsed, others = first_parser.parse_known_intermixed_args(argv)
    words = parsed.words
    flags = [f"--{name}={value}" for name, value in vars(parsed).items() if name != "words" and value is not None]
    return export_parser().parse_args([*flags, *others, *words])


def export_parser() -> ArgumentParser:
    """The parser of `cads export`."""
    description = (
        "Write the rows that a Selection chose, as they stand in the files of its pool, with columns of weights and "
        "sources; a list of the images that it chose; what a trainer reads; or a data set of the hub."
    )
    parser = _parser("export", "SELECTION --to FORM --output FILE [flags] [FILES...]", description)
    parser.add_argument("selection", type=str, metavar="SELECTION", help="folder that `cads select` wrote")
    parser.add_argument(
        "files",
        type=str,
        nargs="*",
        metavar="FILES",
        help="files of the pool, if they have moved, or if only their rows are wanted; for a list of images: the "
        "folder in which they are looked for",
    )
    parser.add_class_arguments(ExportSettings, None)
    return parser


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file; sections that are empty are left out.

    Raises:
        ConfigError: if it cannot be read, or maps no names to values.
    """
    label = str(path)
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        near = near_name(Path(path)) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"configuration {label!r} cannot be read: {error.strerror}{near}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"configuration {label!r} is no YAML: {error}") from error
    if not isinstance(loaded, dict):
        found = "it is empty" if loaded is None else f"it is {KINDS.get(type(loaded).__name__, 'something else')}"
        raise ConfigError(
            f"configuration {label!r} must map names to values, and {found}: `cads init` writes one for your files"
        )
    loaded = {name: value for name, value in loaded.items() if name not in SECTIONS or value is not None}
    for name in SECTIONS:
        if not isinstance(loaded.get(name, {}), dict):
            raise ConfigError(f"configuration {label!r}: {name} = {loaded[name]!r}: it must map names to values")
    return loaded


def _parser(command: str, usage: str, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return CommandParser(
        prog=f"cads {command}", usage=f"cads {command} {usage}", description=description, allow_abbrev=False
    )


def _split(command: str, argv: list[str]) -> _Words:
    """Files, kind and method, on which the other flags depend; and the other flags."""
    first_parser = argparse.ArgumentParser(prog=f"cads {command}", add_help=False, allow_abbrev=False)
    first_parser.add_argument("--config", action="append", default=[])
    first_parser.add_argument("--kind")
    first_parser.add_argument("--method")
    if command != "compare":
        first_parser.add_argument("--tensorboard")
        add_data_flags(first_parser)
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    parsed, flags = first_parser.parse_known_args(argv)
    data = task_of_flags(parsed) if command != "compare" else {}
    return _Words(parsed.config, parsed.kind, parsed.method, data, flags, getattr(parsed, "tensorboard", None))


def _read_old_names(settings_read: dict[str, Any], words: _Words) -> None:
    """Read `tensorboard: false`, as 0.1.0 wrote it, as `track: null`; `track` wins."""
    in_file = settings_read.pop("tensorboard", None)
    value = in_file if words.tensorboard is None else words.tensorboard
    if str(value).lower() == "false":
        settings_read.setdefault("track", None)


def _joined(argv: list[str]) -> list[str]:
    """The words, with a value of `--merge` joined to it: the flag may stand alone."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--merge" and word.lower() in ("true", "false"):
            words[-1] = f"--merge={word}"
        else:
            words.append(word)
    return words


def _drop_overridden(settings_read: dict[str, Any], flags: list[str]) -> None:
    """Remove file settings that a flag sets: jsonargparse would fill a list of sources from its old items."""
    for word in flags:
        section, _, name = word.split("=")[0].removeprefix("--").partition(".")
        if section in SECTIONS and word.startswith("--") and isinstance(settings_read.get(section), dict):
            settings_read[section].pop(name, None)
