"""The commands of a study: `cads compare` runs a grid, `cads report` reports its results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from rich.console import Console

from cads.accounting.units import size
from cads.cli.config import read_grid_flags, report_parser
from cads.cli.main import main
from cads.errors import CadsError, ConfigError
from cads.launch.launcher import MAX_SHARDS, LaunchSettings, launch
from cads.launch.launchers import make_launcher
from cads.runtime.processes import world_group
from cads.runtime.signals import Interrupts
from cads.runtime.trackers import tracker_names, tracker_place
from cads.study.analysis.points import points_of
from cads.study.cells import CellPlan
from cads.study.dry_run import dry_run
from cads.study.grid import Grid, read_grid
from cads.study.launched import LaunchedGrid
from cads.study.published_points import import_points
from cads.study.report.text_tables import plain_console, terminal_table
from cads.study.runner import Study
from cads.study.shard import GridShard
from cads.study.tables import FAILED, read_runs

MAX_NAMED, MAX_SENTENCES = 10, 12
"""Most failed cells that are listed at the end, and sentences of a report."""


def compare(argv: Sequence[str]) -> None:
    """Run the grid of a configuration file, or import published points.

    Raises:
        CadsError: if the grid or the points cannot be used.
    """
    world = world_group()
    path, flags = world.locally(lambda: read_grid_flags(list(argv)))
    overrides = flags.as_dict()
    out, shard_text = overrides.pop("out", None), overrides.pop("shard", "1/1")
    launch_fields = [field.name for field in fields(LaunchSettings)]
    settings = LaunchSettings(**{name: overrides.pop(name) for name in launch_fields if name in overrides})
    dry_run, points = overrides.pop("dry_run", False), overrides.pop("points", None) or []
    if path is None and not points:
        raise ConfigError("nothing to do: give the YAML file of a grid, or --import a file of published points")
    if out is None and path is None:
        raise ConfigError("--out is missing: say where the imported points go")
    folder = Path(out) if out is not None else Path("runs") / Path(str(path)).stem
    shard, console = GridShard.parse(shard_text), plain_console(quiet=not world.first)
    for file in points:
        imported = world.on_rank_zero(partial(import_points, Path(file), folder))
        console.print(f"{imported} points imported from {file} to {folder}", highlight=False)
    if path is not None:
        if settings.launcher is not None and shard.of > 1:
            raise ConfigError(f"--shard {shard} with --launcher {settings.launcher}: give one of the two")
        grid = world.locally(lambda: read_grid(path, overrides))
        run_grid(grid, folder, shard, console, dry=dry_run, settings=settings)


def run_grid(
    grid: Grid,
    out: Path,
    shard: GridShard,
    console: Console,
    *,
    dry: bool = False,
    settings: LaunchSettings | None = None,
) -> None:
    """Plan the grid, and run it into `out` unless `dry`; ends with a table of the results.

    Several processes run each cell together. With a launcher in `settings`, jobs run the cells.

    Raises:
        CadsError: if the grid cannot be used, or if cells of this shard have failed.
    """
    world = world_group()
    study = Study(grid, out, console)
    plans = world.locally(study.plan)
    if dry:
        study.check(plans)
        shard_plans = shard.part(plans)
        dry_run(shard_plans, study.finished(shard_plans), console)
        return
    busy = []
    if settings is not None and settings.launcher is not None:
        _launch(study, plans, settings)
    else:
        busy = study.run(plans, shard)
    if busy:
        console.print(f"{len(busy)} cells are being run by other processes, such as {busy[0]}", markup=False)
    runs = read_runs(out) if world.first else []
    if points := points_of(runs):
        console.print(terminal_table(points, str(out)))
    console.print(f"Results: {out}/tables", highlight=False)
    for name in tracker_names(grid.track):
        console.print(tracker_place(name, out / "cells"), highlight=False, soft_wrap=True)
    shard_keys = {plan.key for plan in shard.part(plans)}
    # All processes get the list, so that all end with the same status.
    failed = world.on_rank_zero(
        lambda: [
            f"  {row['cell']}: {row['error']}" for row in runs if row["cell"] in shard_keys and row["status"] == FAILED
        ]
    )
    if failed:
        listing = "\n".join(failed[:MAX_NAMED])
        remainder = f"\n  and {len(failed) - MAX_NAMED} more" if len(failed) > MAX_NAMED else ""
        raise CadsError(
            f"{len(failed)} of {len(shard_keys)} cells failed; the same command runs them again:\n{listing}{remainder}"
        )


def _launch(study: Study, plans: Sequence[CellPlan], settings: LaunchSettings) -> None:
    """Run the cells as jobs of a launcher, and wait for them."""
    if world_group().size > 1:
        raise ConfigError("--launcher starts processes itself: give it to one process, without torchrun or accelerate")
    study.check(plans)
    study.write_grid(plans)
    most = settings.workers or os.cpu_count() or 1 if settings.launcher == "local" else MAX_SHARDS
    launched = LaunchedGrid(study, plans, settings.shards or most)
    launcher = make_launcher(settings, study.folder / "logs", main)
    interrupts = Interrupts()
    with interrupts.listen():
        launch(launcher, launched.pending, lambda text: study.console.print(text, style="yellow", markup=False))


def report(argv: Sequence[str]) -> None:
    """Write figures, fits and the page of a study.

    Raises:
        CadsError: if the folder holds no results, or what the report needs is not installed.
    """
    settings = report_parser().parse_args(list(argv))
    out = None if settings.out is None else Path(settings.out)
    world_group().on_rank_zero(lambda: _report(Path(settings.folder), out, settings.metric))


def _report(folder: Path, out: Path | None, metric: str | None) -> None:
    """Write the report on the results in `folder`, and print its answers and paths."""
    try:
        from cads.study.report.page import write_report
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`cads report` needs {error.name}, which is not installed: pip install 'cads-select[report]'"
        ) from error
    files = write_report(folder, out, metric)
    console = Console()
    for sentence in itertools.islice(files.answers, MAX_SENTENCES):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if len(files.answers) > MAX_SENTENCES:
        console.print(f"{len(files.answers) - MAX_SENTENCES} more sentences are in the report.")
    console.print(f"report       {files.page} ({size(files.n_bytes)}, opens offline)", highlight=False, soft_wrap=True)
    console.print(f"fits         {files.fits}", highlight=False, soft_wrap=True)
    console.print(f"figures      {files.figures}", highlight=False, soft_wrap=True)
    if not files.is_interactive:
        console.print("Figures are static: pip install plotly for figures that answer to the pointer.")
