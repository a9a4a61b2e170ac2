"""Run, tabulate and report a grid of methods, budgets and seeds: `cads compare` and `cads report` in one.

    python -m experiments.vision experiments/configs/compare-vision.yaml [--out DIR] [--results FILE.md]

Finished cells are kept in the run directory, so that a run that was stopped resumes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cads.cli.study_commands import run_grid
from cads.errors import CadsError, ConfigError
from cads.study.analysis.fits import analyse
from cads.study.analysis.points import points_of
from cads.study.grid import Grid, read_grid
from cads.study.report import figures
from cads.study.report.page import ReportFiles, write_report
from cads.study.report.style import method_styles
from cads.study.report.text_tables import intervals, markdown_table, plain_console
from cads.study.shard import GridShard
from cads.study.tables import read_runs, write_rows

TRAINING_BUDGET = (
    "The budget is that of the training, and selection comes on top; for methods marked 'all in' it covers both."
)
TOTAL_BUDGET = "The budget covers selection and training."


def write_results(grid: Grid, config: Path, out: Path, report: ReportFiles, results: Path) -> None:
    """Write the table of a finished grid as Markdown, and its figure beside it (one for each task and size).

    All runs are written to NAME/tables, so that `cads report NAME` draws and fits them again. The fits of the report
    of the grid, which knows the selections too, are copied to NAME.

    Raises:
        ConfigError: if NAME is the folder of the grid itself.
    """
    folder = results.with_suffix("")
    if folder.resolve() == out.resolve():
        raise ConfigError(f"--results {results}: {folder} is the folder of the runs; name the page differently")
    runs = read_runs(out)
    points = points_of(runs)
    styles = method_styles((row["method"], row["selector"]) for row in runs)
    results.parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder, "runs", "all", runs)
    for i, group in enumerate(analyse(points)):
        name = results.stem if i == 0 else f"{results.stem}-{i + 1}"
        figures.verdict(group, styles, name).save(results.parent, formats=("png",))
    shutil.copyfile(report.fits, folder / "fits.json")
    note = (
        "FLOPs of selection and of training; * marks the best of each budget. "
        f"{TOTAL_BUDGET if grid.count_selection else TRAINING_BUDGET}"
    )
    command = f"python -m experiments.vision {config} --results {results}"
    title = f"{config.stem}: {intervals(points)}"
    results.write_text(f"# {title}\n\n    {command}\n\n{note}\n\n{markdown_table(points)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="run directory (default: runs/NAME of the config)")
    parser.add_argument("--results", type=Path, help="also write table, figure and runs here: NAME.md, NAME.png, NAME/")
    args = parser.parse_args(argv)
    out = args.out or Path("runs") / args.config.stem
    console = plain_console()
    started = time.perf_counter()
    try:
        grid = read_grid(args.config)
        run_grid(grid, out, GridShard(), console)
        report = write_report(out)
        if args.results:
            write_results(grid, args.config, out, report, args.results)
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    for sentence in report.answers:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report       {report.page}", highlight=False, soft_wrap=True)
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
