"""The commands `cads plan`, `select` and `train`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from cads import api
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.cli.closing import budget_sentence, free_sentences
from cads.cli.config import CommandConfig, read
from cads.cli.settings import CommandSettings, PlanSettings, SelectSettings, TrainSettings
from cads.launch.launcher import LaunchSettings
from cads.monitor import Monitor
from cads.planning.methods import plan_methods
from cads.planning.plan import WIDTH
from cads.runtime.atomic_files import whole_file
from cads.runtime.processes import world_group
from cads.runtime.run_folder import RunFolder
from cads.runtime.trackers import check_trackers, tracker_names, tracker_place
from cads.runtime.versions import versions
from cads.selection import Selection
from cads.selection_files import check_folder
from cads.task import Metrics, Task
from cads.training.evaluations import add_to_results, evaluate, missing, read_results
from cads.training.final import TrainedModel, load_trained, save_model
from cads.training.speed import in_flops

PRODUCTS = {"select": ("selection",), "train": ("model.safetensors", "results.json")}
"""What the folder of a run holds when a command has finished."""
NEUTRAL: dict[str, Any] = {"eval": None, "merge": False}
"""Settings that do not change the training, with the values under which the record of a run has them."""
WITHOUT_EFFECT = ("out", "overwrite", "track", "progress", "validation_points", "checkpoint", "selection")
"""Settings that do not change the result. A selection is identified by its contents, not by its path."""

SHARDING = ("shard", "merge", *(field.name for field in dataclass_fields(LaunchSettings)))
"""Settings of how a selection is divided among processes."""


def plan(argv: list[str]) -> None:
    """Print the cost of each method and what it leaves for training.

    A throw-away model with random weights is trained for some steps, which are timed; no weights are loaded.
    """
    world = world_group()
    config = world.locally(lambda: read(PlanSettings, argv))
    values, objects = config.values, config.objects
    task: Task = objects.task.meta(objects.train)
    task.accounting = values.accounting
    result = plan_methods(
        task,
        Budget.parse(values.budget, count_selection=values.count_selection),
        values.methods,
        selectors={values.method: objects.options},
        options=values.selectors,
        flops_per_second=values.flops_per_second,
        with_start_up=True,
    )
    console = Console(width=max(WIDTH, Console().width), quiet=not world.first)
    console.print(result.table(details=values.details, first=values.method))
    if values.json is not None and world.first:
        whole_file(Path(values.json), json.dumps(result.to_json(), indent=2) + "\n")


def select(argv: list[str]) -> None:
    """Choose what to train on, and write a Selection."""
    world = world_group()
    config = world.locally(lambda: read(SelectSettings, argv))
    values, objects = config.values, config.objects
    world.locally(lambda: check_trackers(tracker_names(values.track)))
    out = Path(values.out or f"runs/{config.name}")
    launching = LaunchSettings(
        **{field.name: getattr(values, field.name) for field in dataclass_fields(LaunchSettings)}
    )
    if values.shard is not None or values.merge or values.launcher is not None:
        from cads.cli.sharded_select import select_in_shards

        select_in_shards(config, launching, _settings(config), out)
        return
    world.on_rank_zero(lambda: check_folder(out / "selection"))
    console = Console(quiet=not world.first)
    ledger = Ledger()
    with _run(SelectSettings, config, out, PRODUCTS["select"]) as run:
        task = world.locally(lambda: _task(objects))
        budget = Budget.parse(values.budget, count_selection=values.count_selection)
        if not run.open_or_skip(**task.identity, versions=versions()):
            console.print(_finished(out / "selection"), soft_wrap=True)
            return
        with run.journal(), _monitor(values, out, "select") as monitor:
            selection = _choose(config, task, in_flops(task, budget, ledger), ledger, monitor, out)
            share = float(selection.selected.mean())
            monitor.hparams(
                {"method": values.method, "budget": str(budget), "seed": values.seed},
                {"selected_share": share, "selection_flops": ledger.total(SELECT).flops},
            )
        world.on_rank_zero(lambda: _write_config(config, task, out))
        run.finish()
    console.print(summary(selection))
    console.print(ledger.table())
    console.print(f"Selection: {out / 'selection'}", soft_wrap=True)
    _print_trackers(values, out, console)


def _choose(
    config: CommandConfig, task: Task, budget: Budget, ledger: Ledger, monitor: Monitor, out: Path
) -> Selection:
    """Select by the method of the configuration, and write the Selection to `out`."""
    method, seed = config.objects.options, config.values.seed
    selection = api.select(task, budget, method=method, seed=seed, ledger=ledger, monitor=monitor)
    monitor.ledger(ledger)
    world_group().on_rank_zero(lambda: str(selection.save(out / "selection")))
    return selection


def train(argv: list[str]) -> None:
    """Train the final model within the budget, write and test it; then evaluate it further.

    Without a Selection the method selects, before the training or in it.

    A finished training is evaluated by what its results lack, and not trained anew.
    """
    world = world_group()
    config = world.locally(lambda: read(TrainSettings, argv))
    values, objects = config.values, config.objects
    world.locally(lambda: check_trackers(tracker_names(values.track)))
    selection, out, products = None, Path(values.out or f"runs/{config.name}"), PRODUCTS["train"]
    if values.selection is None:
        products += PRODUCTS["select"]
        world.on_rank_zero(lambda: check_folder(out / "selection"))
    else:
        selection = world.locally(lambda: Selection.load(values.selection))
        folder = Path(values.selection)
        out = Path(values.out or (folder.parent if folder.name == "selection" else folder) / "train")
    console = Console(quiet=not world.first)
    with _run(TrainSettings, config, out, products) as run:
        task = world.locally(lambda: _task(objects))
        task.check_merge(values.merge)
        evaluations = list(dict.fromkeys([values.eval] if isinstance(values.eval, str) else values.eval or []))
        for name in evaluations:
            task.check_evaluation(name)
        trained = None
        given = {} if selection is None else {"selection": selection.content_hash}
        if run.open_or_skip(**task.identity, **given, versions=versions()):
            trained, made = _train(run, config, task, selection, out)
            if selection is None:
                console.print(summary(made))
            console.print(f"Model: {out}", soft_wrap=True)
        names = world.on_rank_zero(lambda: missing(task, out, evaluations) if evaluations else [])
        if trained is None and not names:
            console.print(_finished(out), soft_wrap=True)
            return
        if names:
            if trained is None:
                console.print(f"{out} has been trained before: it is evaluated by {', '.join(names)}", soft_wrap=True)
            model = _written_or_trained(task, trained, out, merged=values.merge)
            _evaluate(run, config, task, model, names, out)
        results = world.on_rank_zero(lambda: read_results(out))
    ledger = Ledger.from_json(results["ledger"])
    console.print(ledger.table())
    console.print(_metrics_table(results["metrics"]))
    for sentence in world.on_rank_zero(lambda: _closing(results, ledger, out, task, objects)):
        console.print(sentence, markup=False, highlight=False)
    if trained is not None and trained.utilisation:
        console.print(
            f"Model FLOP utilisation: {trained.utilisation:.1%} of this machine's matrix products "
            f"({trained.train_result.flops_per_second:.3g} FLOP/s)"
        )
    console.print(f"Model{', Selection' if selection is None else ''} and results: {out}", soft_wrap=True)
    _print_trackers(values, out, console)


def _closing(results: dict[str, Any], ledger: Ledger, out: Path, task: Task, objects: Namespace) -> list[str]:
    """What the budget went to, and how the result compares with what is free; nothing of results of older versions."""
    if "budget" not in results:
        return []
    budget, metrics = results["budget"], results["metrics"]
    end = results["selection"]["notes"].get("end", "")
    return [budget_sentence(budget, ledger, end), *free_sentences(out, task, objects, budget["flops"], metrics)]


def _train(
    run: RunFolder, config: CommandConfig, task: Task, selection: Selection | None, out: Path
) -> tuple[TrainedModel, Selection]:
    """Select if there is no Selection, train the final model, write it and then test it: then the run has finished."""
    world, values = world_group(), config.values
    budget = Budget.parse(values.budget, count_selection=values.count_selection)

    def save(model: nn.Module) -> None:
        world.on_rank_zero(lambda: save_model(task, model, out, merge=values.merge))

    with run.journal(), _monitor(values, out, "train") as monitor:
        if selection is None:
            ledger = Ledger()
            budget = in_flops(task, budget, ledger)
            selection = _choose(config, task, budget, ledger, monitor, out)
        trained = api.train(task, budget, selection=selection, seed=values.seed, monitor=monitor, save=save)
        monitor.hparams(
            {"method": selection.method, "budget": str(budget), "seed": values.seed},
            {**trained.metrics, "total_flops": trained.ledger.total().flops},
        )
        world.on_rank_zero(lambda: trained.save_results(out))
    world.on_rank_zero(lambda: _write_config(config, task, out))
    run.finish()
    return trained, selection


def _written_or_trained(task: Task, trained: TrainedModel | None, out: Path, *, merged: bool) -> nn.Module:
    """The model to evaluate: the trained one, if it is here and the written one does not differ from it."""
    if trained is not None and not merged:
        return trained.model
    # The written model, as after a restart: a merged one differs from the trained one by rounding.
    if trained is not None:
        trained.model.cpu()  # makes room on the device
    return world_group().locally(lambda: load_trained(task, out))


def _evaluate(
    run: RunFolder, config: CommandConfig, task: Task, model: nn.Module, names: Sequence[str], out: Path
) -> None:
    """Evaluate the model of a finished run; each evaluation is added to its results when it is done."""
    world = world_group()
    with _monitor(config.values, out, "evaluate") as monitor:
        for name in names:
            ledger, settings = Ledger(), task.evaluation_settings(name)
            with run.journal_of(f"evaluation {name}", {"evaluation": settings}):
                metrics = evaluate(task, model, name, ledger=ledger, monitor=monitor)
                world.on_rank_zero(partial(add_to_results, task, out, name, metrics, ledger))
            for metric, value in metrics.items():
                monitor.scalar(f"test/{metric}", value, 0)
    world.on_rank_zero(lambda: _write_config(config, task, out))


def _metrics_table(metrics: Metrics) -> Table:
    table = Table(title="On the test set", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table


def _task(objects: Namespace) -> Task:
    task: Task = objects.task.build(objects.train)
    task.check()
    return task


def _run(command: type[CommandSettings], config: CommandConfig, out: Path, products: tuple[str, ...]) -> RunFolder:
    """The run of a command, identified by the settings that change its result: all but `WITHOUT_EFFECT`.

    `NEUTRAL` settings and the `evaluation_fields` of the task do not change a training, and may differ.
    """
    objects, settings = config.objects, _settings(config)
    name = command.command
    return RunFolder(
        out,
        name,
        settings,
        products,
        objects.checkpoint,
        overwrite=config.values.overwrite,
        neutral={**NEUTRAL, **_evaluation_defaults(objects.task)},
        form={"merge": settings["merge"]} if "merge" in settings else {},
    )


def _settings(config: CommandConfig) -> dict[str, Any]:
    """The settings that change the result of a command: all but `WITHOUT_EFFECT`."""
    objects = config.objects
    dumped = yaml.safe_load(config.dump())
    without_effect = WITHOUT_EFFECT + (() if "launcher" not in dumped else SHARDING)
    settings: dict[str, Any] = {name: value for name, value in dumped.items() if name not in without_effect}
    settings["train"] |= objects.train.result_fields()
    if hasattr(objects.task, "result_fields"):
        fields = objects.task.result_fields()
        settings["task"] = {name: value for name, value in settings["task"].items() if name in fields}
    return settings


def _evaluation_defaults(task_config: Any) -> dict[str, Any]:
    """The default values of the fields of a task that only its further evaluations depend on, by dotted name."""
    names = getattr(task_config, "evaluation_fields", ())
    if not names:
        return {}
    return {f"task.{f.name}": f.default for f in dataclass_fields(task_config) if f.name in names}


def _finished(path: Path) -> str:
    return f"{path} has been finished before: nothing to do (--overwrite true begins anew)"


def summary(selection: Selection) -> Table:
    """What was selected and what training draws, by source if there are sources.

    The probability under the selector's policy is a column of its own, if it differs: the choice can differ from it.
    """
    title = f"{selection.method}: {int(selection.selected.sum()):,} of {len(selection.selected):,} examples"
    if "guard" in selection.notes:
        title += f" ({selection.notes['guard']})"
    if selection.target_fraction:
        title += f"; {selection.target_fraction:.0%} of each batch from the target"
    if "likeness" in selection.notes:
        alike = selection.notes["likeness"]
        title += f"; what is least like the target is drawn {min(alike['weights']):.0%} as often"
        title += f"; {alike['near']:,} are of the target's kind" if "near" in alike else ""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", overflow="fold")
    policy = selection.policy_probability
    if len(set(policy.values())) < 2:
        policy = {}
    for column in ("examples", "selected", "share of training", *(["policy probability"] if policy else [])):
        table.add_column(column, justify="right", no_wrap=True)
    shares = selection.shares or {"(all)": float(selection.weights.sum())}
    for name, examples, selected, _ in selection.source_counts():
        row = [name, f"{examples:,}", f"{selected:,}", f"{shares[name]:.1%}"]
        table.add_row(*row, *([f"{policy[name]:.3f}" if name in policy else "-"] if policy else []))
    return table


def _monitor(values: Namespace, out: Path, command: str) -> Monitor:
    names = tracker_names(values.track)
    folder = out / "tensorboard" / command if names else None
    if folder is not None and world_group().first:
        # A resumed run writes the events of its replayed part once more.
        shutil.rmtree(folder, ignore_errors=True)
    return Monitor(
        folder,
        Console(stderr=True) if values.progress else None,
        track=names,
        run=f"{out.name} {command}",
        validation_points=values.validation_points,
    )


def _print_trackers(values: Namespace, out: Path, console: Console) -> None:
    """Say where the curves are."""
    for name in tracker_names(values.track):
        console.print(tracker_place(name, out), soft_wrap=True, highlight=False)


def _write_config(config: CommandConfig, task: Task, out: Path) -> None:
    """Write the whole configuration, which replays the run, and `data.json`, if the task counts data left out."""
    if task.counts:
        whole_file(out / "data.json", json.dumps(task.counts, indent=2) + "\n")
    replayed = config.values.clone()
    replayed.overwrite = False
    whole_file(out / "config.yaml", config.dump(replayed))
