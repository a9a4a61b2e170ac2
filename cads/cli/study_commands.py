"""The commands of a study: `cads compare` runs a grid, `cads report` says what came out."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from cads.errors import CadsError, ConfigError
from cads.runtime.processes import world_group
from cads.study.analysis.points import points_of
from cads.study.dry_run import dry_run
from cads.study.grid import read_grid
from cads.study.published_points import import_points
from cads.study.report.text_tables import terminal_table, wide_console
from cads.study.runner import Study
from cads.study.shard import GridShard
from cads.study.tables import FAILED, read_runs

COMPARE = (
    "Run a grid of methods, budgets, seeds, model sizes and tasks; finished cells are never run twice, "
    "and what was under way goes on where it was."
)
MOST_NAMED = 10
"""Failed cells that are named at the end."""
REPORT = "Fits, figures and one page of HTML from the results of a grid or of published points."


def compare(argv: Sequence[str]) -> None:
    """Run the grid of a configuration file, or import published points.

    Raises:
        CadsError: if the grid or the points cannot be used.
    """
    parser = argparse.ArgumentParser(prog="cads compare", description=COMPARE, allow_abbrev=False)
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file of the grid")
    parser.add_argument("--out", type=Path, help="folder of results (default: runs/NAME of the configuration)")
    parser.add_argument("--shard", default="1/1", help="i/n: run the i-th of n parts of the grid")
    parser.add_argument("--dry-run", action="store_true", help="print plan and price of every cell; spend nothing")
    parser.add_argument(
        "--import", dest="points", type=Path, action="append", default=[], help="CSV file of published points"
    )
    given = parser.parse_args(list(argv))
    if given.config is None and not given.points:
        raise ConfigError("nothing to do: give the YAML file of a grid, or --import a file of published points")
    if given.out is None and given.config is None:
        raise ConfigError("--out is missing: say where the imported points go")
    out = given.out or Path("runs") / given.config.stem
    world = world_group()
    shard, console = GridShard.parse(given.shard), wide_console(quiet=not world.first)
    for path in given.points:
        imported = world.on_rank_zero(partial(import_points, path, out))
        console.print(f"{imported} points imported from {path} to {out}", highlight=False)
    if given.config is not None:
        run_grid(given.config, out, shard, console, dry=given.dry_run)


def run_grid(config: Path, out: Path, shard: GridShard, console: Console, *, dry: bool = False) -> None:
    """Plan the grid of `config`, and run it into `out` unless `dry`; ends with a table of what is there.

    Several processes run each cell together.

    Raises:
        CadsError: if the grid cannot be used, or if cells of this shard have failed.
    """
    world = world_group()
    study = Study(world.locally(lambda: read_grid(config)), out, console)
    plans = world.locally(study.plan)
    if dry:
        study.check(plans)
        part = shard.part(plans)
        dry_run(part, study.finished(part), console)
        return
    busy = study.run(plans, shard)
    if busy:
        console.print(f"{len(busy)} cells are being run by other processes, such as {busy[0]}", markup=False)
    runs = read_runs(out) if world.first else []
    if found := points_of(runs):
        console.print(terminal_table(found, str(out)))
    console.print(f"results      {out}/tables", highlight=False)
    console.print(f"TensorBoard  tensorboard --logdir {out}/cells", highlight=False, soft_wrap=True)
    mine = {plan.key for plan in shard.part(plans)}
    # All processes know of it, so that they end alike.
    failed = world.on_rank_zero(
        lambda: [f"  {row['cell']}: {row['error']}" for row in runs if row["cell"] in mine and row["status"] == FAILED]
    )
    if failed:
        named = "\n".join(failed[:MOST_NAMED])
        more = f"\n  and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
        raise CadsError(f"{len(failed)} of {len(mine)} cells failed; the same command runs them again:\n{named}{more}")


def report(argv: Sequence[str]) -> None:
    """Write figures, fits and the page of a study.

    Raises:
        CadsError: if the folder holds no results, or what the report needs is not installed.
    """
    parser = argparse.ArgumentParser(prog="cads report", description=REPORT, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of `cads compare`")
    parser.add_argument("--out", type=Path, help="HTML file (default: DIR/report.html); fits and figures go beside it")
    parser.add_argument("--metric", help="another metric of the test set than the one of the grid")
    given = parser.parse_args(list(argv))
    world_group().on_rank_zero(lambda: _report(given.folder, given.out, given.metric))


def _report(folder: Path, out: Path | None, metric: str | None) -> None:
    """Write the report on the results in `folder`, and say what is in it."""
    try:
        from cads.study.report.page import write_report
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`cads report` needs {error.name}, which is not installed: pip install 'cads-select[report]'"
        ) from error
    made = write_report(folder, out, metric)
    console = Console()
    for sentence in itertools.islice(made.answers, 12):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report       {made.page}", highlight=False, soft_wrap=True)
    console.print(f"fits         {made.fits}", highlight=False, soft_wrap=True)
    console.print(f"figures      {made.figures}", highlight=False, soft_wrap=True)
