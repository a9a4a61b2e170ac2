"""The figures of a study. Each is a pure function of points, fits or selections.

A figure that would say nothing is None: a curve of one point, a fit that describes no method. The frontier, the fits,
the break-even and the overlap are figures 2-4 and 6 of CCDS (Yin and Rush, ICLR 2025, arXiv 2410.16208).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cads.study.analysis.fits import SHARED_TASKS, GroupFits, fixed_selection, turned
from cads.study.analysis.frontier import amortised_flops
from cads.study.analysis.points import (
    MethodPoint,
    best_of,
    budgets_of,
    complete,
    in_percent,
    interval_text,
    place_name,
    within_budget,
)
from cads.study.analysis.verdicts import shown_name
from cads.study.report.charts import (
    NEITHER_LIMIT,
    Band,
    BarChart,
    Chart,
    CurveChart,
    Dot,
    DotChart,
    MatrixChart,
    Panel,
    Series,
)
from cads.study.report.static import draw, page_svg, save_png, svg_of
from cads.study.report.style import INK, SERIES, MethodStyle

MAX_LINES = 8
"""Methods in one panel. More methods are divided among several panels, so that their lines stay distinct."""
MOST_BREAK_EVEN = 6
"""Methods with a figure of their break-even."""
ANCHORS = ("full", "cads", "search")
"""Names of methods that are in every panel, for comparison."""
SHOWN_POINTS = 25.0
"""Range of figures of scores, in percentage points below the best. Lower scores are only in the table."""
MARGIN = 0.6
"""Of a figure about its means, as a share of their range: for intervals, and for the shading below."""
CURVE_POINTS = 200
MARKS_BY_TASKS, LINES_BY_TASKS = "osD^", ("-", "--", "-.", ":")
TOTAL, TRAINING = "total FLOPs (selection + training)", "training FLOPs"
FREE_BAND = "free: worst to best"
TELLING_SHARE = 0.02
"""Selection that costs a smaller share of training is not worth sharing."""
SAME_OVERLAP = 0.005
"""Overlaps that differ by less say nothing."""

Styles = Mapping[str, MethodStyle]


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its title and caption.

    Attributes:
        name: of its files. title: above the figure. caption: below the figure, in sentences. chart: what it shows.
    """

    name: str
    title: str
    caption: str
    chart: Chart

    @cached_property
    def figure(self) -> Figure:
        """The figure of Matplotlib."""
        return draw(self.chart)

    @cached_property
    def _rendered(self) -> str:
        return svg_of(self.figure, self.name)

    def svg(self) -> str:
        """SVG for a page; see `page_svg`."""
        return page_svg(self._rendered)

    def save(self, folder: Path, formats: Sequence[str] = ("svg", "png")) -> None:
        """Write NAME.svg and NAME.png, on a white background."""
        folder.mkdir(parents=True, exist_ok=True)
        if "svg" in formats:
            text = self._rendered.replace("<svg ", '<svg style="background: white" ', 1)
            (folder / f"{self.name}.svg").write_text(text, encoding="utf-8")
        if "png" in formats:
            save_png(self.figure, folder / f"{self.name}.png")


def verdict(group: GroupFits, styles: Styles, name: str) -> CaptionedFigure:
    """The methods that select, against the band of what is free: over budgets, or for one budget as a row each."""
    levels = budgets_of(group.points)
    seeds = max(len(p.seeds) for p in group.points)
    text = f"Means of {seeds} seeds with 95 % t-intervals." if seeds > 1 else "One run each."
    title = f"{_group_name(group)}: {group.metric} of what selects, and of what is free"
    if len(levels) == 1:
        dots = _dots(group, styles)
        return CaptionedFigure(name, title, f"{text} The budget is {levels[0].budget}.{_band_note(dots.band)}", dots)
    band = _free_band(group)
    points = [p for p in group.points if band is None or not p.free]
    paid = points or group.points
    series = _score_series(paid, styles)
    panels = [Panel(part.labels, _near(part, series, band)) for part in _panels(group, paid)]
    chart = CurveChart(series, TOTAL, _score_label(group.metric), panels=panels, band=band)
    shaded = "" if band is None else " Shaded: what is free (no compute for selection), from the worst to the best."
    axis = " The horizontal axis is everything spent, selection included."
    return CaptionedFigure(name, title, f"{text}{axis}{shaded}{_panel_note(chart)}{_cut_note(chart)}", chart)


def _near(panel: Panel, series: Sequence[Series], band: Band | None) -> tuple[float, float]:
    """Limits of the vertical axis about the means of a panel and the best that is free; a band may reach far below."""
    means = [y for s in series if s.label in panel.labels for y in s.y if y >= panel.limits[0]]
    means += [] if band is None else list(band.high)
    if not means:
        return panel.limits
    low, high = min(means), max(means)
    margin = MARGIN * (high - low) or abs(high) * MARGIN
    return max(panel.limits[0], low - margin), min(panel.limits[1], high + margin)


def _free_band(group: GroupFits) -> Band | None:
    """The means of free methods at each budget; None if fewer than two budgets have one."""
    x, low, high, notes = [], [], [], []
    for level in budgets_of(group.points):
        affordable = within_budget(group.points, level)
        free = [p for p in complete(affordable) if p.free] if affordable else []
        if not free:
            continue
        ranked = sorted(free, key=_shown_mean, reverse=group.maximised)
        x.append(level.flops)
        low.append(min(map(_shown_mean, free)))
        high.append(max(map(_shown_mean, free)))
        notes.append("; ".join(f"{shown_name(p.method)} {interval_text(p)}" for p in ranked))
    return Band(FREE_BAND, x, low, high, notes) if len(x) > 1 else None


def _dots(group: GroupFits, styles: Styles) -> DotChart:
    """All methods at the only budget, the best first."""
    ranked = sorted(group.points, key=_shown_mean, reverse=group.maximised)
    dots = [
        Dot(shown_name(p.method), _shown_mean(p), _half_width(p), styles[p.method].colour, _spent_note(p))
        for p in ranked
    ]
    free = [_shown_mean(p) for p in group.points if p.free]
    band = (FREE_BAND, min(free), max(free)) if len(free) > 1 else None
    return DotChart(dots, _score_label(group.metric), band)


def _band_note(band: object) -> str:
    return "" if band is None else " Shaded: what is free (no compute for selection), from the worst to the best."


def scores(group: GroupFits, styles: Styles, name: str, *, training_only: bool = False) -> CaptionedFigure:
    """Scores with intervals over seeds, against total FLOPs or, as in CCDS figure 5, training FLOPs."""
    chart = CurveChart(
        _score_series(group.points, styles, training_only=training_only),
        TRAINING if training_only else TOTAL,
        _score_label(group.metric),
        panels=_panels(group, group.points),
    )
    seeds = max(len(p.seeds) for p in group.points)
    text = f"Means of {seeds} seeds with 95 % t-intervals." if seeds > 1 else "One run each."
    if fewer := sorted({shown_name(p.method) for p in group.points if len(p.seeds) < seeds}):
        text += f" Of fewer seeds at some budget: {', '.join(fewer)}."
    axis = "the budget of training alone" if training_only else "everything spent, selection included"
    title = f"{_group_name(group)}: {group.metric} against {TRAINING if training_only else 'total FLOPs'}"
    caption = f"{text} The horizontal axis is {axis}.{_panel_note(chart)}{_cut_note(chart)}"
    return CaptionedFigure(name, title, caption, chart)


def _score_series(points: Sequence[MethodPoint], styles: Styles, *, training_only: bool = False) -> list[Series]:
    return [
        Series(
            shown_name(method),
            [p.train_flops if training_only else p.total for p in line],
            [_shown_mean(p) for p in line],
            styles[method].colour,
            styles[method].marker,
            styles[method].line,
            half_widths=[_half_width(p) for p in line],
            notes=[_spent_note(p) for p in line],
        )
        for method, line in _by_method(points).items()
    ]


def frontier(group: GroupFits, styles: Styles, name: str) -> CaptionedFigure | None:
    """CCDS figure 2: points with the frontier line; None without a line."""
    if group.line is None:
        return None
    chart = CurveChart(
        [
            Series(
                shown_name(method),
                [p.total for p in line],
                [_shown_mean(p) for p in line],
                styles[method].colour,
                styles[method].marker,
                "",
                notes=[_spent_note(p) for p in line],
            )
            for method, line in _by_method(group.points).items()
        ],
        TOTAL,
        _score_label(group.metric),
        panels=_panels(group, group.points),
        references=[_frontier_line(group)],
    )
    caption = "Means over seeds; the dotted line is the least-squares line through the points that no other dominates."
    return CaptionedFigure(
        name, f"{_group_name(group)}: frontier", f"{caption}{_panel_note(chart)}{_cut_note(chart)}", chart
    )


def fits(group: GroupFits, styles: Styles, name: str) -> CaptionedFigure | None:
    """CCDS figure 3: the points and the curves of the methods that a curve describes; None if it describes none."""
    curves = {curve.method: curve for curve in group.curves}
    if not curves:
        return None
    low, high = group.span
    grid = np.geomspace(low, max(high, low * 1.01), CURVE_POINTS)
    sign = 1 if group.maximised else -1
    points = [p for p in group.points if p.method in curves]
    series = []
    for method, line in _by_method(points).items():
        style, label = styles[method], shown_name(method)
        series.append(
            Series(label, [p.total for p in line], [_shown_mean(p) for p in line], style.colour, style.marker, "")
        )
        predicted = (sign * curves[method].predict(grid)).tolist()
        series.append(
            Series(f"{label}: curve", grid.tolist(), predicted, style.colour, "", style.line, belongs_to=label)
        )
    panels = []
    for panel in _panels(group, points):
        labels = [label for method in panel.labels for label in (method, f"{method}: curve")]
        panels.append(Panel(labels, panel.limits))
    chart = CurveChart(series, TOTAL, _score_label(group.metric), panels=panels)
    caption = "Curves: P(C) = P0 + (Pbar - P0)(1 - exp(-lambda (C - C_select) / C(D))), by bounded least squares."
    source = "the score of training on everything" if group.complete else "the best mean of the grid, not fitted"
    caption += f" Pbar is {source}."
    missing = ", ".join(map(shown_name, group.not_fitted))
    caption += f" Too few budgets for {missing}." if missing else ""
    caption += f" No such curve describes {', '.join(map(shown_name, group.unused))}." if group.unused else ""
    caption += "".join(f" {shown_name(method)}: {doubt}." for method, doubt in group.doubtful_costs.items())
    return CaptionedFigure(
        name, f"{_group_name(group)}: fits", f"{caption}{_panel_note(chart)}{_cut_note(chart)}", chart
    )


def break_even_figures(group: GroupFits, styles: Styles, prefix: str) -> list[CaptionedFigure]:
    """CCDS figure 4: the scores if T tasks share the selection, one figure for each method with a fixed selection.

    A method with one budget has none, nor has one whose selection is too cheap for sharing to matter. Grids without a
    frontier line to compare with have none. Of many methods those with the best scores are drawn.
    """
    result: list[CaptionedFigure] = []
    if group.line is None:
        return result
    telling = {
        method: line
        for method, line in _by_method(group.points).items()
        if fixed_selection(line) > 0 and len(line) > 1 and max(p.spent / p.train_flops for p in line) >= TELLING_SHARE
    }
    best = sorted(telling, key=lambda method: -max(turned(p) for p in telling[method]))[:MOST_BREAK_EVEN]
    left = len(telling) - len(best)
    for method, line in telling.items():
        if method not in best:
            continue
        series = [
            Series(
                f"T = {tasks}",
                [amortised_flops(p.spent, p.train_flops, tasks) for p in line],
                [_shown_mean(p) for p in line],
                styles[method].colour,
                MARKS_BY_TASKS[i],
                LINES_BY_TASKS[i],
                opacity=1 - 0.2 * i,
            )
            for i, tasks in enumerate(SHARED_TASKS)
        ]
        chart = CurveChart(
            series,
            "FLOPs a task, C_select / T + C_train",
            _score_label(group.metric),
            references=[_frontier_line(group)],
        )
        label = shown_name(method)
        caption = f"What a task pays if T tasks share one selection by {label}; left of the line it pays off."
        caption += f" {left} methods with lower scores are in fits.json alone." if left else ""
        title = f"{_group_name(group)}: break-even of {label}"
        result.append(CaptionedFigure(f"{prefix}-{len(result) + 1}", title, caption, chart))
    return result


def overlap_figure(
    names: Sequence[str], matrix: np.ndarray, expected: np.ndarray, title: str, name: str
) -> CaptionedFigure | None:
    """CCDS figure 6: Jaccard overlap of selections, and of random ones of the same sizes, both of shape (M, M).

    None if all overlap as random ones do.
    """
    if np.abs(matrix - expected)[~np.eye(len(names), dtype=bool)].max(initial=0.0) < SAME_OVERLAP:
        return None
    cells = np.tril(matrix) + np.triu(expected, k=1)
    caption = (
        "Below the diagonal: Jaccard overlap |A & B| / |A | B| of the first seed's selections. Above it: of two random "
        "ones of the same sizes, p q / (p + q - p q)."
    )
    return CaptionedFigure(name, title, caption, MatrixChart([shown_name(n) for n in names], cells))


def regret(
    group: GroupFits, rows: Mapping[str, Sequence[tuple[float, float]]], styles: Styles, name: str
) -> CaptionedFigure | None:
    """Regret: the distance of each method to the best of the grid at each budget; None for one budget or method."""
    if len(rows) < 2 or max(map(len, rows.values())) < 2:
        return None
    scale = 100 if in_percent(group.metric) else 1
    panels = []
    for panel in _panels(group, [p for p in group.points if p.method in rows]):
        values = [scale * r for method in rows if shown_name(method) in panel.labels for _, r in rows[method]]
        highest = max(1e-9, *values)
        ceiling = min(1.05 * highest, SHOWN_POINTS) if scale == 100 else math.inf
        panels.append(Panel(panel.labels, (-0.03 * highest, ceiling)))
    chart = CurveChart(
        [
            Series(
                shown_name(method),
                [c for c, _ in row],
                [scale * r for _, r in row],
                styles[method].colour,
                styles[method].marker,
                styles[method].line,
            )
            for method, row in rows.items()
        ],
        "budget, total FLOPs",
        "regret (points)" if scale == 100 else f"regret in {_score_label(group.metric)}",
        panels=panels,
    )
    caption = "Distance to the best affordable mean of the grid; the best of noisy means flatters itself."
    return CaptionedFigure(name, f"{_group_name(group)}: regret", caption + _panel_note(chart), chart)


def probabilities(course: Mapping[str, np.ndarray], title: str, name: str) -> CaptionedFigure | None:
    """Probability of each source over the steps of the policy; values of shape (steps,), NaN where there is none.

    None for a policy of one step.
    """
    if max(map(len, course.values())) < 2:
        return None
    series = [
        Series(
            source,
            list(range(1, len(values) + 1)),
            values.tolist(),
            SERIES[i % len(SERIES)],
            "osD^vPX<"[i % 8],
            mark_every=max(1, len(values) // 10),
        )
        for i, (source, values) in enumerate(course.items())
    ]
    panel = Panel([s.label for s in series], (-0.03, 1.03))
    chart = CurveChart(series, "update of the policy", "probability of the source", panels=[panel], logarithmic=False)
    return CaptionedFigure(name, title, "Probability of selecting each source, mean over seeds.", chart)


def stacked(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    xlabel: str,
    caption: str,
    name: str,
    order: Sequence[str] = (),
) -> CaptionedFigure:
    """A stacked bar of parts for each method; see `BarChart`."""
    shown = {shown_name(method): row for method, row in rows.items()}
    return CaptionedFigure(name, title, caption, BarChart(shown, xlabel, order))


def _frontier_line(group: GroupFits) -> Series:
    assert group.line is not None
    low, high = group.span
    grid = np.geomspace(low, max(high, low * 1.01), CURVE_POINTS)
    values = (1 if group.maximised else -1) * group.line.predict(grid)
    return Series("frontier line", grid.tolist(), values.tolist(), INK, "", ":")


def _score_label(metric: str) -> str:
    """The label of an axis of scores, with its unit."""
    unit = " (%)" if in_percent(metric) else "" if metric in ("score",) else " (nats)" if "loss" in metric else ""
    return f"test {metric}{unit}" if metric != "score" else "score (published, %)"


def _shown_mean(p: MethodPoint) -> float:
    """The mean as figures show it: in percent if it is a share, never with its sign changed."""
    return 100 * p.mean if in_percent(p.metric) else p.mean


def _half_width(p: MethodPoint) -> float:
    """The half-width of the interval as figures show it; 0 if there is none."""
    return (100 if in_percent(p.metric) else 1) * float(np.nan_to_num(p.half_width))


def _spent_note(p: MethodPoint) -> str:
    return f"budget {p.budget}; selection {p.selection:.3g} FLOPs, training {p.train_flops:.3g}"


def _by_method(points: Sequence[MethodPoint]) -> dict[str, list[MethodPoint]]:
    """The points of each method, cheapest first."""
    lines: dict[str, list[MethodPoint]] = {}
    for p in points:
        lines.setdefault(p.method, []).append(p)
    return {method: sorted(line, key=lambda p: p.total) for method, line in lines.items()}


def _panels(group: GroupFits, points: Sequence[MethodPoint]) -> list[Panel]:
    """The methods of each panel: one panel up to `MAX_LINES` methods, else the best first, with `ANCHORS` in each.

    The vertical axis of a panel is cut far below the best of its methods.
    """
    lines = _by_method(points)
    parts = [list(lines)]
    if len(lines) > MAX_LINES:
        sign = 1 if group.maximised else -1
        best = {p.budget: sign * best_of([q for q in points if q.budget == p.budget]).mean for p in points}
        gaps = {method: np.mean([sign * p.mean - best[p.budget] for p in line]) for method, line in lines.items()}
        anchors = [method for method in lines if method in ANCHORS]
        others = sorted((method for method in lines if method not in anchors), key=lambda m: (-gaps[m], m))
        n_panels = math.ceil(len(others) / (MAX_LINES - len(anchors)))
        parts = [[*anchors, *part] for part in np.array_split(np.array(others), n_panels)]
    return [Panel([shown_name(m) for m in part], _limits([p for m in part for p in lines[m]])) for part in parts]


def _limits(points: Sequence[MethodPoint]) -> tuple[float, float]:
    """Limits of the vertical axis, `SHOWN_POINTS` below the best of the worst budget, for shares that are maximised."""
    if not in_percent(points[0].metric) or not points[0].maximised:
        return NEITHER_LIMIT
    best: dict[str, float] = {}
    for p in points:
        best[p.budget] = max(best.get(p.budget, 0.0), _shown_mean(p))
    return max(0.0, min(best.values()) - SHOWN_POINTS), min(100.5, max(best.values()) + SHOWN_POINTS / 8)


def _cut_note(chart: CurveChart) -> str:
    """The sentence of a caption about values that the vertical axis leaves out; "" if there are none."""
    values = {s.label: min(s.y) for s in chart.series}
    cut = any(values[label] < part.limits[0] for part in chart.divided for label in part.labels)
    return f" What lies more than {SHOWN_POINTS:.0f} points below the best of every budget is in the table." * cut


def _panel_note(chart: CurveChart) -> str:
    """The sentence of a caption about the order of panels; "" for one panel."""
    if len(chart.divided) == 1:
        return ""
    return (
        " Methods near the best of each budget come first. The others are in further panels, each on its own scale, "
        "or a click on their name away."
    )


def _group_name(group: GroupFits) -> str:
    """The name of a group: task and model size."""
    return place_name(group.task, group.model) or "all"
