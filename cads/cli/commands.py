"""The commands `cads plan`, `select` and `train`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.cli.config import read
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.planning.ccds import PUBLISHED
from cads.planning.plan import Plannable, make_plan
from cads.registry import SELECTORS, build_selector, names
from cads.runtime.atomic_files import whole_file
from cads.runtime.processes import world_group
from cads.runtime.run_folder import RunFolder
from cads.selection import Selection, check_folder, versions
from cads.task import Task
from cads.tasks.language.shapes import ShapeOnlyLanguageTask
from cads.training import final

PLAN_WIDTH = 112
"""Columns of a plan, where the terminal has fewer."""
PRODUCTS = {"select": ("selection",), "train": ("model.safetensors", "results.json")}
"""What is in the folder of a run when a command has finished."""
WITHOUT_EFFECT = ("out", "overwrite", "tensorboard", "progress", "checkpoint", "selection")
"""Settings that do not decide on the result: a selection is known by its contents, not by where it is."""


def plan(argv: list[str]) -> None:
    """Say what each method would cost and what is left to train with; nothing is trained, no weights are loaded."""
    world = world_group()
    config, _, objects = world.locally(lambda: read("plan", str(plan.__doc__), argv))
    rate, rate_from = config.flops_per_second, "given"
    if rate is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rate, rate_from = matmul_flops_per_second(device, objects.train.precision), f"matrix products on this {device}"
    task: Task = objects.task.meta(objects.train)
    task.accounting = config.accounting
    budget = Budget.parse(config.budget, count_selection=config.count_selection)
    options = {config.method: objects.options}
    methods: dict[str, Plannable] = {}
    unplanned: dict[str, str] = {}
    # Selectors read their examples to say what they cost; where there are none, it is what has been published.
    published = PUBLISHED if isinstance(task, ShapeOnlyLanguageTask) else {}
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
    world = world_group()
    config, parser, objects = world.locally(lambda: read("select", str(select.__doc__), argv))
    out = Path(config.out or f"runs/{config.method}")
    world.on_rank_zero(lambda: check_folder(out / "selection"))
    console = Console(quiet=not world.first)
    ledger = Ledger()
    with _run("select", parser, config, objects, out) as run:
        task = world.locally(lambda: _task(objects))
        budget = Budget.parse(config.budget, count_selection=config.count_selection)
        if not run.open_or_skip(**task.identity, versions=versions()):
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
            world.on_rank_zero(lambda: str(chosen.save(out / "selection")))
        world.on_rank_zero(lambda: _write_config(parser, config, task, out))
        run.finish()
    console.print(summary(chosen))
    console.print(ledger.table())
    console.print(f"Selection: {out / 'selection'}")
    if config.tensorboard:
        console.print(f"TensorBoard: tensorboard --logdir {out}", soft_wrap=True)


def train(argv: list[str]) -> None:
    """Train the final model on a Selection within the budget, and test it."""
    world = world_group()
    config, parser, objects = world.locally(lambda: read("train", str(train.__doc__), argv))
    if config.selection is None:
        raise ConfigError("--selection is missing: give the folder that `cads select` wrote")
    chosen = world.locally(lambda: Selection.load(config.selection))
    given = Path(config.selection)
    out = Path(config.out or (given.parent if given.name == "selection" else given) / "train")
    console = Console(quiet=not world.first)
    with _run("train", parser, config, objects, out) as run:
        task = world.locally(lambda: _task(objects))
        task.check_merge(config.merge)
        budget = Budget.parse(config.budget, count_selection=config.count_selection)
        if not run.open_or_skip(**task.identity, selection=chosen.content_hash, versions=versions()):
            console.print(_finished(out), soft_wrap=True)
            return
        with run.journal(), _monitor(config, out, "train") as monitor:
            named = [config.eval] if isinstance(config.eval, str) else config.eval or []
            outcome = final.train(task, chosen, budget, seed=config.seed, monitor=monitor, evaluations=named)
            monitor.hparams(
                {"method": chosen.method, "budget": str(budget), "seed": config.seed},
                {**outcome.metrics, "total_flops": outcome.ledger.total().flops},
            )
            world.on_rank_zero(lambda: str(outcome.save(out, merge=config.merge)))
        world.on_rank_zero(lambda: _write_config(parser, config, task, out))
        run.finish()
    console.print(outcome.ledger.table())
    table = Table(title="test set", title_justify="left")
    for name in outcome.metrics:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" for value in outcome.metrics.values()))
    console.print(table)
    console.print(
        f"Model FLOP utilisation: {outcome.utilisation:.1%} of this machine's matrix products "
        f"({outcome.train_result.flops_per_second:.3g} FLOP/s)"
    )
    console.print(f"Model and results: {out}")


def _task(objects: Namespace) -> Task:
    task: Task = objects.task.build(objects.train)
    task.check()
    return task


def _run(command: str, parser: ArgumentParser, config: Namespace, objects: Namespace, out: Path) -> RunFolder:
    """The run of a command: what decides on its result is its whole configuration but `WITHOUT_EFFECT`."""
    settings = yaml.safe_load(parser.dump(config, skip_unset=False))
    settings = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    settings["train"] |= objects.train.result_fields()
    if hasattr(objects.task, "result_fields"):
        fields = objects.task.result_fields()
        settings["task"] = {name: value for name, value in settings["task"].items() if name in fields}
    return RunFolder(out, command, settings, PRODUCTS[command], objects.checkpoint, overwrite=config.overwrite)


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
    for name, examples, selected, probability in selection.source_counts():
        share = selected / max(1, int(selection.selected.sum()))
        table.add_row(name, f"{examples:,}", f"{selected:,}", f"{share:.1%}", f"{probability:.3f}")
    return table


def _monitor(config: Namespace, out: Path, command: str) -> Monitor:
    folder = out / "tensorboard" / command if config.tensorboard else None
    if folder is not None and world_group().first:
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
