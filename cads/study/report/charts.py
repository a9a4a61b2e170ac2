"""What a figure shows, whatever draws it: curves, bars, dots or a matrix, with their words.

`cads.study.report.static` draws a chart as SVG and PNG, `cads.study.report.interactive` for a browser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

NEITHER_LIMIT = (-math.inf, math.inf)


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: its name; x, y: of its points. half_widths: of the intervals of y, or None.
        colour, marker, line: as Matplotlib names them; "" for no marker or no line.
        mark_every: one marker in so many points. opacity: from 0 to 1.
        notes: what a reader sees at each point, beside its place; or None.
        belongs_to: the label of the series that it is hidden and shown with, and named by; "" for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = ""
    line: str = "-"
    half_widths: Sequence[float] | None = None
    mark_every: int = 1
    opacity: float = 1.0
    notes: Sequence[str] | None = None
    belongs_to: str = ""


@dataclass(frozen=True)
class Band:
    """The region between two curves; `notes`: what a reader sees at each point of the upper one."""

    label: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    notes: Sequence[str]


@dataclass(frozen=True)
class Panel:
    """Curves that are drawn together, by label; `limits`: of the vertical axis, which may be narrower than the data."""

    labels: list[str]
    limits: tuple[float, float] = NEITHER_LIMIT


@dataclass(frozen=True)
class CurveChart:
    """Curves over one axis.

    Attributes:
        series: all curves. panels: how they are divided, the first one first; empty: one panel.
        xlabel, ylabel: of the axes. logarithmic: whether the horizontal axis is; if not, it counts.
        band, references: in every panel.
    """

    series: list[Series]
    xlabel: str
    ylabel: str
    panels: list[Panel] = field(default_factory=list)
    logarithmic: bool = True
    band: Band | None = None
    references: list[Series] = field(default_factory=list)

    @property
    def divided(self) -> list[Panel]:
        """The panels."""
        return self.panels or [Panel([s.label for s in self.series])]


@dataclass(frozen=True)
class BarChart:
    """A stacked bar of parts for each row. Parts are coloured by their position in `order`, then in the rest."""

    rows: Mapping[str, Mapping[str, float]]
    xlabel: str
    order: Sequence[str] = ()

    @property
    def positions(self) -> dict[str, int]:
        """The parts that rows have, in order, with the number of the colour of each."""
        present = list(dict.fromkeys(part for row in self.rows.values() for part in row))
        numbers = {part: i for i, part in enumerate(dict.fromkeys([*self.order, *present]))}
        return {part: numbers[part] for part in sorted(present, key=numbers.__getitem__)}


@dataclass(frozen=True)
class Dot:
    """A value with the half-width of its interval (0: none), and its colour."""

    label: str
    value: float
    half_width: float
    colour: str
    note: str = ""


@dataclass(frozen=True)
class DotChart:
    """A row for each value; `band`: a name and two values, between which the background is shaded, or None."""

    dots: list[Dot]
    xlabel: str
    band: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class MatrixChart:
    """Numbers from 0 to 1, shape (M, M), with the names of rows and columns."""

    names: Sequence[str]
    cells: np.ndarray


Chart = CurveChart | BarChart | DotChart | MatrixChart
