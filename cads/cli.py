"""The command line: `cads plan`, `select`, `train`, `compare`, `report`. One YAML file and flags fill dataclasses."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from cads.budget import SELECT, Budget, Ledger
from cads.checkpoint import CheckpointConfig
from cads.errors import CadsError, ConfigError
from cads.flops import ACCOUNTINGS
from cads.folders import whole_file
from cads.interrupt import Interrupted
from cads.monitor import Monitor
from cads.outcome import train_on
from cads.plan import Plannable, make_plan
from cads.processes import TIMEOUT, TIMEOUT_VARIABLE, close, everyone, is_shared
from cads.published import PUBLISHED
from cads.registry import SELECTORS, TASKS, build_selector, names, selector_class, task_config_class
from cads.running import Run
from cads.selection import Selection, check_folder, versions
from cads.speed import matmul_flops_per_second
from cads.study.commands import compare, report
from cads.task import Task
from cads.tasks.sketch import SketchedLanguage
from cads.trainer import TrainConfig

DEFAULT_KIND, DEFAULT_METHOD = "vision", "cads-s"
PLAN_WIDTH = 112
"""Columns of a plan, where the terminal has fewer."""
SECTIONS = ("task", "train", "options", "selectors", "checkpoint")
"""The parts of a configuration file that map names to values themselves."""
PRODUCTS = {"select": ("selection",), "train": ("model.safetensors", "results.json")}
"""What is in the folder of a run when a command has finished."""
READING = ("plan", "select", "train")
"""Commands that read their data once, and say how."""
WITHOUT_EFFECT = ("out", "overwrite", "tensorboard", "progress", "checkpoint", "selection")
"""Settings that do not decide on the result: a selection is known by its contents, not by where it is."""
USAGE = f"""usage: cads COMMAND [CONFIG] [flags]

What should I train on, given a pool, a validation set, a model and a compute budget in FLOPs?

commands:
  plan     say what each method would cost and what is left to train with; spends nothing
  select   choose what to train on, and write a Selection
  train    train the final model on a Selection within the budget, and test it
  compare  run a grid of methods, budgets, seeds, model sizes and tasks
  report   figures, fits and one page of HTML from the results of a grid

`cads COMMAND --help` explains every field; `cads COMMAND --print_config` writes the whole configuration.

several processes: `accelerate launch --multi_gpu --num_processes N -m cads COMMAND ...`, or
`torchrun --nproc_per_node N -m cads COMMAND ...`; on CPUs where there is no GPU, or with ACCELERATE_USE_CPU=true.
They divide training, replicas, scoring and gradients; the result is that of one process up to rounding. One waits
{TIMEOUT:g} s for another, or {TIMEOUT_VARIABLE} seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused with a reason, 2 bad usage,
    128 + n stopped by signal n)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "plan": plan,
        "select": select,
        "train": train,
        "compare": compare,
        "report": report,
    }
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        console.print(f"cads: command {argv[0]!r} is unknown: use one of {', '.join(commands)}", style="red")
        return 2
    try:
        first = everyone().first
        if not first:
            logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("cads.tasks").setLevel(logging.INFO if first and argv[0] in READING else logging.NOTSET)
        commands[argv[0]](argv[1:])
        close()
    except Interrupted as stopped:
        _say(console, stopped, f"cads: {stopped}", "yellow")
        return stopped.status
    except KeyboardInterrupt:
        console.print("cads: stopped by SIGINT; what was finished is kept", style="yellow")
        return 128 + signal.SIGINT
    except CadsError as error:
        _say(console, error, f"{type(error).__name__}: {error}", "red")
        return 1
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        _say(console, error, f"cads: {where}{error.strerror or error}", "red")
        return 1
    return 0


def _say(console: Console, error: Exception, text: str, style: str) -> None:
    """Say why a command ends: the first process, and any that is alone with its reason."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not (is_shared(error) or isinstance(error, Interrupted)):
        console.print(f"process {rank}: {text}" if rank else text, style=style, markup=False, highlight=False)


def plan(argv: list[str]) -> None:
    """Say what each method would cost and what is left to train with; nothing is trained, no weights are loaded."""
    world = everyone()
    config, _, objects = world.each(lambda: _read("plan", argv))
    rate, rate_from = config.flops_per_second, "given"
    if rate is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rate, rate_from = matmul_flops_per_second(device, objects.train.precision), f"matrix products on this {device}"
    task: Task = objects.task.sketch(objects.train)
    task.accounting = config.accounting
    budget = Budget.parse(config.budget, count_selection=config.count_selection)
    options = {config.method: objects.options}
    methods: dict[str, Plannable] = {}
    unplanned: dict[str, str] = {}
    # Selectors read their examples to say what they cost; where there are none, it is what has been published.
    published = PUBLISHED if isinstance(task, SketchedLanguage) else {}
    for name in config.methods or sorted({*names(SELECTORS), *published}):
        try:
            methods[name] = options.get(name) or published.get(name) or build_selector(name, config.selectors.get(name))
        except ConfigError as error:
            if config.methods:
                raise
            unplanned[name] = str(error)
    made = make_plan(
        task, budget, methods, flops_per_second=rate, rate_from=rate_from, strict=config.methods is not None
    )
    made.refused.update(unplanned)
    Console(width=max(PLAN_WIDTH, Console().width), quiet=not world.first).print(made.table())
    if config.json is not None and world.first:
        Path(config.json).write_text(json.dumps(made.to_json(), indent=2) + "\n")


def select(argv: list[str]) -> None:
    """Choose what to train on, and write a Selection."""
    world = everyone()
    config, parser, objects = world.each(lambda: _read("select", argv))
    out = Path(config.out or f"runs/{config.method}")
    world.on_first(lambda: check_folder(out / "selection"))
    console = Console(quiet=not world.first)
    ledger = Ledger()
    with _run("select", parser, config, objects, out) as run:
        task = world.each(lambda: _task(objects))
        budget = Budget.parse(config.budget, count_selection=config.count_selection)
        if not run.begin(**task.identity, versions=versions()):
            console.print(_finished(out / "selection"), soft_wrap=True)
            return
        with run.journal(), _monitor(config, out, "select") as monitor:
            chosen = objects.options.select(task, budget, seed=config.seed, ledger=ledger, monitor=monitor)
            monitor.ledger(ledger)
            share = float(chosen.selected.mean())
            monitor.hparams(
                {"method": config.method, "budget": str(budget), "seed": config.seed},
                {"selected_share": share, "selection_flops": ledger.total(SELECT).flops},
            )
            world.on_first(lambda: str(chosen.save(out / "selection")))
        world.on_first(lambda: _write_config(parser, config, task, out))
        run.finish()
    console.print(summary(chosen))
    console.print(ledger.table())
    console.print(f"Selection: {out / 'selection'}")
    if config.tensorboard:
        console.print(f"TensorBoard: tensorboard --logdir {out}", soft_wrap=True)


def train(argv: list[str]) -> None:
    """Train the final model on a Selection within the budget, and test it."""
    world = everyone()
    config, parser, objects = world.each(lambda: _read("train", argv))
    if config.selection is None:
        raise ConfigError("--selection is missing: give the folder that `cads select` wrote")
    chosen = world.each(lambda: Selection.load(config.selection))
    given = Path(config.selection)
    out = Path(config.out or (given.parent if given.name == "selection" else given) / "train")
    console = Console(quiet=not world.first)
    with _run("train", parser, config, objects, out) as run:
        task = world.each(lambda: _task(objects))
        task.check_merge(config.merge)
        budget = Budget.parse(config.budget, count_selection=config.count_selection)
        if not run.begin(**task.identity, selection=chosen.content_hash, versions=versions()):
            console.print(_finished(out), soft_wrap=True)
            return
        with run.journal(), _monitor(config, out, "train") as monitor:
            named = [config.eval] if isinstance(config.eval, str) else config.eval or []
            outcome = train_on(task, chosen, budget, seed=config.seed, monitor=monitor, evaluations=named)
            monitor.hparams(
                {"method": chosen.method, "budget": str(budget), "seed": config.seed},
                {**outcome.metrics, "total_flops": outcome.ledger.total().flops},
            )
            world.on_first(lambda: str(outcome.save(out, merge=config.merge)))
        world.on_first(lambda: _write_config(parser, config, task, out))
        run.finish()
    console.print(outcome.ledger.table())
    table = Table(title="test set", title_justify="left")
    for name in outcome.metrics:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" for value in outcome.metrics.values()))
    console.print(table)
    console.print(
        f"Model FLOP utilisation: {outcome.utilisation:.1%} of this machine's matrix products "
        f"({outcome.fit.flops_per_second:.3g} FLOP/s)"
    )
    console.print(f"Model and results: {out}")


def _task(objects: Namespace) -> Task:
    task: Task = objects.task.build(objects.train)
    task.check()
    return task


def _run(command: str, parser: ArgumentParser, config: Namespace, objects: Namespace, out: Path) -> Run:
    """The run of a command: what decides on its result is its whole configuration but `WITHOUT_EFFECT`."""
    settings = yaml.safe_load(parser.dump(config, skip_unset=False))
    settings = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    settings["train"] |= objects.train.decisive()
    if hasattr(objects.task, "decisive"):
        decisive = objects.task.decisive()
        settings["task"] = {name: value for name, value in settings["task"].items() if name in decisive}
    return Run(out, command, settings, PRODUCTS[command], objects.checkpoint, overwrite=config.overwrite)


def _finished(what: Path) -> str:
    return f"{what} has been finished before: nothing to do (--overwrite true begins anew)"


def summary(selection: Selection) -> Table:
    """What was selected, by source if there are sources."""
    title = f"{selection.method}: {int(selection.selected.sum()):,} of {len(selection.selected):,} examples"
    if "guard" in selection.notes:
        title += f" ({selection.notes['guard']})"
    table = Table(title=title, title_justify="left")
    table.add_column("source")
    for column in ("examples", "selected", "share of selection", "probability"):
        table.add_column(column, justify="right")
    for name, examples, selected, probability in selection.by_source():
        share = selected / max(1, int(selection.selected.sum()))
        table.add_row(name, f"{examples:,}", f"{selected:,}", f"{share:.1%}", f"{probability:.3f}")
    return table


def _read(command: str, argv: list[str]) -> tuple[Namespace, ArgumentParser, Namespace]:
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
    parser = _parser(command, kind, method)
    file = [] if set(given) == {"kind", "method", "options"} and not own else ["--config", yaml.safe_dump(given)]
    config = parser.parse_args([*file, *flags])
    if config.seed < 0:
        raise ConfigError(f"seed = {config.seed}: it must be >= 0")
    return config, parser, parser.instantiate(config)


def _parser(command: str, kind: str, method: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = {"plan": plan, "select": select, "train": train}[command].__doc__
    usage = f"cads {command} [CONFIG] [flags]"
    parser = ArgumentParser(prog=f"cads {command}", usage=usage, description=about, allow_abbrev=False)
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


def _monitor(config: Namespace, out: Path, command: str) -> Monitor:
    folder = out / "tensorboard" / command if config.tensorboard else None
    if folder is not None and everyone().first:
        # A run that is gone on from shows what it has done before once more.
        shutil.rmtree(folder, ignore_errors=True)
    return Monitor(folder, Console(stderr=True) if config.progress and sys.stderr.isatty() else None)


def _write_config(parser: ArgumentParser, config: Namespace, task: Task, out: Path) -> None:
    """Write the whole configuration, which replays the run, and `data.json`, where the task counts what was cut and
    left out."""
    if counts := getattr(task, "counts", None):
        whole_file(out / "data.json", json.dumps(counts, indent=2) + "\n")
    replayed = config.clone()
    replayed.overwrite = False
    whole_file(out / "config.yaml", parser.dump(replayed, skip_unset=False))


if __name__ == "__main__":
    sys.exit(main())
