"""Charts for a browser, by plotly.js: values under the pointer, and curves that a click in the legend hides.

The library is embedded in the page, compressed, so that the page needs no network. Where it is not installed, or the
browser cannot unpack it, the page shows the figures of `cads.study.report.static`.
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache, singledispatch
from importlib.resources import files
from typing import Any

import numpy as np

from cads.study.report.charts import BarChart, CurveChart, DotChart, MatrixChart, Series
from cads.study.report.static import MAX_NUMBERED
from cads.study.report.style import FAINT, SERIES

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon",
    "*": "star",
}
"""Markers of Matplotlib by the names of plotly."""
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
HATCHES = ("", "/", ".", "x")
ROW_HEIGHT, AXIS_HEIGHT, LABEL_HEIGHT, CURVE_HEIGHT = 26, 60, 80, 300
"""Pixels: of a row of bars or dots, of an axis with its title, of names below a matrix, and of the area of curves."""
BAND_OPACITY = 0.22


def is_installed() -> bool:
    """Whether the library can be embedded."""
    return importlib.util.find_spec("plotly") is not None


@cache
def library() -> str:
    """plotly.js, compressed by gzip, in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def script() -> str:
    """The code that draws the charts of a page."""
    return files("cads.study.report").joinpath("templates/report.js").read_text()


def embedded(charts: Mapping[str, object]) -> str:
    """The charts as JSON that can stand in a page: no character opens a tag."""
    text = json.dumps({name: specification(chart) for name, chart in charts.items()}, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@singledispatch
def specification(chart: object) -> dict[str, Any]:
    """What plotly draws: `data`, `layout`, and `height`, in pixels, of the area without the legend."""
    raise TypeError(f"{type(chart).__name__} is no chart")


@specification.register
def _curves(chart: CurveChart) -> dict[str, Any]:
    first = chart.divided[0]
    data: list[dict[str, Any]] = []
    if chart.band is not None:
        band = chart.band
        shared = {"type": "scatter", "mode": "lines", "x": list(band.x), "legendgroup": "band", "line": {"width": 0}}
        low = {**shared, "y": list(band.low), "showlegend": False, "hoverinfo": "skip"}
        high = {
            **shared,
            "y": list(band.high),
            "name": band.label,
            "fill": "tonexty",
            "fillcolor": _rgba(FAINT, BAND_OPACITY),
            "line": {"width": 1, "color": FAINT},
            "text": [_lines(note) for note in band.notes],
            "hovertemplate": "free: %{text}<extra></extra>",
        }
        data += [low, high]
    by_label = {s.label: s for s in chart.series}
    order = list(dict.fromkeys(label for part in chart.divided for label in part.labels))
    data += [_trace(by_label[label], shown=label in first.labels) for label in order]
    data += [_trace(series, shown=True) for series in chart.references]
    yaxis: dict[str, Any] = {"title": {"text": _text(chart.ylabel)}}
    values = [y for label in first.labels for y in _outer(by_label[label])]
    values += [] if chart.band is None else [*chart.band.low, *chart.band.high]
    low_y, high_y = min(values), max(values)
    margin = 0.05 * (high_y - low_y) or 1.0
    limits = max(low_y - margin, first.limits[0]), min(high_y + margin, first.limits[1])
    yaxis["range"] = list(limits)
    xaxis: dict[str, Any] = {"title": {"text": _text(chart.xlabel)}}
    if chart.logarithmic:
        places = [x for label in order for x in by_label[label].x] + ([] if chart.band is None else list(chart.band.x))
        low_x, high_x = math.log10(min(places)), math.log10(max(places))
        pad = 0.04 * (high_x - low_x) or 0.1
        # Over more than two decades, digits between powers of ten would overlap.
        xaxis |= {"type": "log", "exponentformat": "power", "dtick": "D2" if high_x - low_x < 2 else 1}
        xaxis["range"] = [low_x - pad, high_x + pad]
    else:
        xaxis |= {"tickformat": "d", "dtick": max(1, round(max(map(len, (s.x for s in chart.series))) / 6))}
    return {"data": data, "layout": {"xaxis": xaxis, "yaxis": yaxis}, "height": CURVE_HEIGHT}


def _outer(series: Series) -> list[float]:
    """The finite ends of the intervals of a series."""
    widths = series.half_widths or [0.0] * len(series.y)
    ends = [y + sign * w for y, w in zip(series.y, widths, strict=True) for sign in (-1, 1)]
    return [y for y in ends if math.isfinite(y)]


def _trace(series: Series, *, shown: bool) -> dict[str, Any]:
    # Markers of a dense curve would hide it.
    marked = series.marker and series.mark_every == 1
    mode = "+".join(part for part, has in (("lines", series.line), ("markers", marked)) if has)
    notes = [_text(note) for note in series.notes or [""] * len(series.x)]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": mode,
        "name": _text(series.label),
        "x": list(series.x),
        "y": _finite(series.y),
        "opacity": series.opacity,
        "line": {"color": series.colour, "width": 2, "dash": DASHES.get(series.line, "solid")},
        "marker": {"color": series.colour, "size": 7, "symbol": SYMBOLS.get(series.marker, "circle")},
        "text": notes,
        "hovertemplate": "%{fullData.name}: %{y:.4g} at %{x:.3g}<br>%{text}<extra></extra>",
        # Curves of the other panels are a click away.
        "visible": True if shown else "legendonly",
        "legendgroup": _text(series.belongs_to or series.label),
        "showlegend": not series.belongs_to,
    }
    if series.half_widths is not None and any(series.half_widths):
        trace["error_y"] = {"type": "data", "array": list(series.half_widths), "thickness": 1, "width": 3}
        trace["hovertemplate"] = (
            "%{fullData.name}: %{y:.4g} ± %{error_y.array:.3g} at %{x:.3g}<br>%{text}<extra></extra>"
        )
    return trace


@specification.register
def _bars(chart: BarChart) -> dict[str, Any]:
    rows = [_text(row) for row in chart.rows]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _text(part),
            "y": rows,
            "x": [row.get(part, 0.0) for row in chart.rows.values()],
            "marker": {
                "color": SERIES[i % len(SERIES)],
                "pattern": {"shape": HATCHES[min(3, i // len(SERIES))]},
            },
            "hovertemplate": "%{y}, %{fullData.name}: %{x:.3g}<extra></extra>",
        }
        for part, i in chart.positions.items()
    ]
    return {"data": data, "layout": _rows_layout(chart.xlabel, rows, barmode="stack"), "height": _rows_height(rows)}


@specification.register
def _dots(chart: DotChart) -> dict[str, Any]:
    rows = [_text(dot.label) for dot in chart.dots]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "showlegend": False,
            "x": [dot.value],
            "y": [row],
            "error_x": {"type": "data", "array": [dot.half_width], "thickness": 1, "width": 3},
            "marker": {"color": dot.colour, "size": 9},
            "text": [_text(dot.note)],
            "hovertemplate": "%{y}: %{x:.4g} ± %{error_x.array:.3g}<br>%{text}<extra></extra>",
        }
        for row, dot in zip(rows, chart.dots, strict=True)
    ]
    layout = _rows_layout(chart.xlabel, rows)
    if chart.band is not None:
        _, low, high = chart.band
        place = {"xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
        shape = {"type": "rect", **place, "line": {"width": 0}, "fillcolor": FAINT, "opacity": BAND_OPACITY}
        layout["shapes"] = [shape]
    return {"data": data, "layout": layout, "height": _rows_height(rows)}


@specification.register
def _matrix(chart: MatrixChart) -> dict[str, Any]:
    names = [_text(name) for name in chart.names]
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": np.asarray(chart.cells, dtype=float).tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Cividis",
        "showscale": False,
        "texttemplate": "%{z:.2f}" if len(names) <= MAX_NUMBERED else "",
        "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>",
    }
    layout = _rows_layout("", names)
    layout["xaxis"] |= {"tickangle": -60}
    return {"data": [trace], "layout": layout, "height": _rows_height(names) + LABEL_HEIGHT}


def _rows_layout(xlabel: str, rows: Sequence[str], **layout: Any) -> dict[str, Any]:
    yaxis = {"autorange": "reversed", "automargin": True, "type": "category", "categoryarray": list(rows)}
    xaxis = {"title": {"text": _text(xlabel)}, "automargin": True, "exponentformat": "power"}
    return {"xaxis": xaxis, "yaxis": yaxis, **layout}


def _rows_height(rows: Sequence[str]) -> int:
    return ROW_HEIGHT * len(rows) + AXIS_HEIGHT


def _text(text: str) -> str:
    """Text as plotly shows it: it would read some of it as markup, or as TeX between dollars."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _lines(note: str) -> str:
    return _text(note).replace("; ", "<br>")


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in map(float, values)]


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
