"""`cads select` in shards: `--shard i/n` scores some files of the pool, `--merge` selects, `--launcher` does both."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from cads.accounting.budget import Budget
from cads.cli.config import CommandConfig
from cads.cli.main import main
from cads.errors import ConfigError
from cads.launch.launcher import MAX_SHARDS, Job, LaunchSettings, launch
from cads.launch.launchers import make_launcher
from cads.runtime.atomic_files import whole_file
from cads.runtime.processes import world_group
from cads.runtime.shard import Shard
from cads.runtime.signals import Interrupts
from cads.runtime.versions import source_digest, versions
from cads.scoring.cut import CUT_OPTIONS
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.selection_files import check_folder
from cads.sharding.merge import Merged, check_unit, merge
from cads.sharding.run import ShardedRun

NOT_OF_VALUES = ("budget", "count_selection")
"""Settings that cut a ranking, and on which the values of examples do not depend."""
METHODS = "bm25, cads, embedding, less, loss, ppl, random, rho"
LAUNCHED = "launched.yaml"
"""The configuration of the jobs, in the folder of the run."""


def select_in_shards(config: CommandConfig, launching: LaunchSettings, settings: dict[str, Any], out: Path) -> None:
    """Carry out what `--shard`, `--merge` or `--launcher` ask for.

    Args:
        launching: where shards run. settings: of the command, all on which its result depends. out: folder of the run.

    Raises:
        ConfigError: if more than one of them is given, or the method or task cannot be divided.
        CadsError: whatever the shards refuse.
    """
    values = config.values
    given = [name for name in ("shard", "merge", "launcher") if getattr(values, name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join('--' + name for name in given)}: give one of them")
    if values.overwrite:
        raise ConfigError(f"--overwrite with --{given[0]}: shards are kept; remove {out / 'shards'} to begin anew")
    if world_group().size > 1:
        raise ConfigError(f"--{given[0]} is for single processes: start it without torchrun or accelerate")
    budget = Budget.parse(values.budget, count_selection=values.count_selection)
    check_unit(budget)
    run = _run(config, settings, out, budget)
    console = Console()
    if values.shard is not None:
        shard = Shard.parse(values.shard)
        run.run(shard)
        console.print(f"shard {shard} is done: {run.folder}", soft_wrap=True, highlight=False)
        return
    if values.launcher is not None:
        _launch(config, run, launching, out, console)
    _merge(config, run, budget, out, console)


def _run(config: CommandConfig, settings: dict[str, Any], out: Path, budget: Budget) -> ShardedRun:
    """The run of this configuration in its folder."""
    objects, method = config.objects, config.objects.options
    scoring = _scoring(config)
    if not hasattr(objects.task, "parts"):
        raise ConfigError(f"kind = {config.values.kind!r} is not read file by file: shards are for kind language")
    values_settings = {name: value for name, value in settings.items() if name not in NOT_OF_VALUES}
    options = dict(values_settings.get("options") or {})
    values_settings["options"] = {name: value for name, value in options.items() if name not in CUT_OPTIONS}
    packages = {"cads", type(method).__module__.split(".")[0]}
    identity = {"settings": values_settings, "code": source_digest(packages), "versions": versions()}
    parts = objects.task.parts(objects.train)
    return ShardedRun(out, scoring, parts, seed=config.values.seed, identity=identity, budget=budget)


def _scoring(config: CommandConfig) -> ShardedScoring:
    """How the selector scores file by file.

    Raises:
        ConfigError: if it does not.
    """
    method, seed = config.objects.options, config.values.seed
    if not hasattr(method, "sharded"):
        raise not_sharded(
            config.values.method, "it needs the whole pool; use bm25, embedding, ppl, loss, rho, less or cads"
        )
    scoring: ShardedScoring = method.sharded(seed)
    return scoring


def _launch(config: CommandConfig, run: ShardedRun, settings: LaunchSettings, out: Path, console: Console) -> None:
    """Start all shards, and wait until every file is scored."""
    run.begin()
    most = (settings.workers or os.cpu_count() or 1) if settings.launcher == "local" else MAX_SHARDS
    of = min(settings.shards or most, len(run.files))
    replayed = config.values.clone()
    for name, value in asdict(LaunchSettings()).items():
        replayed[name] = value
    whole_file(out / LAUNCHED, config.dump(replayed))
    argv = ("select", str(out / LAUNCHED), "--out", str(out), "--shard")

    def pending() -> list[Job]:
        waiting = [Shard(i, of) for i in range(1, of + 1)]
        return [Job(f"shard-{s.index}-of-{of}", (*argv, str(s))) for s in waiting if run.pending(s)]

    launcher = make_launcher(settings, out / "logs", main)
    interrupts = Interrupts()
    with interrupts.listen():
        launch(launcher, pending, lambda text: console.print(text, style="yellow", markup=False, highlight=False))


def _merge(config: CommandConfig, run: ShardedRun, budget: Budget, out: Path, console: Console) -> None:
    """Select from the values of all shards, and write the Selection."""
    check_folder(out / "selection")
    merged = merge(run, budget, config.objects.train)
    merged.selection.save(out / "selection")
    replayed = config.values.clone()
    for name in ("launcher", "merge", "shard"):
        replayed[name] = {"launcher": None, "merge": True, "shard": None}[name]
    whole_file(out / "config.yaml", config.dump(replayed))
    _say(merged, console, out)


def _say(merged: Merged, console: Console, out: Path) -> None:
    selection = merged.selection
    console.print(
        f"{selection.method}: {len(selection.ids):,} of {merged.pool:,} examples of {selection.notes['files']:,} files",
        highlight=False,
    )
    console.print(selection.ledger.table())
    console.print(f"Selection: {out / 'selection'}", soft_wrap=True)
