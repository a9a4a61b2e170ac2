"""The display of a running grid: a live table of methods and budgets, FLOPs spent, and the time that remains."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cads.accounting.units import duration
from cads.study.cells import CellPlan, price
from cads.study.tables import DONE

REFRESHES = 2.0
"""Of the live table, per second."""


class GridProgress:
    """A live table on a terminal; elsewhere, one line for each cell.

    Args:
        console: for the output. plans: of the cells to follow.
    """

    def __init__(self, console: Console, plans: Sequence[CellPlan]) -> None:
        self._console = console
        self._plans = list(plans)
        self._rows: dict[str, dict[str, Any]] = {}
        self._running = ""
        self._began = time.perf_counter()
        self._spent_now = 0.0
        self._live = (
            Live(console=console, get_renderable=self._table, refresh_per_second=REFRESHES, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> GridProgress:
        self._began = time.perf_counter()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, plan: CellPlan) -> None:
        """A cell begins."""
        self._running = f"{plan.cell.label}, {plan.cell.budget}, seed {plan.cell.setting.seed}"

    def finished(self, plan: CellPlan, row: dict[str, Any], *, resumed: bool) -> None:
        """A cell has ended with this row of `runs`; `resumed`: in an earlier run."""
        remaining_before = self._remaining_flops()
        self._rows[plan.key] = row
        if resumed:
            return
        if row["status"] == DONE:
            self._spent_now += remaining_before - self._remaining_flops()
            result = f"{row['metric']} {row['score']:.4f} in {row['seconds']:.1f} s"
        elif plan.status:
            # The reason has been printed before the first cell.
            result = row["status"]
        else:
            result = f"{row['status']}: {row['error']}"
        if self._live is None:
            done = f"{len(self._rows)}/{len(self._plans)}"
            setting = plan.cell.setting
            labels = [setting.task, setting.model, f"seed {setting.seed}", str(plan.cell.budget)]
            text = f"{done} {' '.join(filter(None, labels))}: {plan.cell.label:14s} {result}{self._time_left()}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def made_by_others(self, code: str) -> int:
        """Number of finished cells whose code digest is not `code`."""
        return sum(row.get("code") != code for row in self._rows.values())

    def footer(self) -> str:
        """Cells done, FLOPs spent, remaining FLOPs and time."""
        remaining = self._remaining_flops()
        done = [p for p in self._plans if p.key in self._rows and self._rows[p.key]["status"] == DONE]
        text = (
            f"{len(self._rows)} of {len(self._plans)} cells, {sum(price(done)):.3g} FLOPs spent, {remaining:.3g} to go"
        )
        text += self._time_left()
        return f"{text}; {self._running}" if remaining else text

    def _remaining_flops(self) -> float:
        """FLOPs of the cells that have not ended. A ranking that a finished cell has used costs nothing more."""
        done = {key for key, row in self._rows.items() if row["status"] == DONE}
        finished_rankings = {p.ranking for p in self._plans if p.ranking and p.key in done}
        todo = [p for p in self._plans if p.key not in self._rows]
        return sum(price([replace(p, selection_flops=0.0) if p.ranking in finished_rankings else p for p in todo]))

    def _time_left(self) -> str:
        remaining = self._remaining_flops()
        if not (remaining and self._spent_now):
            return ""
        rate = self._spent_now / (time.perf_counter() - self._began)
        return f", about {duration(remaining / rate)} left"

    def _table(self) -> Group:
        scores: dict[tuple[str, str], list[float]] = defaultdict(list)
        states: dict[tuple[str, str], list[str]] = defaultdict(list)
        n_cells: dict[tuple[str, str], int] = defaultdict(int)
        for plan in self._plans:
            position = _row_name(plan), str(plan.cell.budget)
            n_cells[position] += 1
            row = self._rows.get(plan.key)
            if row is not None and row["status"] == DONE:
                scores[position].append(row["score"])
            elif row is not None:
                states[position].append(row["status"])
        table = Table(title="mean score (cells done)", title_justify="left")
        table.add_column("method", no_wrap=True)
        budgets = list(dict.fromkeys(str(p.cell.budget) for p in self._plans))
        for budget in budgets:
            table.add_column(budget, justify="right", no_wrap=True)
        for name in dict.fromkeys(map(_row_name, self._plans)):
            texts = []
            for budget in budgets:
                values, statuses = scores[name, budget], states[name, budget]
                text = f"{sum(values) / len(values):.4f} ({len(values)}/{n_cells[name, budget]})" if values else ""
                texts.append(text or (statuses[0] if statuses else "."))
            table.add_row(name, *texts)
        return Group(table, Text(self.footer()))


def _row_name(plan: CellPlan) -> str:
    """The label of the table row that a cell belongs to: task, model size and method."""
    return " ".join(filter(None, [plan.cell.setting.task, plan.cell.setting.model, plan.cell.label]))
