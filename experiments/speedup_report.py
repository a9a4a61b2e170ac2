"""Tables and figure of the speed-up: regret against selection FLOPs, and the cost to reach a given regret."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from cads.study.analysis.points import CONFIDENCE, half_width
from cads.study.report.style import FAINT, INK, MethodStyle, method_styles

mpl.use("Agg")

TARGETS = (0.01, 0.005)
"""Regrets in accuracy for which the tables show the cost."""
BUDGET, SOURCES = "passes", "sources"
"""The variables of the two parts: the budget in passes over the pool, and the number of sources."""

NOTE = (
    "Regret in points of test accuracy, against the best subset of the sources that is known (all are trained up to 6 "
    "sources; above, a search gives a bound). Costs are selection FLOPs in units of C, the training budget, all "
    "included; seconds are CPU seconds of selection, which other jobs on the machine hardly change. A method reaches "
    "a regret at the least cost in its sweep whose mean over worlds and seeds is that low; cost 0 is the full pool, "
    "which is what a method returns that cannot afford one step. `x` is the cost or time in units of that of the "
    "first method; `> x`: not reached within the sweep, whose largest cost stands for it; `< x`: the first method "
    "does not reach it. The sweep of `unrolled` has more points, each a chance to be low, so the ratios flatter it "
    "rather than `search`. Steps follow `baselines/bilevel.py` (K = 5 masks, each trained for C or the share named) "
    "and `experiments/unrolled.py` (weights of sources; the derivative through the last 64 steps of "
    "a training for C or the share named, of a loss that must be differentiable; the inner SGD has the rate 0.1 where "
    "none is named)."
)


@dataclass
class Point:
    """One method at one allowance with one seed.

    Attributes:
        world: its name. sources: their number. budget: in passes over the pool. method: its label.
        allowance: for selection, in units of C. cost: the FLOPs spent, in units of C.
        seconds: wall-clock time of selection. cpu_seconds: CPU time of the process.
        chosen: mean weight of the examples of each source, shape (S,).
        regret_val: regret in calibrated test loss, nats. regret_acc: regret in test accuracy, between 0 and 1.
    """

    world: str
    sources: int
    budget: float
    method: str
    seed: int
    allowance: float
    cost: float
    seconds: float
    cpu_seconds: float
    chosen: list[float]
    regret_val: float
    regret_acc: float


@dataclass(frozen=True)
class Mean:
    """One allowance of one method: means over worlds and seeds, and half the interval of the regret over seeds."""

    cost: float
    cpu_seconds: float
    regret: float
    width: float


Curve = list[Mean]
"""A sweep by rising cost; an allowance that spends no more than the one before is left out."""


def curve(points: Sequence[Point]) -> Curve:
    """The sweep of one method."""
    means: Curve = []
    for allowance in sorted({p.allowance for p in points}):
        at_allowance = [p for p in points if p.allowance == allowance]
        by_seed = [
            float(np.mean([p.regret_acc for p in at_allowance if p.seed == s]))
            for s in sorted({p.seed for p in at_allowance})
        ]
        cost = float(np.mean([p.cost for p in at_allowance]))
        if not means or cost > means[-1].cost:
            cpu_seconds = float(np.mean([p.cpu_seconds for p in at_allowance]))
            means.append(Mean(cost, cpu_seconds, float(np.mean(by_seed)), half_width(by_seed)))
    return means


def reach(sweep: Curve, regret: float) -> Mean | None:
    """The point of least cost whose mean regret is at most `regret`, or None if there is none."""
    return next((m for m in sweep if m.regret <= regret), None)


def ratio(first: float | None, max_first: float, other: float | None, max_other: float) -> str:
    """`other` in units of `first`, or a bound on that where one of them is None.

    Args:
        first, other: cost or time of two methods to reach a regret; None if the sweep does not reach it.
        max_first, max_other: the largest cost or time of their sweeps.
    """
    if first is None and other is None:
        return "-"
    if first is None:
        return f"< {other / max_first:.2g}" if other is not None and max_first > 0 else "-"
    if first == 0:
        return "-"
    return f"> {max_other / first:.2g}" if other is None else f"{other / first:.2g}"


def summary_lines(points: Sequence[Point]) -> list[str]:
    """The sweep of one method as texts, one for each allowance: cost and regret in points."""
    return [f"{m.cost:.2f} C {100 * m.regret:.2f}" for m in curve(points)]


def markdown(by_budget: Sequence[Point], by_sources: Sequence[Point]) -> str:
    """All tables."""
    parts = [NOTE + "\n"]
    for points, variable in ((by_budget, BUDGET), (by_sources, SOURCES)):
        if not points:
            continue
        worlds = len({p.world for p in points}) if variable == BUDGET else 1
        setting = f"mean of {worlds} worlds" if variable == BUDGET else f"{points[0].budget:g} passes"
        seeds = len({p.seed for p in points})
        parts.append(f"## By {'budget' if variable == BUDGET else 'number of sources'}: {setting}, {seeds} seeds\n")
        parts += [_reaching(points, variable), _equal(points, variable), _sweeps(points, variable)]
        if variable == BUDGET and worlds > 1:
            parts.append(_by_world(points))
    return "\n".join(parts)


def _key(variable: str) -> Callable[[Point], float]:
    return (lambda p: p.budget) if variable == BUDGET else (lambda p: p.sources)


def _curves(points: Sequence[Point], variable: str) -> dict[float, dict[str, Curve]]:
    """The sweep of each method, by the value of the variable and the label."""
    key = _key(variable)
    labels = list(dict.fromkeys(p.method for p in points))
    curves: dict[float, dict[str, Curve]] = {}
    for value in sorted({key(p) for p in points}):
        at_value = [p for p in points if key(p) == value]
        curves[value] = {label: curve([p for p in at_value if p.method == label]) for label in labels}
    return curves


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _spent(sweep: Curve, regret: float) -> tuple[float | None, float | None]:
    """Cost and CPU seconds to reach a mean regret of at most `regret`; None if the sweep does not reach it."""
    mean = reach(sweep, regret)
    return (None, None) if mean is None else (mean.cost, mean.cpu_seconds)


def _reaching(points: Sequence[Point], variable: str) -> str:
    """Cost and CPU time to reach each target, with their ratios."""
    columns = [variable, "method"]
    for target in TARGETS:
        columns += [f"C to <= {100 * target:g}", "x", "CPU seconds", "x"]
    rows = []
    for value, sweeps in _curves(points, variable).items():
        first = next(iter(sweeps.values()))
        for label, sweep in sweeps.items():
            row = [f"{value:g}", label]
            for target in TARGETS:
                ours, theirs = _spent(first, target), _spent(sweep, target)
                row += [
                    f"> {sweep[-1].cost:.2f}" if theirs[0] is None else f"{theirs[0]:.2f}",
                    ratio(ours[0], first[-1].cost, theirs[0], sweep[-1].cost),
                    "-" if theirs[1] is None else f"{theirs[1]:.1f}",
                    ratio(ours[1], first[-1].cpu_seconds, theirs[1], sweep[-1].cpu_seconds),
                ]
            rows.append(row)
    return _table(columns, rows)


def _equal(points: Sequence[Point], variable: str) -> str:
    """Costs of the other methods for the regret of the first method, at each of its allowances.

    A regret below 0 counts as 0, since no subset has a true regret below 0.
    """
    labels = list(dict.fromkeys(p.method for p in points))
    rows = []
    for value, sweeps in _curves(points, variable).items():
        for mean in sweeps[labels[0]]:
            if not mean.cost:
                continue
            row = [f"{value:g}", f"{mean.cost:.2f}", f"{100 * mean.regret:.2f}"]
            for label in labels[1:]:
                theirs, _ = _spent(sweeps[label], max(0.0, mean.regret))
                row.append(ratio(mean.cost, mean.cost, theirs, sweeps[label][-1].cost))
            rows.append(row)
    title = "Selection FLOPs for the same regret, in units of those of the first method:\n\n"
    return title + _table([variable, f"{labels[0]}, C", "regret", *labels[1:]], rows)


def _sweeps(points: Sequence[Point], variable: str) -> str:
    rows = []
    for value, sweeps in _curves(points, variable).items():
        for label, sweep in sweeps.items():
            width = [f" ± {100 * m.width:.2f}" if np.isfinite(m.width) else "" for m in sweep]
            texts = [f"{m.cost:.2f} C: {100 * m.regret:.2f}{w}" for m, w in zip(sweep, width, strict=True)]
            rows.append([f"{value:g}", label, "; ".join(texts)])
    title = f"Regret at each cost (± half a {CONFIDENCE:.0%} t-interval over seeds):\n\n"
    return title + _table([variable, "method", "sweep"], rows)


def _by_world(points: Sequence[Point]) -> str:
    labels = list(dict.fromkeys(p.method for p in points))
    rows = []
    for world in sorted({p.world for p in points}):
        for value, sweeps in _curves([p for p in points if p.world == world], BUDGET).items():
            row = [world, f"{value:g}"]
            for label in labels:
                mean = reach(sweeps[label], TARGETS[0])
                row.append(f"> {sweeps[label][-1].cost:.2f}" if mean is None else f"{mean.cost:.2f}")
            rows.append(row)
    title = f"C to <= {100 * TARGETS[0]:g} points, world by world:\n\n"
    return title + _table(["world", "passes", *labels], rows)


def draw(by_budget: Sequence[Point], by_sources: Sequence[Point], path: Path) -> None:
    """Draw regret against selection FLOPs: a row of panels for each part."""
    import matplotlib.pyplot as plt

    parts = [(_curves(p, variable), variable) for p, variable in ((by_budget, BUDGET), (by_sources, SOURCES)) if p]
    labels = list(dict.fromkeys(p.method for p in (*by_budget, *by_sources)))
    styles = method_styles((label, label.split(",")[0]) for label in labels)
    width = max(len(curves) for curves, _ in parts)
    figure, grid = plt.subplots(
        len(parts),
        width,
        figsize=(3.2 * width + 1.6, 3.4 * len(parts)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (curves, variable) in zip(grid, parts, strict=True):
        for axes, (value, sweeps) in zip(row, curves.items(), strict=False):
            for label, sweep in sweeps.items():
                _line(axes, sweep, styles[label], label)
            for target in TARGETS:
                axes.axhline(100 * target, color=FAINT, linewidth=0.8, linestyle=":")
            axes.set_xscale("symlog", linthresh=0.3)
            axes.set_yscale("symlog", linthresh=2)
            axes.set_title(f"{value:g} {variable}", color=INK)
            axes.set_xlabel("selection FLOPs / C")
            axes.grid(alpha=0.25)
        means = [m for sweeps in curves.values() for sweep in sweeps.values() for m in sweep]
        # The panels of a row share their axis: its limits follow from the points of all panels.
        row[0].set_ylim(min(-1.0, *(120 * m.regret for m in means)), max(2.0, *(120 * m.regret for m in means)))
        row[0].set_ylabel("regret (points of accuracy)")
        for axes in row[len(curves) :]:
            axes.set_axis_off()
    costs = [p.cost for p in (*by_budget, *by_sources)]
    grid[0][0].set_xlim(-0.03, 1.3 * max(1.0, *costs))
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes: mpl.axes.Axes, sweep: Curve, style: MethodStyle, label: str) -> None:
    axes.plot(
        [m.cost for m in sweep],
        [100 * m.regret for m in sweep],
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        markersize=5,
        label=label,
    )
