"""Charts as figures of Matplotlib, legible on a phone: for files, for print, and where a page runs no code."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from cads.study.report.charts import BarChart, CurveChart, DotChart, MatrixChart, Series
from cads.study.report.style import FAINT, INK, SERIES

WIDTH, AXES_HEIGHT, LEGEND_ROW = 4.5, 2.9, 0.21
"""Inches. In a figure that is shown 350 pixels wide, text of `TEXT` points is then about as many pixels high."""
TEXT = 10.5
LONGEST_LABEL, LONGEST_STAGE = 22, 50
MAX_NUMBERED = 12
"""Methods of the largest matrix with numbers in it. In a larger one they would overlap."""
MATRIX_TEXT = 6.5
"""Size of the labels of a matrix without numbers, in points: as high as its rows."""
PNG_DPI = 180
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


@singledispatch
def draw(chart: object) -> Figure:
    """The figure of a chart."""
    raise TypeError(f"{type(chart).__name__} is no chart")


@draw.register
def _curves(chart: CurveChart) -> Figure:
    by_label = {s.label: s for s in chart.series}
    parts = chart.divided
    n_more = len(chart.references) + (chart.band is not None)
    n_named = [sum(not by_label[label].belongs_to for label in part.labels) + n_more for part in parts]
    with _panels(n_named) as (figure, panels):
        for axes, part in zip(panels, parts, strict=True):
            if chart.band is not None:
                band = chart.band
                axes.fill_between(band.x, band.low, band.high, color=FAINT, alpha=0.25, lw=0, label=_short(band.label))
            for series in [*(by_label[label] for label in part.labels), *chart.references]:
                _plot(axes, series)
            if chart.logarithmic:
                _logarithmic(axes)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(chart.xlabel)
            axes.set_ylabel(chart.ylabel)
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, part.limits[0]), min(high, part.limits[1]))
    return figure


def _plot(axes: Axes, series: Series) -> None:
    style: dict[str, Any] = {
        "color": series.colour,
        "marker": series.marker or None,
        "linestyle": series.line or "none",
        "markersize": 5,
        "linewidth": 1.4,
        "alpha": series.opacity,
        "markevery": series.mark_every,
        "label": "_nolegend_" if series.belongs_to else _short(series.label),
    }
    if series.half_widths is None:
        axes.plot(series.x, series.y, **style)
    else:
        axes.errorbar(series.x, series.y, yerr=series.half_widths, elinewidth=0.8, capsize=2, **style)


@draw.register
def _bars(chart: BarChart) -> Figure:
    rows, parts = chart.rows, chart.positions
    columns = 1 if max(map(len, parts)) > LONGEST_LABEL else 2
    with _panel(len(parts), columns, height=0.28 * len(rows) + 1.0) as (figure, axes):
        offsets = np.zeros(len(rows))
        for part, i in parts.items():
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
        axes.set_xlabel(chart.xlabel)
    return figure


@draw.register
def _dots(chart: DotChart) -> Figure:
    dots = chart.dots
    with _panel(int(chart.band is not None), 1, height=0.28 * len(dots) + 1.0) as (figure, axes):
        if chart.band is not None:
            name, low, high = chart.band
            axes.axvspan(low, high, color=FAINT, alpha=0.25, lw=0, label=_short(name, LONGEST_STAGE))
        for i, dot in enumerate(dots):
            axes.errorbar([dot.value], [i], xerr=[dot.half_width], color=dot.colour, marker="o", capsize=2)
        axes.set_yticks(range(len(dots)), [_short(dot.label) for dot in dots])
        axes.set_ylim(-0.6, len(dots) - 0.4)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(chart.xlabel)
    return figure


@draw.register
def _matrix(chart: MatrixChart) -> Figure:
    names, cells = chart.names, chart.cells
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
        for i, j in np.ndindex((0, 0) if large else cells.shape):
            colour = "white" if cells[i, j] < 0.55 else "#111111"
            text = f"{cells[i, j]:.2f}".removeprefix("0") if cells[i, j] < 0.995 else "1"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7.5 if len(names) > 6 else TEXT - 1)
        if large:
            figure.colorbar(shades, location="top", shrink=0.8)
    return figure


def svg_of(figure: Figure, name: str) -> str:
    """The figure as SVG; the same figure and name give the same text."""
    buffer = io.StringIO()
    with mpl.rc_context({**RC, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # The layout is slow, and the same for every format: it is not computed again.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def page_svg(text: str) -> str:
    """SVG for a page: no background, ink in the colour of the page's text, ids that no other figure has."""
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text[text.index("<svg") :]).replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure on a white background."""
    with mpl.rc_context(RC):
        figure.savefig(path, facecolor="white", dpi=PNG_DPI)


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


def _logarithmic(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with legible ticks."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    # Over less than two decades, powers of ten alone would give one or two labels.
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=7))
    axes.xaxis.set_major_formatter(LogFormatterSciNotation(base=10, minor_thresholds=(math.inf, math.inf)))
    axes.xaxis.set_minor_formatter(NullFormatter())
