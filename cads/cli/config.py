"""A command's configuration: one YAML file and flags fill dataclasses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from cads.accounting.costs import ACCOUNTINGS
from cads.errors import ConfigError
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, TASKS, build_selector, names, selector_class, task_config_class
from cads.runtime.checkpoint import CheckpointConfig

DEFAULT_KIND, DEFAULT_METHOD = "vision", "cads-s"
SECTIONS = ("task", "train", "options", "selectors", "checkpoint")
"""The parts of a configuration file that map names to values themselves."""


def read(command: str, description: str, argv: list[str]) -> tuple[Namespace, ArgumentParser, Namespace]:
    """The configuration of a command, from its file (the first argument, or --config) and its flags; what reads and
    writes it; and the objects that it describes."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    given: dict[str, Any] = {}
    flags = []
    words = iter(argv)
    for word in words:
        if word.split("=")[0] == "--config":
            path = word.split("=", 1)[1] if "=" in word else next(words, "")
            given.update(_load_yaml(path))
        else:
            flags.append(word)
    kind = _flag(flags, "--kind") or given.get("kind", DEFAULT_KIND)
    method = _flag(flags, "--method") or given.get("method", DEFAULT_METHOD)
    selector_class(method)
    selectors = given.pop("selectors", {})
    for name, options in selectors.items():
        build_selector(name, options)
    if command == "plan" and selectors:
        given["selectors"] = selectors
    own = dict(selectors.get(method) or {})
    if given.get("method", method) == method:
        own.update(given.get("options", {}))
    given = {**given, "kind": kind, "method": method, "options": own}
    _drop_overridden(given, flags)
    parser = _parser(command, description, kind, method)
    file = [] if set(given) == {"kind", "method", "options"} and not own else ["--config", yaml.safe_dump(given)]
    config = parser.parse_args([*file, *flags])
    if config.seed < 0:
        raise ConfigError(f"seed = {config.seed}: it must be >= 0")
    return config, parser, parser.instantiate(config)


def _parser(command: str, description: str, kind: str, method: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"cads {command} [CONFIG] [flags]"
    parser = ArgumentParser(prog=f"cads {command}", usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it win")
    parser.add_argument("--kind", default=kind, help=f"kind of task: {', '.join(names(TASKS))}")
    parser.add_argument("--method", default=method, help=f"selector: {', '.join(names(SELECTORS))}")
    parser.add_argument(
        "--budget",
        type=float | str,
        default="5 epochs",
        help="'2e15' FLOPs, '225000 usages', '5 epochs', '3e6 tokens'",
    )
    parser.add_argument("--count_selection", type=bool, default=False, help="the budget covers selection too")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the run")
    parser.add_argument("--overwrite", type=bool, default=False, help="begin anew, whatever the folder holds")
    parser.add_argument("--tensorboard", type=bool, default=True, help="write TensorBoard event files")
    parser.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    if command == "plan":
        parser.add_argument("--accounting", default="analytic", choices=list(ACCOUNTINGS), help="how FLOPs are counted")
        parser.add_argument("--json", type=str | None, default=None, help="file for the plan as JSON")
        parser.add_argument("--flops_per_second", type=float | None, default=None, help="for the times; null: measured")
        parser.add_argument("--methods", type=list[str] | None, default=None, help="null: all that are known")
        parser.add_argument("--selectors", type=dict[str, Any], default={}, help="options of other methods, by name")
    if command == "train":
        parser.add_argument("--selection", type=str | None, default=None, help="folder that `cads select` wrote")
        parser.add_argument("--merge", type=bool, default=False, help="write adapters into the model they stand on")
        further = "further evaluations of the task, one or a list: choices, exact_match, lm_eval:TASKS"
        parser.add_argument("--eval", type=list[str] | str | None, default=None, help=further)
    parser.add_class_arguments(task_config_class(kind), "task")
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(selector_class(method), "options")
    return parser


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"configuration {path!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"configuration {path!r} is no YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"configuration {path!r} must map names to values, not {type(loaded).__name__}")
    loaded = {name: value for name, value in loaded.items() if name not in SECTIONS or value is not None}
    for name in SECTIONS:
        if not isinstance(loaded.get(name, {}), dict):
            raise ConfigError(f"configuration {path!r}: {name} = {loaded[name]!r}: it must map names to values")
    return loaded


def _drop_overridden(given: dict[str, Any], flags: list[str]) -> None:
    """Take out of the file what a flag sets: jsonargparse would fill a list of sources from its old items."""
    for word in flags:
        section, _, name = word.split("=")[0].removeprefix("--").partition(".")
        if section in SECTIONS and word.startswith("--") and isinstance(given.get(section), dict):
            given[section].pop(name, None)


def _flag(flags: list[str], name: str) -> str | None:
    """The value of a flag, the last one where it is repeated."""
    value = None
    for word, after in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        if word == name and after and not after.startswith("-"):
            value = after
        elif word.startswith(f"{name}="):
            value = word.split("=", 1)[1]
    return value
