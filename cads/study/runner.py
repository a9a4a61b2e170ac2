"""Running a grid: planned before anything is spent, cell by cell, in any number of processes, resumed after any stop.

A finished cell is a file of the table `runs`. The file is named by all that the result depends on, so that no cell is
run twice. A cell that is under way has a journal. A signal stops the grid when the journal is written.
Locks belong to the process that holds them. They end with it, so that a process that was killed blocks no other.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cads.accounting.budget import Budget
from cads.errors import BudgetError, CadsError, ConfigError
from cads.registry import build_selector, selector_class
from cads.runtime.atomic_files import whole_file
from cads.runtime.lock import LockedError, held_by_first
from cads.runtime.processes import ProcessError, active_group, is_shared
from cads.runtime.signals import Interrupted, Interrupts
from cads.runtime.trackers import check_trackers, tracker_names
from cads.runtime.versions import source_digest
from cads.scoring.ranker import Ranker
from cads.study.cells import DISTRIBUTION, CellPlan, RunRow, cell_row, metric_of, plan_cell, run_cell, scored
from cads.study.grid import Cell, Grid, Setting, cells, settings
from cads.study.journals import Journals
from cads.study.progress import GridProgress
from cads.study.ranking_store import Rankings
from cads.study.shard import GridShard
from cads.study.tables import DONE, FAILED, GRID_FILE, NOT_APPLICABLE, OVER_BUDGET, read_table_file, write_rows
from cads.task import Task

log = logging.getLogger(__name__)

KEPT_TASKS = 3
"""Tasks that stay in memory: cells of one setting follow each other."""


@dataclass
class Study:
    """A grid in its folder.

    Attributes:
        grid: what is run. folder: where results are kept. console: where progress is shown.
    """

    grid: Grid
    folder: Path
    console: Console
    _tasks: dict[tuple[str, str, int], Task] = field(default_factory=dict)
    _metrics: dict[tuple[str, str], str] = field(default_factory=dict)

    def plan(self) -> list[CellPlan]:
        """Every cell of the grid: its name, its price, and why it is not run, if it is not.

        Raises:
            DataError: if a task cannot be built.
            ConfigError: if two budgets come to the same FLOPs.
            BudgetError: if no cell can be run because none fits its budget.
        """
        plans = []
        for setting in settings(self.grid):
            self._refuse_same_budgets(setting)
            plans += [self._plan(cell) for cell in cells(self.grid, setting)]
        if not any(p.status == "" for p in plans):
            reasons = list(dict.fromkeys(p.note for p in plans))
            raise BudgetError(f"no cell of the grid can be run: {reasons[0]}")
        return plans

    def _refuse_same_budgets(self, setting: Setting) -> None:
        """Refuse two budgets that are the same number of FLOPs in this setting."""
        seen: dict[float, str] = {}
        for text in self.grid.budgets:
            flops = Budget.parse(text).flops(self.task(setting))
            if flops in seen:
                raise ConfigError(f"budget {seen[flops]!r} and budget {text!r} are both {flops:.6g} FLOPs: drop one")
            seen[flops] = text

    def check(self, plans: Sequence[CellPlan]) -> None:
        """Refuse a metric or an evaluation that a task does not know, and a tracker that is not installed.

        Raises:
            ConfigError: naming it.
        """
        check_trackers(tracker_names(self.grid.track))
        for setting in {(p.cell.setting.task, p.cell.setting.model): p.cell.setting for p in plans}.values():
            self.metric(setting)
            for name in self.grid.evaluations:
                self.task(setting).check_evaluation(name)

    def finished(self, plans: Sequence[CellPlan]) -> set[str]:
        """Keys of the cells that have a score already."""
        return {plan.key for plan in plans if self._finished(plan) is not None}

    def run(self, plans: Sequence[CellPlan], shard: GridShard) -> list[str]:
        """Run the cells of a shard that are not finished.

        Returns:
            keys of the cells that another process is running; they are skipped here.

        Raises:
            ConfigError: if the grid's metric or an evaluation is unknown to a task. It is raised before any compute is
                spent.
            Interrupted: if this process was asked to stop.
        """
        interrupts = Interrupts()
        with interrupts.listen():
            return self._run_shard(plans, shard, interrupts)

    def _run_shard(self, plans: Sequence[CellPlan], shard: GridShard, interrupts: Interrupts) -> list[str]:
        world = active_group()
        world.on_rank_zero(lambda: self.write_grid(plans))
        shard_plans = shard.part(plans)
        self.check(shard_plans)
        self._print_unrunnable(shard_plans)
        code = code_digest(e.method for e in self.grid.methods)
        journals = Journals(self.folder, code, self.grid.checkpoint, interrupts)
        world.on_rank_zero(lambda: self._sweep(plans, journals))
        progress = GridProgress(self.console, shard_plans)
        done = set(
            world.on_rank_zero(lambda: [plan.key for plan in shard_plans if self._show_finished(plan, progress)])
        )
        todo = [plan for plan in shard_plans if plan.key not in done]
        if progress.made_by_others(code):
            log.warning(
                "%d finished cells were made by other code of the same version and are kept: choose another folder "
                "to run them again",
                progress.made_by_others(code),
            )
        busy = []
        with progress:
            for plan in todo:
                interrupts.stop_together("between two cells")
                if not self._attempt(plan, journals, progress):
                    busy.append(plan.key)
        return busy

    def write_grid(self, plans: Sequence[CellPlan]) -> None:
        """Write the configuration of the grid, and the keys of its cells."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole_file(self.folder / "config.yaml", yaml.safe_dump(asdict(self.grid), sort_keys=False))
        whole_file(self.folder / GRID_FILE, json.dumps({"cells": [p.key for p in plans]}, indent=1) + "\n")

    def _sweep(self, plans: Sequence[CellPlan], journals: Journals) -> None:
        """Remove checkpoints that no cell or ranking of the grid will resume from."""
        by_key = {plan.key: plan for plan in plans}

        def is_done(key: str) -> bool:
            if key in by_key:
                return self._finished(by_key[key]) is not None
            return Rankings(self.folder).path(key).exists()

        journals.sweep({*by_key, *(plan.ranking for plan in plans)}, is_done)

    def _show_finished(self, plan: CellPlan, progress: GridProgress) -> bool:
        """Show a cell that an earlier run finished; False if none did."""
        row = self._finished(plan)
        if row is not None:
            setting, metric = plan.cell.setting, self.metric(plan.cell.setting)
            if row["metric"] != metric:
                # The grid named another metric when the cell was run. All metrics of the test set were stored.
                row |= scored(self.task(setting), metric, json.loads(row["metrics"]))
                write_rows(self.folder, "runs", plan.key, [row])
            progress.finished(plan, row, resumed=True)
        return row is not None

    def task(self, setting: Setting) -> Task:
        """The task of a setting, built when it is first needed, and checked for leaks."""
        key = setting.task, setting.model, setting.seed
        if key not in self._tasks:
            task = setting.build()
            task.check()
            while len(self._tasks) >= KEPT_TASKS:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[key] = task
        return self._tasks[key]

    def metric(self, setting: Setting) -> str:
        """The metric by which cells of a setting are compared."""
        key = setting.task, setting.model
        if key not in self._metrics:
            self._metrics[key] = metric_of(self.task(setting), self.grid.metric)
        return self._metrics[key]

    def _plan(self, cell: Cell) -> CellPlan:
        """The plan of one cell, with its key and that of its ranking."""
        task = self.task(cell.setting)
        contents = task.identity
        selector, installed = build_selector(cell.entry.method, cell.entry.options), version(DISTRIBUTION)
        ranking = ""
        if isinstance(selector, Ranker):
            ranking = Rankings(self.folder).key(cell.setting, selector, contents, installed)
        return plan_cell(task, cell, cell.key(contents, installed), ranking)

    def _print_unrunnable(self, plans: Sequence[CellPlan]) -> None:
        """Print why cells are not run, once for each method, budget, task and model size."""
        for status in (NOT_APPLICABLE, OVER_BUDGET):
            reasons: dict[tuple[str, str], str] = {}
            for p in plans:
                if p.status == status:
                    method = p.cell.label if status == NOT_APPLICABLE else f"{p.cell.label} at {p.cell.budget}"
                    setting = " ".join(filter(None, [p.cell.setting.task, p.cell.setting.model]))
                    reasons.setdefault((method, setting), p.note)
            for (method, setting), note in reasons.items():
                self.console.print(
                    f"{status}: {method}{f' ({setting})' * bool(setting)}: {note}",
                    style="yellow",
                    markup=False,
                    soft_wrap=True,
                )

    def _finished(self, plan: CellPlan) -> dict[str, Any] | None:
        """The stored row of `runs` of a cell with a score; None if it has none."""
        path = self.folder / "tables" / "runs" / f"{plan.key}.parquet"
        if plan.status or not path.exists():
            return None
        row: dict[str, Any] = read_table_file(path, "runs").to_pylist()[0]
        return row if row["status"] == DONE else None

    def _attempt(self, plan: CellPlan, journals: Journals, progress: GridProgress) -> bool:
        """Run one cell, unless another process holds its lock; False if one does."""
        try:
            with held_by_first(self.folder / "locks" / plan.key):
                if not active_group().on_rank_zero(lambda: self._show_finished(plan, progress)):
                    progress.started(plan)
                    progress.finished(plan, self._run(plan, journals), resumed=False)
        except LockedError:
            return False
        return True

    def _run(self, plan: CellPlan, journals: Journals) -> dict[str, Any]:
        """Run one cell and write its rows. The row of `runs` comes last: with it the cell counts as finished."""
        setting, world = plan.cell.setting, active_group()
        if plan.status:
            row = cell_row(plan, plan.status, journals.code, error=plan.note)
            world.on_rank_zero(lambda: str(write_rows(self.folder, "runs", plan.key, [row])))
            return row
        task, metric = self.task(setting), self.metric(setting)
        folder = self.folder / "cells" / plan.key
        partial = folder.with_name(f".{plan.key}.partial")

        def work() -> RunRow:
            # A resumed run writes its TensorBoard files again from the start.
            world.on_rank_zero(lambda: _make_empty(partial))
            return run_cell(plan, task, metric, journals, partial, self.console, self.grid.track)

        started = time.perf_counter()
        try:
            record = journals.begin(plan.key, work)
        except (Interrupted, ProcessError):
            raise
        except Exception as error:  # one failed cell must not end the grid
            if world.size > 1 and not (isinstance(error, CadsError) or is_shared(error)):
                # Only this process has seen the error. The others wait for it, so it must end the command.
                raise
            if not isinstance(error, CadsError):
                log.error("%s failed", plan.key, exc_info=error)
            status = OVER_BUDGET if isinstance(error, BudgetError) else FAILED
            row = cell_row(
                plan,
                status,
                journals.code,
                task,
                metric=metric,
                maximised=metric in task.maximised,
                error=f"{type(error).__name__}: {error}",
                seconds=time.perf_counter() - started,
            )
            world.on_rank_zero(lambda: str(write_rows(self.folder, "runs", plan.key, [row])))
            return row
        with journals.interrupts.held():
            world.on_rank_zero(lambda: self._write_cell(plan, partial, folder, record))
            world.on_rank_zero(lambda: journals.forget(plan.key))
        return record.run

    def _write_cell(self, plan: CellPlan, partial: Path, folder: Path, record: RunRow) -> None:
        """Move the files of a finished cell from `partial` to `folder`, then write its rows."""
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        write_rows(self.folder, "selections", plan.key, record.selections)
        write_rows(self.folder, "examples", plan.key, record.examples)
        write_rows(self.folder, "runs", plan.key, [record.run])


def _make_empty(folder: Path) -> None:
    """Make `folder`, without anything that was in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def code_digest(methods: Iterator[str]) -> str:
    """A hash of the sources of this package and of those that the methods come from."""
    return source_digest({"cads", *(selector_class(m).__module__.split(".")[0] for m in methods)})
