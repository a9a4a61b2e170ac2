"""What `cads` drew of each data set of P3, as a figure: a panel for each target."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.p3_data import data_set_of
from experiments.p3_report import CADS, Run, ratios

OWN, OTHERS, LINE = "#D55E00", "#0072B2", "#BBBBBB"
NARROWEST = (0.75, 1.25)
"""The horizontal axis holds at least these ratios: what is nearly even shall look so."""
ROW = 0.17
"""Inches a data set."""


def draw(runs: Sequence[Run], path: Path) -> bool:
    """Draw the ratio of the share that was drawn to that of the pool, means over seeds; whether there was any.

    Args:
        runs: rows of the table `runs`. Each target is shown at the largest budget at which `cads` drew from the pool.
    """
    from matplotlib.figure import Figure

    panels = _panels(runs)
    if not panels:
        return False
    rows = max(len(found) for found in panels.values())
    figure = Figure(figsize=(0.4 + 3.0 * len(panels), 1.2 + ROW * rows), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for ax, ((target, budget), found) in zip(axes, panels.items(), strict=True):
        _panel(ax, target, found)
        ax.set_title(f"{target}, {budget}", fontsize=9, loc="left")
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low, NARROWEST[0]), max(high, NARROWEST[1]))
    figure.supxlabel("share of what was drawn from the pool / share of the pool", fontsize=9)
    figure.savefig(path, dpi=110)
    return True


def _panels(runs: Sequence[Run]) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """Data sets with their ratios, the highest first, by target and budget."""
    by_task: dict[str, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for row in runs:
        if row["method"] == CADS and row["n_selected"]:
            by_task[row["task"]][float(row["budget"].split()[0])].append(row)
    panels = {}
    for task, by_budget in by_task.items():
        members = by_budget[max(by_budget)]
        shares: list[Mapping[str, float]] = [json.loads(row["shares"]) for row in members]
        panels[task, members[0]["budget"]] = [(name, ratio) for name, _, _, ratio in ratios(shares, data_set_of)]
    return panels


def _panel(ax: Any, target: str, found: Sequence[tuple[str, float]]) -> None:
    names, values = [name for name, _ in found], [ratio for _, ratio in found]
    places = range(len(found))
    colours = [OWN if name == target else OTHERS for name in names]
    ax.axvline(1, color=LINE, linewidth=0.8)
    ax.hlines(places, [1] * len(found), values, colors=colours, linewidth=1.2)
    ax.scatter(values, places, c=colours, s=16, zorder=3)
    ax.set_yticks(places, names, fontsize=7)
    for label, colour in zip(ax.get_yticklabels(), colours, strict=True):
        label.set_color(OWN if colour == OWN else "black")
    ax.invert_yaxis()
    ax.tick_params(axis="x", labelsize=7)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
