"""The plan of a grid and its price, printed before anything is run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cads.accounting.throughput import matmul_flops_per_second
from cads.accounting.units import duration
from cads.data.token_batches import device_type
from cads.study.cells import CellPlan, price


def dry_run(plans: Sequence[CellPlan], done: Collection[str], console: Console) -> None:
    """Print the plan and the cost of every cell, and the cost of all. Nothing is trained.

    Args:
        done: keys of the cells that are finished.
    """
    table = Table(title="cells, FLOPs (means over seeds)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "budget", "method"):
        table.add_column(name, overflow="fold")
    for name in ("seeds", "selection", "training"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    notes: dict[str, int] = {}
    rows: dict[tuple[str, str, str], list[CellPlan]] = {}
    for p in plans:
        setting = " ".join(filter(None, [p.cell.setting.task, p.cell.setting.model])) or p.cell.setting.kind
        rows.setdefault((setting, str(p.cell.budget), p.cell.label), []).append(p)
    for (setting, budget, label), group in rows.items():
        running = [p for p in group if not p.status]
        costs = ["-", "-"]
        if running:
            parts = ([p.selection_flops for p in running], [p.train_flops for p in running])
            costs = [f"{np.mean(flops):.3g}" for flops in parts]
        remarks = dict.fromkeys(": ".join(filter(None, [p.status, p.note])) for p in group)
        marks = " ".join(f"[{notes.setdefault(text, len(notes) + 1)}]" for text in remarks if text)
        seeds = f"{len(running)} of {len(group)}" if 0 < len(running) < len(group) else str(len(group))
        table.add_row(setting, budget, label, seeds, *costs, Text(marks))
    console.print(table)
    for text, number in notes.items():
        console.print(f"[{number}] {text}", markup=False, highlight=False, soft_wrap=True)
    todo = [p for p in plans if p.key not in done]
    selection_flops, train_flops = price(todo)
    recipe = plans[0].cell.setting.train
    rate = matmul_flops_per_second(device_type(), recipe.precision)
    total = selection_flops + train_flops
    finished = f", {len(done)} finished" if done else ""
    console.print(
        f"{sum(not p.status for p in todo)} of {len(plans)} cells to run{finished}: {selection_flops:.4g} FLOPs of "
        f"selection (each ranking made once) and {train_flops:.4g} of training, {total:.4g} in all; at least "
        f"{duration(total / rate)} at {rate:.3g} FLOP/s (matrix products of this machine)",
        highlight=False,
        soft_wrap=True,
    )
