"""How far each method's test loss is above that of `cads`, as a figure: a panel for each budget, a row for each method.

A dot is a target's mean over seeds, a bar the mean over targets. Methods are in the order of their mean over all
budgets at which they have a result; what the budget did not buy is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cads.study.analysis.points import points_of
from cads.study.analysis.verdicts import shown_name
from experiments.p3_report import CADS, Run, pairs

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
"""Of the targets; of a palette that is told apart by the colour-blind."""
MEAN, LINE = "#222222", "#BBBBBB"
NEAREST = 0.05
"""Nats around 0 in which the horizontal axis is linear; beyond, it is logarithmic."""
NARROWEST = 7.0
"""Inches of the figure's width, at least: the words below its axis need them."""
ROW = 0.23
"""Inches a method."""


def draw_rivals(runs: Sequence[Run], path: Path) -> bool:
    """Draw the differences; whether there were any."""
    from matplotlib.figure import Figure

    found = _differences(runs)
    budgets = list(dict.fromkeys(budget for budget, _ in found))
    targets = list(dict.fromkeys(target for by_target in found.values() for target in by_target))
    if not found:
        return False
    means: dict[str, list[float]] = defaultdict(list)
    for (_, method), by_target in found.items():
        means[method].append(float(np.mean(list(by_target.values()))))
    methods = sorted(means, key=lambda name: float(np.mean(means[name])))
    height = 1.1 + ROW * len(methods)
    figure = Figure(figsize=(max(NARROWEST, 1.8 + 2.1 * len(budgets)), height), layout="constrained")
    axes: Any = figure.subplots(1, len(budgets), squeeze=False, sharey=True, sharex=True)[0]
    for ax, budget in zip(axes, budgets, strict=True):
        ax.axvline(0, color=MEAN, linewidth=1)
        for row, method in enumerate(methods):
            by_target = found.get((budget, method), {})
            if not by_target:
                continue
            ax.hlines(row, 0, float(np.mean(list(by_target.values()))), color=LINE, linewidth=4)
            for target, value in by_target.items():
                ax.scatter(value, row, s=18, color=COLOURS[targets.index(target) % len(COLOURS)], zorder=3)
        ax.set_xscale("symlog", linthresh=NEAREST)
        ax.set_xticks([-0.1, 0, 0.1, 1], ["-0.1", "0", "0.1", "1"])
        ax.set_title(budget, fontsize=9, loc="left")
        ax.set_yticks(range(len(methods)), [shown_name(name) for name in methods], fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    axes[0].invert_yaxis()
    marks = [figure.axes[0].scatter([], [], s=18, color=COLOURS[i % len(COLOURS)]) for i in range(len(targets))]
    figure.legend(marks, targets, loc="outside upper right", ncols=len(targets), fontsize=8, frameon=False)
    figure.supxlabel(
        "test loss above that of cads, nats (right of the line: worse than cads; logarithmic beyond 0.05)", fontsize=9
    )
    figure.savefig(path, dpi=110)
    return True


def _differences(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, float]]:
    """By budget and method, for each target: the mean difference to `cads` over the seeds that both have."""
    points = points_of(runs)
    ours = {(p.task, p.budget): p for p in points if p.method == CADS}
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for p in points:
        if p.method != CADS and (p.task, p.budget) in ours:
            over_seeds = pairs(p, ours[p.task, p.budget])
            if len(over_seeds):
                found[p.budget, p.method][p.task] = float(over_seeds.mean())
    return dict(found)
