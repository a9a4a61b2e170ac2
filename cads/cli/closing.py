"""What `cads train` says at its end: where the budget went, and how the result compares with what is free."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.errors import CadsError
from cads.study.analysis.points import (
    MethodPoint,
    best_of,
    higher_is_better,
    in_percent,
    interval_text,
    points_of,
    score_text,
)
from cads.study.analysis.verdicts import quoted_name, shown_name
from cads.study.cells import DISTRIBUTION
from cads.study.grid import Setting, cells, read_grid, settings
from cads.study.tables import GRID_FILE, read_runs
from cads.task import Metrics, Task
from cads.training.speed import STAGE as SPEED_TEST

log = logging.getLogger(__name__)

SAME_BUDGET = 1e-3
"""Budgets that differ by less than this share are one."""
SMALLEST_REST = 0.005
"""Share of a budget below which what is left of it is not said."""


def budget_sentence(budget: Mapping[str, Any], ledger: Ledger, end: str = "") -> str:
    """What the budget went to.

    Args:
        budget: as `results.json` has it: `given` in words, `flops`, and whether it `covers_selection`.
        ledger: of the whole run.
        end: why training ended before the budget did, in words.
    """
    total, covers = budget["flops"], budget["covers_selection"]
    selection, training = ledger.total(SELECT).flops, ledger.total(TRAIN).flops
    # The FLOPs of a time are those of what measuring the speed left of it.
    measuring = ledger.entries[SELECT, SPEED_TEST].flops if (SELECT, SPEED_TEST) in ledger.entries else 0.0
    is_beside = measuring > 0 and (not covers or selection + training > total)
    if is_beside:
        selection -= measuring
    given = "" if budget["given"].endswith("FLOPs") else f" ({budget['given']})"
    parts = [f"training {100 * training / total:.1f}%"]
    if covers or not selection:
        parts.append(f"selection {100 * selection / total:.1f}%")
    rest = 1 - (training + (selection if covers else 0.0)) / total
    if rest > SMALLEST_REST:
        parts.append(f"{100 * rest:.1f}% unspent")
    why = f" ({end})" if end and rest > SMALLEST_REST else ""
    sentence = f"The budget of {total:.3g} FLOPs{given} went to: {', '.join(parts)}{why}."
    if selection and not covers:
        sentence += f" Selection came on top: {selection:.3g} FLOPs, {100 * selection / total:.1f}% of the budget."
    if is_beside:
        sentence += f" Before that, {measuring:.3g} FLOPs went to measuring the speed."
    return sentence


def free_sentences(out: Path, task: Task, objects: Namespace, budget_flops: float, metrics: Metrics) -> list[str]:
    """How the metrics compare with those of free references that a grid near `out` measured, or how to measure them.

    A grid counts if it lies in `out`, beside it or around it, and has this task, recipe and data.

    Args:
        objects: `task` and `train`, the configuration of the run.
    """
    told = "What is free (target-only, joint, full) was not measured on this data"
    for folder in _studies(out):
        setting = _same_setting(folder, task, objects)
        if setting is None:
            continue
        place = setting.task or task.name, setting.model
        runs = [row for row in read_runs(folder) if (row["task"], row["model"]) == place]
        free = [p for p in points_of(runs) if p.free and p.metric in metrics]
        here = [p for p in free if abs(p.budget_flops - budget_flops) <= SAME_BUDGET * budget_flops]
        if here:
            return _comparison(folder, here, metrics[here[0].metric])
        if free:
            budgets = ", ".join(dict.fromkeys(p.budget for p in free))
            told = f"What is free was measured in {folder}, and not at this budget (at {budgets})"
    return [f"{told}: `cads compare` runs it, and then this comparison stands here."]


def _comparison(folder: Path, free: list[MethodPoint], score: float) -> list[str]:
    metric, best = free[0].metric, best_of(free)
    ranked = sorted(free, key=lambda p: -p.mean if p.maximised else p.mean)
    named = "; ".join(f"{shown_name(p.method)} {interval_text(p)}" for p in ranked)
    unit = " %" if in_percent(metric) else ""
    difference = (score - best.mean) * (1 if higher_is_better(metric) else -1)
    size = f"{100 * abs(difference):.2f} points" if in_percent(metric) else f"{abs(difference):.4g}"
    seeds = "one seed" if len(best.seeds) == 1 else f"means of {len(best.seeds)} seeds"
    return [
        f"Free at this budget, by {folder} ({metric}, {seeds}): {named}.",
        f"This run: {score_text(score, metric)}{unit}, {size} {'better' if difference >= 0 else 'worse'} than the best "
        f"that is free ({quoted_name(best.method)}). One run tells little where the intervals are wide.",
    ]


def _studies(out: Path) -> Iterator[Path]:
    """Folders of grids in `out`, around it and beside it."""
    around = out.resolve().parent
    beside = sorted(path for path in around.iterdir() if path.is_dir()) if around.is_dir() else []
    for folder in dict.fromkeys([out, out.parent, *(out.parent / path.name for path in beside)]):
        if (folder / GRID_FILE).is_file() and (folder / "tables" / "runs").is_dir():
            yield folder


def _same_setting(folder: Path, task: Task, objects: Namespace) -> Setting | None:
    """The setting of the grid in `folder` that has this task, recipe and data; None if there is none."""
    try:
        grid = read_grid(folder / "config.yaml")
        keys = set(json.loads((folder / GRID_FILE).read_text())["cells"])
        for setting in settings(grid):
            own = Setting(setting.task, setting.model, setting.seed, setting.kind, objects.task, objects.train)
            if type(setting.config) is not type(objects.task) or setting.describe() != own.describe():
                continue
            if any(cell.key(task.identity, version(DISTRIBUTION)) in keys for cell in cells(grid, setting)):
                return setting
    except (CadsError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the grid in %s is not compared with: %s", folder, error)
    return None
