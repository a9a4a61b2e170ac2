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
from cads.errors import CadsError
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


EVERY, MIDDLE = ("regret", "frontier", "fits"), ("overlap", "ledger", "sources")
"""Figures of a report that are copied to the results: of each task and size; of the budget in the middle alone."""


def write_results(grid: Grid, config: Path, out: Path, report: ReportFiles, results: Path) -> None:
    """Write the table of a finished grid as Markdown, and its figure beside it (one for each task and size).

    All runs are written to NAME/tables, so that `cads report NAME` can draw and fit them again. The fits and some
    figures of the grid's own report, which shows the selections too, are copied to NAME.
    """
    runs = read_runs(out)
    points = points_of(runs)
    styles = method_styles((row["method"], row["selector"]) for row in runs)
    results.parent.mkdir(parents=True, exist_ok=True)
    write_rows(results.with_suffix(""), "runs", "all", runs)
    for i, group in enumerate(analyse(points)):
        name = results.stem if i == 0 else f"{results.stem}-{i + 1}"
        figures.verdict(group, styles, name).save(results.parent, formats=("png",))
    keep_figures(report, results.with_suffix(""))
    note = (
        "FLOPs of selection and of training; * marks the best of each budget. "
        f"{TOTAL_BUDGET if grid.count_selection else TRAINING_BUDGET}"
    )
    command = f"python -m experiments.vision {config} --results {results}"
    title = f"{config.stem}: {intervals(points)}"
    results.write_text(f"# {title}\n\n    {command}\n\n{note}\n\n{markdown_table(points)}")


def keep_figures(report: ReportFiles, folder: Path) -> None:
    """Copy the fits of a report and its figures of `EVERY` and `MIDDLE` to `folder`; file names lose their numbers."""
    shutil.copyfile(report.fits, folder / "fits.json")
    (folder / "figures").mkdir(exist_ok=True)
    for kind in EVERY + MIDDLE:
        files = sorted(report.figures.glob(f"[0-9][0-9]-{kind}.png"))
        if kind in MIDDLE:
            files = files[len(files) // 2 :][:1]
        for i, file in enumerate(files):
            shutil.copyfile(file, folder / "figures" / f"{kind}{f'-{i + 1}' if i else ''}.png")


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
