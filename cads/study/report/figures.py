"""The figures of a study. Each is a pure function of points, fits or selections, and is legible on a phone.

Figures 1-6 are those of CCDS (Yin and Rush, ICLR 2025, arXiv 2410.16208); one panel is one figure.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from cads.study.analysis.fits import SHARED_TASKS, GroupFits, fixed_selection
from cads.study.analysis.frontier import PerformanceCurve, amortised_flops
from cads.study.analysis.points import MethodPoint, in_percent, place_name
from cads.study.report.style import FAINT, INK, SERIES, MethodStyle

WIDTH, AXES_HEIGHT, LEGEND_ROW = 4.5, 2.9, 0.21
"""Inches. In a figure that is shown 350 pixels wide, text of `TEXT` points is then about as many pixels high."""
TEXT = 10.5
LONGEST_LABEL, LONGEST_STAGE = 22, 50
MAX_LINES = 8
"""Methods in one panel. More methods are divided among several panels, so that their lines stay distinct."""
ANCHORS = ("full", "cads", "search")
"""Names of methods that are in every panel, for comparison."""
MAX_NUMBERED = 12
"""Methods of the largest matrix with numbers in it. In a larger one they would overlap."""
MATRIX_TEXT = 6.5
"""Size of the labels of a matrix without numbers, in points: as high as its rows."""
SHOWN_POINTS = 25.0
"""Range of figures of scores, in percentage points below the best. Lower scores are only in the table."""
CURVE_POINTS = 200
PNG_DPI = 180
MARKS_BY_TASKS, LINES_BY_TASKS = "osD^", ("-", "--", "-.", ":")
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT,
    "xtick.labelsize": TEXT - 1,
    "ytick.labelsize": TEXT - 1,
    "legend.fontsize": TEXT - 1,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
TOTAL, TRAINING = "total FLOPs (selection + training)", "training FLOPs"


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its title and caption.

    Attributes:
        name: of its files. title: above the figure. caption: below the figure, in sentences. figure: of Matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def _rendered(self) -> str:
        """The figure as SVG."""
        buffer = io.StringIO()
        with mpl.rc_context({**RC, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        # The layout is slow, and the same for every format: it is not computed again.
        self.figure.set_layout_engine("none")
        return buffer.getvalue()

    def svg(self) -> str:
        """SVG for a page: no background, ink in the colour of the page's text, ids that no other figure has."""
        text = self._rendered
        text = re.sub(r"<g id=\"[^\"]*\"", "<g", text[text.index("<svg") :]).replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))

    def save(self, folder: Path, formats: Sequence[str] = ("svg", "png")) -> None:
        """Write NAME.svg and NAME.png, on a white background."""
        folder.mkdir(parents=True, exist_ok=True)
        if "svg" in formats:
            text = self._rendered.replace("<svg ", '<svg style="background: white" ', 1)
            (folder / f"{self.name}.svg").write_text(text, encoding="utf-8")
        if "png" not in formats:
            return
        with mpl.rc_context(RC):
            self.figure.savefig(folder / f"{self.name}.png", facecolor="white", dpi=PNG_DPI)


@contextmanager
def _panels(
    labels: Sequence[int], columns: int = 2, height: float = AXES_HEIGHT
) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty figure of panels, one below the other; `labels`: number of labels of each legend, below its axes."""
    heights = [height + LEGEND_ROW * math.ceil(n / columns) for n in labels]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts: list[Any] = [figure]
        if len(heights) > 1:
            parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        panels = [part.add_subplot() for part in parts]
        for axes in panels:
            axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
        yield figure, panels
        for part, n in zip(parts, labels, strict=True):
            if n:
                part.legend(
                    loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.0, labelspacing=0.3
                )


@contextmanager
def _panel(n_labels: int, columns: int = 2, height: float = AXES_HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of one panel."""
    with _panels([n_labels], columns, height) as (figure, panels):
        yield figure, panels[0]


def _short(label: str, longest: int = LONGEST_LABEL) -> str:
    """A label for Matplotlib: shortened to `longest`, with `$` escaped.

    A zero-width space stands before a leading `_`, because Matplotlib hides labels that begin with it.
    """
    label = label if len(label) <= longest else f"{label[: longest - 1]}…"
    label = label.replace("$", r"\$")
    return f"\u200b{label}" if label.startswith("_") else label


def _score_label(metric: str) -> str:
    """The label of an axis of scores, with its unit."""
    unit = " (%)" if in_percent(metric) else "" if metric in ("score",) else " (nats)" if "loss" in metric else ""
    return f"test {metric}{unit}" if metric != "score" else "score (published, %)"


def _flops_axis(axes: Axes, label: str) -> None:
    """Make the horizontal axis logarithmic, with legible ticks."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    # Over less than two decades, powers of ten alone would give one or two labels.
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=7))
    axes.xaxis.set_major_formatter(LogFormatterSciNotation(base=10, minor_thresholds=(math.inf, math.inf)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shown_mean(p: MethodPoint) -> float:
    """The mean as figures show it: in percent if it is a share, never with its sign changed."""
    return 100 * p.mean if in_percent(p.metric) else p.mean


def _half_width(p: MethodPoint) -> float:
    """The half-width of the interval as figures show it; 0 if there is none."""
    return (100 if in_percent(p.metric) else 1) * np.nan_to_num(p.half_width)


def _limit(axes: Axes, points: Sequence[MethodPoint]) -> str:
    """Cut the vertical axis far below the best; returns the sentence about it, or ""."""
    if not in_percent(points[0].metric) or not points[0].maximised:
        return ""
    best: dict[str, float] = {}
    for p in points:
        best[p.budget] = max(best.get(p.budget, 0.0), _shown_mean(p))
    floor = max(0.0, min(best.values()) - SHOWN_POINTS)
    ceiling = min(100.5, max(best.values()) + SHOWN_POINTS / 8)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, floor), min(high, ceiling))
    if min(map(_shown_mean, points)) >= floor:
        return ""
    return f" What lies more than {SHOWN_POINTS:.0f} points below the best of every budget is in the table."


def _by_method(points: Sequence[MethodPoint]) -> dict[str, list[MethodPoint]]:
    """The points of each method, cheapest first."""
    lines: dict[str, list[MethodPoint]] = {}
    for p in points:
        lines.setdefault(p.method, []).append(p)
    return {method: sorted(line, key=lambda p: p.total) for method, line in lines.items()}


def _divided(points: Sequence[MethodPoint]) -> list[list[str]]:
    """The methods of each panel: one panel up to `MAX_LINES` methods, else the best first, with `ANCHORS` in each."""
    lines = _by_method(points)
    if len(lines) <= MAX_LINES:
        return [list(lines)]
    sign = 1 if points[0].maximised else -1
    best: dict[str, float] = {}
    for p in points:
        best[p.budget] = max(best.get(p.budget, -math.inf), sign * p.mean)
    mean_gaps = {method: np.mean([sign * p.mean - best[p.budget] for p in line]) for method, line in lines.items()}
    anchors = [method for method in lines if method in ANCHORS]
    others = sorted((method for method in lines if method not in anchors), key=lambda m: (-mean_gaps[m], m))
    n_panels = math.ceil(len(others) / (MAX_LINES - len(anchors)))
    return [[*anchors, *part] for part in np.array_split(np.array(others), n_panels)]


def _order_note(parts: Sequence[Sequence[str]]) -> str:
    """The sentence of a caption about the order of panels; "" for one panel."""
    if len(parts) == 1:
        return ""
    return " Panels go from methods near the best of each budget to those far from it, each on its own scale."


def _group_name(group: GroupFits) -> str:
    """The name of a group: task and model size."""
    return place_name(group.task, group.model)


def scores(
    group: GroupFits, styles: Mapping[str, MethodStyle], name: str, *, training_only: bool = False
) -> CaptionedFigure:
    """Scores with intervals over seeds, against total FLOPs or, as in CCDS figure 5, training FLOPs."""
    lines, parts, notes = _by_method(group.points), _divided(group.points), []
    with _panels(list(map(len, parts))) as (figure, panels):
        for axes, methods in zip(panels, parts, strict=True):
            for method in methods:
                style, line = styles[method], lines[method]
                axes.errorbar(
                    [p.train_flops if training_only else p.total for p in line],
                    [_shown_mean(p) for p in line],
                    yerr=[_half_width(p) for p in line],
                    color=style.colour,
                    marker=style.marker,
                    markersize=5,
                    linestyle=style.line,
                    linewidth=1.4,
                    elinewidth=0.8,
                    capsize=2,
                    label=_short(method),
                )
            _flops_axis(axes, TRAINING if training_only else TOTAL)
            axes.set_ylabel(_score_label(group.metric))
            notes.append(_limit(axes, [p for method in methods for p in lines[method]]))
    seeds = max(len(p.seeds) for p in group.points)
    text = f"Means of {seeds} seeds with 95 % t-intervals." if seeds > 1 else "One run each."
    if fewer := sorted({p.method for p in group.points if len(p.seeds) < seeds}):
        text += f" Of fewer seeds at some budget: {', '.join(fewer)}."
    axis = "the budget of training alone" if training_only else "everything spent, selection included"
    title = f"{_group_name(group)}: {group.metric} against {TRAINING if training_only else 'total FLOPs'}"
    caption = f"{text} The horizontal axis is {axis}.{_order_note(parts)}{max(notes, key=len)}"
    return CaptionedFigure(name, title, caption, figure)


def frontier(group: GroupFits, styles: Mapping[str, MethodStyle], name: str, *, fitted: bool) -> CaptionedFigure:
    """CCDS figures 2 and 3: points with the frontier line, and with the fitted curves if `fitted`."""
    lines, parts, notes = _by_method(group.points), _divided(group.points), []
    low, high = group.span
    grid = np.geomspace(low, max(high, low * 1.01), CURVE_POINTS)
    sign = 1 if group.maximised else -1
    curves = {curve.method: curve for curve in group.curves} if fitted else {}
    with _panels([len(part) + (group.line is not None) for part in parts]) as (figure, panels):
        for axes, methods in zip(panels, parts, strict=True):
            for method in methods:
                style, line = styles[method], lines[method]
                x, y = [p.total for p in line], [_shown_mean(p) for p in line]
                axes.plot(x, y, style.marker, color=style.colour, markersize=5, label=_short(method))
                if method in curves:
                    axes.plot(
                        grid,
                        sign * curves[method].predict(grid),
                        style.line,
                        color=style.colour,
                        linewidth=1.3,
                        marker=style.marker,
                        markersize=3,
                        markevery=CURVE_POINTS // 4,
                    )
            if group.line is not None:
                line_label = "frontier line"
                axes.plot(grid, sign * group.line.predict(grid), ":", color=INK, linewidth=1.2, label=line_label)
            _flops_axis(axes, TOTAL)
            axes.set_ylabel(_score_label(group.metric))
            notes.append(_limit(axes, [p for method in methods for p in lines[method]]))
    caption = "Means over seeds; the dotted line is the least-squares line through the points that no other dominates."
    if fitted:
        caption = "Curves: P(C) = P0 + (Pbar - P0)(1 - exp(-lambda (C - C_select) / C(D))), by bounded least squares."
        source = "the score of training on everything" if group.complete else "the best mean of the grid, not fitted"
        caption += f" Pbar is {source}."
        missing = ", ".join(group.not_fitted)
        caption += f" Too few budgets for {missing}." if missing else ""
        caption += f" No such curve describes {', '.join(group.unused)}." if group.unused else ""
        caption += "".join(f" {method}: {doubt}." for method, doubt in group.doubtful_costs.items())
    title = f"{_group_name(group)}: {'fits' if fitted else 'frontier'}"
    return CaptionedFigure(name, title, caption + _order_note(parts) + max(notes, key=len), figure)


def break_even_figures(group: GroupFits, styles: Mapping[str, MethodStyle], prefix: str) -> list[CaptionedFigure]:
    """CCDS figure 4: the scores if T tasks share the selection, one figure for each method with a fixed selection."""
    result: list[CaptionedFigure] = []
    grid = np.geomspace(*group.span, CURVE_POINTS)
    sign = 1 if group.maximised else -1
    for method, line in _by_method(group.points).items():
        if fixed_selection(line) <= 0:
            continue
        with _panel(len(SHARED_TASKS) + 1) as (figure, axes):
            for i, tasks in enumerate(SHARED_TASKS):
                axes.plot(
                    [amortised_flops(p.spent, p.train_flops, tasks) for p in line],
                    [_shown_mean(p) for p in line],
                    color=styles[method].colour,
                    alpha=1 - 0.2 * i,
                    marker=MARKS_BY_TASKS[i],
                    linestyle=LINES_BY_TASKS[i],
                    markersize=5,
                    label=f"T = {tasks}",
                )
            if group.line is not None:
                axes.plot(grid, sign * group.line.predict(grid), ":", color=INK, label="frontier line")
            _flops_axis(axes, "FLOPs a task, C_select / T + C_train")
            axes.set_ylabel(_score_label(group.metric))
        caption = f"What a task pays if T tasks share one selection by {method}; left of the line it pays off."
        result.append(
            CaptionedFigure(
                f"{prefix}-{len(result) + 1}", f"{_group_name(group)}: break-even of {method}", caption, figure
            )
        )
    return result


def overlap_figure(
    names: Sequence[str], matrix: np.ndarray, expected: np.ndarray, title: str, name: str
) -> CaptionedFigure:
    """CCDS figure 6: Jaccard overlap of selections, and of random ones of the same sizes, both of shape (M, M)."""
    cells = np.tril(matrix) + np.triu(expected, k=1)
    # Limited, because a matrix of full width would leave a blank area below.
    size = min(0.36 * len(names) + 1.6, WIDTH + 1.0)
    with _panel(0, height=max(2.2, size)) as (figure, axes):
        axes.grid(visible=False)
        shades = axes.imshow(cells, vmin=0, vmax=1, cmap="cividis")
        labels = [_short(n) for n in names]
        large = len(names) > MAX_NUMBERED
        size_of_text = MATRIX_TEXT if large else TEXT - 1
        axes.set_xticks(range(len(names)), labels, rotation=90 if large else 60, ha="right", fontsize=size_of_text)
        for label in axes.get_xticklabels():
            label.set(rotation_mode="anchor", va="center" if large else "top")
        axes.set_yticks(range(len(names)), labels, fontsize=size_of_text)
        axes.spines[:].set_visible(False)
        for i, j in np.ndindex((0, 0) if large else matrix.shape):
            colour = "white" if cells[i, j] < 0.55 else "#111111"
            text = f"{cells[i, j]:.2f}".removeprefix("0") if cells[i, j] < 0.995 else "1"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7.5 if len(names) > 6 else TEXT - 1)
        if large:
            figure.colorbar(shades, location="top", shrink=0.8)
    caption = (
        "Below the diagonal: Jaccard overlap |A & B| / |A | B| of the first seed's selections. Above it: of two random "
        "ones of the same sizes, p q / (p + q - p q)."
    )
    return CaptionedFigure(name, title, caption, figure)


def simulation(
    curves: Sequence[PerformanceCurve], n_parameters: float, styles: Mapping[str, MethodStyle], name: str
) -> CaptionedFigure:
    """CCDS figure 1: simulated performance of four kinds of methods at one size of the trained model."""
    grid = np.geomspace(1e16, max(curves[0].c_full, 2e19), CURVE_POINTS * 2)
    with _panel(len(curves)) as (figure, axes):
        for curve in curves:
            style = styles[curve.method]
            costs = np.union1d(grid[grid > curve.c_select], [max(curve.c_select, grid[0])])
            axes.plot(costs, curve.predict(costs), color=style.colour, label=_short(curve.method))
        _flops_axis(axes, TOTAL)
        axes.set_ylabel("simulated score (%)")
        axes.set_ylim(0, 102)
    caption = "Simulated, not measured: P0 = 0, Pbar = 100, 1e8 tokens, a scorer of 7.5e9 parameters."
    return CaptionedFigure(name, f"Simulation: training a model of {n_parameters:.3g} parameters", caption, figure)


def regret(
    group: GroupFits, rows: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, MethodStyle], name: str
) -> CaptionedFigure:
    """Regret: the distance of each method to the best of the grid at each budget."""
    scale = 100 if in_percent(group.metric) else 1
    parts = [[m for m in part if m in rows] for part in _divided(group.points)]
    with _panels(list(map(len, parts))) as (figure, panels):
        for axes, methods in zip(panels, parts, strict=True):
            for method in methods:
                style, line = styles[method], rows[method]
                axes.plot(
                    [c for c, _ in line],
                    [scale * r for _, r in line],
                    color=style.colour,
                    marker=style.marker,
                    linestyle=style.line,
                    markersize=5,
                    linewidth=1.4,
                    label=_short(method),
                )
            _flops_axis(axes, "budget, total FLOPs")
            axes.set_ylabel("regret (points)" if scale == 100 else f"regret in {_score_label(group.metric)}")
            highest = max(1e-9, *(scale * r for method in methods for _, r in rows[method]))
            axes.set_ylim(-0.03 * highest, min(1.05 * highest, SHOWN_POINTS) if scale == 100 else None)
    caption = "Distance to the best affordable mean of the grid; the best of noisy means flatters itself."
    return CaptionedFigure(name, f"{_group_name(group)}: regret", caption + _order_note(parts), figure)


def probabilities(course: Mapping[str, np.ndarray], title: str, name: str) -> CaptionedFigure:
    """Probability of each source over the steps of the policy; values of shape (steps,), NaN where there is none."""
    with _panel(len(course)) as (figure, axes):
        for i, (source, values) in enumerate(course.items()):
            axes.plot(
                np.arange(1, len(values) + 1),
                values,
                color=SERIES[i % len(SERIES)],
                marker="osD^vPX<"[i % 8],
                markersize=5,
                label=_short(source),
            )
        axes.set_xlabel("update of the policy")
        axes.set_ylabel("probability of the source")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(0.8, max(map(len, course.values())) + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return CaptionedFigure(name, title, "Probability of selecting each source, mean over seeds.", figure)


def stacked(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    xlabel: str,
    caption: str,
    name: str,
    order: Sequence[str] = (),
) -> CaptionedFigure:
    """A stacked bar of parts for each row. Parts are coloured by their position in `order`, then in the rest."""
    present = list(dict.fromkeys(part for row in rows.values() for part in row))
    positions = {part: i for i, part in enumerate(dict.fromkeys([*order, *present]))}
    parts = sorted(present, key=positions.__getitem__)
    columns = 1 if max(map(len, parts)) > LONGEST_LABEL else 2
    with _panel(len(parts), columns, height=0.28 * len(rows) + 1.0) as (figure, axes):
        offsets = np.zeros(len(rows))
        for part in parts:
            i = positions[part]
            widths = np.array([row.get(part, 0.0) for row in rows.values()])
            hatch = ("", "///", "...", "xxx")[min(3, i // len(SERIES))]
            axes.barh(
                range(len(rows)),
                widths,
                left=offsets,
                height=0.7,
                color=SERIES[i % len(SERIES)],
                hatch=hatch,
                label=_short(part, LONGEST_STAGE),
            )
            offsets += widths
        axes.set_yticks(range(len(rows)), [_short(r) for r in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel)
    return CaptionedFigure(name, title, caption, figure)
